"""A campaign: every point of some sweeps, tried in processes that may die of it, and what came of each.

Points are taken in a seeded order, a handful of the same sweep at a time, by as many processes as there is room for.
What was tried is kept in a file: a campaign that is cut off goes on where it ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import random
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.contract import FaultRecord, Provenance
from backends.faults.interposer import Control
from qualification.quoting import quoted, unquoted
from qualification.sweep.points import HOST, MODES, TRANSIENT, Point, Sweep
from qualification.sweep.stage import RECORDING_POINTS, Board, Setting

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 90.0
#: No point takes so long that is not over: the deadlines of what it may wait for are shorter together.
POINT_DEADLINE_S = 90.0
#: Beyond the requests that were counted, in case there are more: until one does not fire.
_MOST_BEYOND = 200
#: So many handfuls for each who plays are cut into pieces of so many points, at the end.
_LAST_FOR_EACH, _PIECE_POINTS = 4, 10
#: What a process may hold more than before, until it is looked at closely.
_SUSPECT = {"heap_bytes": 1 << 20, "descriptors": 4, "threads": 3, "processes": 3}
#: SQLite's cache of pages grows to 2 MB in the process that has the spool.
_SUSPECT_OF_HOST_BYTES = 4 << 20
#: And at once, beyond the most that it ever held: one point may leak, and no other. A recording that goes on is of the
#: host, some 100 KB a point.
_SUSPECT_AT_ONCE = {"heap_bytes": 512 << 10, "descriptors": 2, "threads": 0, "processes": 0}
_SUSPECT_OF_HOST_AT_ONCE_BYTES = 256 << 10
#: So many repetitions are compared then, with the fault and without; and so much more in each is a leak.
_STEPS = 4
#: Where the point is not always reached, it is repeated more often: so often in all.
_MOST_IN_SERIES = 18
_LEAK = {"heap_bytes": 24 << 10, "descriptors": 1, "threads": 1, "processes": 1}

#: What can be wrong after a point.
PROBLEMS = (
    *("samples_lost", "samples_different", "gaps_and_overlaps", "answers_wrong", "untold", "hangs", "livelocks"),
    *("hosts_lost", "memory_kept", "clean_runs_wrong", "feeds_not_durable"),
)


class DriverLost(Exception):
    """The process with the subject is gone, or hangs and was killed."""

    def __init__(self, text: str, *, hung: bool) -> None:
        super().__init__(text)
        self.hung = hung


class CutShort(Exception):
    """The campaign is to end while a point is looked at: nothing is known of it yet."""


class _NotRepeated(Exception):
    """A point cannot be compared with itself: something else is wrong, or (None) it is not reached often enough."""

    def __init__(self, problems: tuple[tuple[str, str], ...] | None) -> None:
        super().__init__()
        self.problems = problems


class FailsUndisturbed(Exception):
    """Something is wrong with no fault at all. ``outcome`` says what, as of the sweep's first point."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.point)
        self.outcome = outcome


class Driver:
    """The process with the subject, from outside."""

    def __init__(self, setting: Setting, log: Path) -> None:
        """Start it under the interposer, and wait until it is ready. Raises RuntimeError, InterposerUnavailable."""
        folder = Path(setting.folder)
        folder.mkdir(parents=True, exist_ok=True)
        control = folder / "control"
        control.unlink(missing_ok=True)
        self.control = Control.create(control)
        self.board = Board(folder / "board")
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "qualification.sweep.driver",
                    json.dumps(dataclasses.asdict(setting)),
                    str(os.getpid()),
                ],
                cwd=_ROOT,
                env=self.control.environment({**os.environ, "TMPDIR": str(folder)}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        self._pending = b""
        try:
            #: Whether the subject says what a user could get back.
            self.recovers = bool(self._receive(_START_S)["recovers"])
        except DriverLost as error:
            self.close()
            raise RuntimeError(f"the subject cannot be swept: {error}") from None

    def ask(self, deadline_s: float = POINT_DEADLINE_S, **request: Any) -> dict[str, Any]:
        """Ask for something and give the answer. Raises DriverLost."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
        return self._receive(deadline_s)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    self.kill()
                    raise DriverLost(f"no answer within {timeout_s:g} s", hung=True)
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    status = self.process.wait()
                    raise DriverLost(f"it ended with status {status}: {self.said()}", hung=False)
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def said(self) -> str:
        """Give the end of what it wrote, quoted, for a message."""
        return quoted(self._log.read_text(errors="replace")[-400:].strip() if self._log.exists() else "")

    def kill(self) -> None:
        """End it, and what is below it: those end with it, or are of its session."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it, whatever it is doing. A second call does nothing."""
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass(frozen=True)
class Outcome:
    """What came of one point."""

    point: str
    fired: int
    absorbed: bool = False
    died: bool = False
    #: The subject shut itself down in order, or its process ended, with everything acknowledged kept.
    stopped: bool = False
    problems: tuple[tuple[str, str], ...] = ()
    detail: str = ""
    call_site: tuple[str, ...] = ()
    took_s: float = 0.0


@dataclass
class Tally:
    """What came of one sweep in one mode."""

    sweep: Sweep
    mode: str
    #: Requests that a run without a fault makes, counted more than once.
    counted: list[int] = field(default_factory=list)
    planned: int = 0
    tried: int = 0
    fired: int = 0
    absorbed: int = 0
    runtime_died: int = 0
    host_stopped: int = 0
    failed: int = 0
    #: What its points took together, in the processes that tried them.
    took_s: float = 0.0
    #: Whether a run completed in which the fault did not fire any more.
    complete: bool = False

    def add(self, outcome: Outcome) -> None:
        """Add what came of a point."""
        self.tried += 1
        self.fired += bool(outcome.fired)
        self.absorbed += outcome.absorbed
        self.runtime_died += outcome.died
        self.host_stopped += outcome.stopped
        self.failed += bool(outcome.problems)
        self.took_s += outcome.took_s

    def plain(self) -> dict[str, Any]:
        """Give it as plain data, for the records."""
        return {
            "scenario": self.sweep.scenario,
            "target": self.sweep.target,
            "site": self.sweep.site.value,
            "mode": self.mode,
            "min_bytes": self.sweep.least_bytes(self.mode),
            "points_counted": self.counted,
            "points_tried": self.tried,
            "faults_fired": self.fired,
            "absorbed": self.absorbed,
            "runtime_died": self.runtime_died,
            "host_stopped": self.host_stopped,
            "failed": self.failed,
            "took_s": round(self.took_s, 3),
            "complete": self.complete,
        }


class Ledger:
    """What was tried, a line each: the next run of the same campaign does not try it again."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        """Take up what an earlier run with the same ``key`` tried; of another, or after a torn line, nothing more."""
        self._path, self.counts, self.outcomes = path, dict[str, list[int]](), dict[str, Outcome]()
        if path is None:
            return
        head = json.dumps({"key": key}, sort_keys=True)
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        if lines[:1] == [head]:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                for line in lines[1:]:
                    self._take(json.loads(line))
        # Beside it, and then moved: a kill meanwhile loses nothing of the earlier run.
        beside = path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        self._file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._write(head)
        for sweep, counts in self.counts.items():
            self._write(json.dumps({"sweep": sweep, "counts": counts}))
        for outcome in self.outcomes.values():
            self._write(json.dumps(dataclasses.asdict(outcome)))
        beside.replace(path)

    def _take(self, line: dict[str, Any]) -> None:
        if "sweep" in line:
            self.counts[line["sweep"]] = [int(each) for each in line["counts"]]
            return
        problems = tuple((str(kind), str(text)) for kind, text in line.pop("problems"))
        outcome = Outcome(**{**line, "problems": problems, "call_site": tuple(line["call_site"])})
        self.outcomes[outcome.point] = outcome

    def _write(self, line: str) -> None:
        rest = f"{line}\n".encode() if self._path is not None else b""
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def count(self, sweep: str, counts: list[int]) -> None:
        """Keep how many points a sweep has."""
        self.counts[sweep] = counts
        self._write(json.dumps({"sweep": sweep, "counts": counts}))

    def keep(self, outcome: Outcome) -> None:
        """Keep what came of a point. Raises OSError."""
        self.outcomes[outcome.point] = outcome
        self._write(json.dumps(unquoted(dataclasses.asdict(outcome))))

    def done(self) -> None:
        """Forget it: the next campaign begins anew."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        if self._path is not None:
            os.close(self._file)


@dataclass
class Campaign:
    """Sweeps on one subject."""

    #: What a process of this number is told.
    setting: Callable[[str], Setting]
    sweeps: Sequence[Sweep]
    seed: int
    ledger: Ledger
    folder: Path
    jobs: int = 2
    #: Which share of the points is tried, of how many: for several machines. A sample is small, and tried whole.
    shard: tuple[int, int] = (1, 1)
    #: Of each sweep, in one of its modes, only so many (None: all).
    sample: int | None = None
    say: Callable[[str], None] = lambda _: None
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    failures: list[Outcome] = field(default_factory=list)
    #: Whether the subject says what a user could get back: else samples that were stored cannot be compared.
    recovers: bool = True
    #: Points that an earlier run of this campaign tried.
    resumed: int = 0

    def __post_init__(self) -> None:
        if self.sample is not None:
            self.shard = (1, 1)
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._stopping = threading.Event()
        self._tasks: queue.SimpleQueue[Callable[[_Player], None] | None] = queue.SimpleQueue()
        self._done = threading.Semaphore(0)
        self._planned = self._tried = 0
        #: Points of this run, tried or being tried.
        self._taken = set[str]()
        self.passed_s = 0.0
        self._began_s = time.monotonic()
        for sweep in self.sweeps:
            for mode in MODES:
                self.tallies[sweep.name, mode] = Tally(sweep, mode)

    def run(self) -> None:
        """Try every point. Raises what a process that plays cannot even begin with."""
        began_s = time.monotonic()
        with self._players():
            self._do([self._counting(sweep) for sweep in self.sweeps])
            self._began_s = time.monotonic()
            chunks = self._chunks()
            self._planned = sum(map(len, chunks))
            self._do([self._trying(chunk) for chunk in chunks])
            if self.is_whole:
                self._do([self._beyond(tally) for tally in self.tallies.values() if tally.counted])
        self.passed_s = time.monotonic() - began_s

    def try_point(self, point: Point) -> Outcome:
        """Try one point, and look whether memory comes back when it is repeated."""
        found: list[Outcome] = []
        with self._players():
            self._do([lambda player: found.append(player.closely(point))])
        self._note(point, found[0])
        return found[0]

    @contextlib.contextmanager
    def _players(self) -> Iterator[None]:
        """Have those who play, each in a thread: their processes end with the thread that started them."""
        threads = [threading.Thread(target=self._play, args=(number,), daemon=True) for number in range(self.jobs)]
        for thread in threads:
            thread.start()
        try:
            yield
        except BaseException:
            self._stopping.set()
            raise
        finally:
            for _ in threads:
                self._tasks.put(None)
            for thread in threads:
                thread.join()
            self._stopping.clear()

    def _do(self, tasks: Sequence[Callable[[_Player], None]]) -> None:
        for task in tasks:
            self._tasks.put(task)
        for _ in tasks:
            done = False
            while not done:
                # With a limit: Ctrl-C is handled between two waits.
                done = self._done.acquire(timeout=0.5)
                self.say(self._progress())
                if self._errors:
                    raise self._errors[0]

    def _play(self, number: int) -> None:
        player = _Player(self, number)
        try:
            while (task := self._tasks.get()) is not None and not self._stopping.is_set():
                task(player)
                self._done.release()
        except CutShort:
            # The next run tries it again.
            pass
        except BaseException as error:
            self._errors.append(error)
            self._stopping.set()
        finally:
            player.close()

    @property
    def is_stopping(self) -> bool:
        """Whether it is to end: another failed, or the user asked."""
        return self._stopping.is_set()

    def _progress(self) -> str:
        with self._lock:
            tried, fired = self._tried, sum(tally.fired for tally in self.tallies.values())
        if not self._planned:
            return "counting the points"
        passed_s = time.monotonic() - self._began_s
        left_s = passed_s / max(1, tried - self.resumed) * (self._planned - tried)
        failed = f", {len(self.failures)} failed" if self.failures else ""
        of = max(tried, self._planned)
        return f"{tried} of {of} points, {fired} fired{failed}, about {max(0.0, left_s) / 60:.1f} min left"

    # Tasks.

    def _counting(self, sweep: Sweep) -> Callable[[_Player], None]:
        def count(player: _Player) -> None:
            for mode in MODES:
                # Twice only where the modes differ in what is a point.
                name = f"{sweep.name}/{mode if sweep.persistent_bytes else TRANSIENT}"
                if name not in self.ledger.counts:
                    try:
                        counts = player.count(sweep, mode)
                    except FailsUndisturbed as error:
                        self._note(Point(sweep, mode, 1), error.outcome)
                        return
                    with self._lock:
                        self.ledger.count(name, counts)
                self.tallies[sweep.name, mode].counted = self.ledger.counts[name]

        return count

    def _chunks(self) -> list[list[Point]]:
        """Cut the points into handfuls of the same sweep, and put these into the seed's order."""
        chunks = []
        for (name, mode), tally in self.tallies.items():
            counts = tally.counted
            if not counts:
                # It fails with no fault at all.
                continue
            # Of a sample each has to fire; of the whole it is counted what does.
            numbers = list(range(1, (max(counts) if self.sample is None else max(1, min(counts))) + 1))
            # An order of its own: what another machine counts elsewhere moves no point from one share to another.
            random.Random(f"{self.seed} {name} {mode}").shuffle(numbers)
            if self.sample is not None:
                # Of each sweep in one mode: of all of them a sample is quick.
                its_mode = random.Random(f"{self.seed} {name}").choice(MODES)
                numbers = numbers[: self.sample] if mode == its_mode else []
            share, of = self.shard
            numbers = numbers[share - 1 :: of]
            tally.planned = len(numbers)
            points = [Point(tally.sweep, mode, number) for number in numbers]
            chunks += [points[at : at + RECORDING_POINTS] for at in range(0, len(points), RECORDING_POINTS)]
        random.Random(self.seed).shuffle(chunks)
        # The last ones in pieces: no player is left with a handful of slow points when the others are done.
        last = chunks[-_LAST_FOR_EACH * self.jobs :]
        pieces = [chunk[at : at + _PIECE_POINTS] for chunk in last for at in range(0, len(chunk), _PIECE_POINTS)]
        return [*chunks[: -_LAST_FOR_EACH * self.jobs], *pieces]

    def _trying(self, points: Sequence[Point]) -> Callable[[_Player], None]:
        # Of a sample each has to fire, of a share one of a handful.
        groups = [points] if self.sample is None else [[point] for point in points]

        def attempt(player: _Player) -> None:
            player.begin_anew()
            for group in groups:
                enough = self.is_whole
                for point in group:
                    if self._stopping.is_set():
                        return
                    outcome = self._one(player, point)
                    enough |= bool(outcome.fired or outcome.problems)
                nth = min(point.nth for point in group)
                while nth > 1 and not enough and not self._stopping.is_set():
                    # There were fewer requests this time: one of the first is there each time.
                    nth //= 2
                    outcome = self._one(player, dataclasses.replace(group[0], nth=nth))
                    enough = bool(outcome.fired or outcome.problems)

        return attempt

    def _beyond(self, tally: Tally) -> Callable[[_Player], None]:
        """Go on behind the points that were counted, until one does not fire: then there are no more."""

        def go_on(player: _Player) -> None:
            player.begin_anew()
            first = max(tally.counted) + 1
            for number in range(first, first + _MOST_BEYOND):
                if self._stopping.is_set():
                    return
                outcome = self._one(player, Point(tally.sweep, tally.mode, number))
                if not outcome.fired:
                    tally.complete = not (outcome.problems or outcome.stopped)
                    return

        return go_on

    def _one(self, player: _Player, point: Point) -> Outcome:
        with self._lock:
            is_new = point.name not in self._taken
            self._taken.add(point.name)
            outcome = self.ledger.outcomes.get(point.name)
        if not is_new:
            # Of another handful of this run, and counted there.
            return outcome or Outcome(point.name, 0)
        if outcome is not None:
            self.resumed += 1
        else:
            began_s = time.monotonic()
            outcome = player.attempt(point)
            outcome = dataclasses.replace(outcome, took_s=round(time.monotonic() - began_s, 3))
            with self._lock:
                self.ledger.keep(outcome)
        self._note(point, outcome)
        return outcome

    def _note(self, point: Point, outcome: Outcome) -> None:
        with self._lock:
            self._tried += 1
            self.tallies.setdefault((point.sweep.name, point.mode), Tally(point.sweep, point.mode)).add(outcome)
            if outcome.problems:
                self.failures.append(outcome)

    # What came of it.

    def count(self, kind: str) -> int:
        """Count the points after which something of this kind was wrong."""
        return sum(any(each == kind for each, _ in outcome.problems) for outcome in self.failures)

    def record(self) -> FaultRecord:
        """Add up what became of the faults."""
        tallies = self.tallies.values()
        fired = sum(tally.fired for tally in tallies)
        died = sum(tally.runtime_died for tally in tallies)
        return FaultRecord(
            sum(tally.tried for tally in tallies),
            fired,
            sum(tally.absorbed for tally in tallies),
            Provenance.INTERPOSED if fired else None,
            f"runtime_died {died}",
        )

    def summary(self) -> str:
        """Say in a line what came of it."""
        tallies = self.tallies.values()
        fired, tried = sum(tally.fired for tally in tallies), sum(tally.tried for tally in tallies)
        died, absorbed = sum(tally.runtime_died for tally in tallies), sum(tally.absorbed for tally in tallies)
        parts = [f"{tried} points, {fired} fired, {absorbed} absorbed, {len(self.failures)} failed"]
        if fired:
            parts.append(f"runtime_died {died} ({died / fired:.1%})")
        parts.append(f"host stopped, and resumed, {sum(tally.host_stopped for tally in tallies)}")
        if self.resumed:
            parts.append(f"{self.resumed} tried by an earlier run")
        if self.passed_s:
            parts.append(f"{self.passed_s:.0f} s, {(tried - self.resumed) / self.passed_s:.1f} points/s")
        return ", ".join(parts)

    def unfired(self) -> list[str]:
        """Name the sweeps of which no point fired; a share may have no point of a small one."""
        fired = Counter[str]()
        for (name, _), tally in self.tallies.items():
            if tally.planned or tally.tried or self.shard == (1, 1):
                fired[name] += tally.fired
        return [name for name, count in fired.items() if not count]

    @property
    def is_whole(self) -> bool:
        """Whether every point is tried here, and so one that does not fire has to come."""
        return self.sample is None and self.shard == (1, 1)

    def incomplete(self) -> list[str]:
        """Name the sweeps, by mode, that were to come to a run without a fault, and did not."""
        if not self.is_whole:
            return []
        return [f"{name}/{mode}" for (name, mode), tally in self.tallies.items() if not tally.complete]


class _Player:
    """Has a process with a subject, and another when that is lost."""

    def __init__(self, campaign: Campaign, number: int) -> None:
        self._campaign, self._number = campaign, number
        self._driver: Driver | None = None
        self._anew = False
        #: What each process held when it was first seen.
        self._first: dict[str, dict[str, int]] = {}
        #: And the most of each that it has held since.
        self._most: dict[str, dict[str, int]] = {}

    def close(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    def _there(self) -> Driver:
        if self._driver is None:
            folder = self._campaign.folder / f"player-{self._number}"
            self._driver = Driver(self._campaign.setting(str(folder)), self._campaign.folder / "stderr.log")
            self._campaign.recovers = self._driver.recovers
            self._first.clear()
            self._most.clear()
        return self._driver

    def begin_anew(self) -> None:
        """Have the next point begin a recording of its own."""
        self._anew = True

    def count(self, sweep: Sweep, mode: str = TRANSIENT) -> list[int]:
        """Count the points of a sweep: once to warm up, and twice to see whether the count repeats; for a sample once.

        Raises FailsUndisturbed.
        """
        point, counts = Point(sweep, mode, 1), []
        for _ in range(3 if self._campaign.sample is None else 1):
            answer, outcome = self._ask(point, fires=False)
            if outcome.problems:
                problems = tuple((kind, f"with no fault at all: {text}") for kind, text in outcome.problems)
                raise FailsUndisturbed(dataclasses.replace(outcome, problems=problems))
            counts.append(int(answer["seen"]))
        return counts[1:] or counts

    def attempt(self, point: Point) -> Outcome:
        """Try a point; whatever is suspected to leak is looked at closely."""
        anew, self._anew = self._anew, False
        answer, outcome = self._ask(point, anew=anew)
        if answer and not outcome.problems and (suspected := self._suspected(answer)):
            if problems := self._leaks(point):
                return dataclasses.replace(
                    outcome, problems=tuple((kind, f"{text} (seen first: {suspected})") for kind, text in problems)
                )
            self._first.clear()
        return outcome

    def closely(self, point: Point) -> Outcome:
        """Try a point, and then see whether it leaks."""
        try:
            self.count(point.sweep, point.mode)
        except FailsUndisturbed as error:
            return error.outcome
        _, outcome = self._ask(point)
        if not outcome.problems and (problems := self._leaks(point)):
            return dataclasses.replace(outcome, problems=problems)
        return outcome

    def _ask(
        self, point: Point, *, fires: bool = True, anew: bool = False, closely: bool = False
    ) -> tuple[dict[str, Any], Outcome]:
        driver = self._there()
        try:
            answer = driver.ask(point=point.name, fires=fires, anew=anew, closely=closely)
        except DriverLost as error:
            return {}, self._lost(driver, point, error)
        problems = tuple((kind, text) for kind, text in answer["problems"])
        if problems:
            # What comes next must not suffer from it.
            self.close()
        return answer, Outcome(
            point.name,
            answer["fired"],
            bool(answer["absorbed"]),
            bool(answer["died"]),
            bool(answer["stopped"]),
            problems=problems,
            detail=answer["detail"] if answer["fired"] else "",
            call_site=tuple(answer["call_site"]) if problems else (),
        )

    def _lost(self, driver: Driver, point: Point, error: DriverLost) -> Outcome:
        """Judge the end of the host: a hang is none that is allowed, and what was acknowledged has to be there."""
        record, site = driver.control.record(), tuple(driver.control.call_site())
        acknowledged, in_flight = driver.board.read()
        folder = driver.board.folder()
        problems: list[tuple[str, str]] = []
        if error.hung:
            problems.append(("hangs", str(error)))
        elif not (point.persistent and point.sweep.target == HOST and driver.board.was_armed() and record.faults_fired):
            # The host has to live. Only while it is refused everything may it end.
            problems.append(("hosts_lost", str(error)))
        self.close()
        if folder:
            try:
                request = {"folder": folder, "acknowledged": acknowledged, "in_flight": in_flight}
                problems += [(kind, text) for kind, text in self._there().ask(recover=request)["problems"]]
            except DriverLost as again:
                problems.append(("hosts_lost", f"no process goes on with the recording: {again}"))
                self.close()
        return Outcome(
            point.name,
            record.faults_fired,
            stopped=not problems,
            problems=tuple(problems),
            detail=record.detail,
            call_site=site,
        )

    def _suspected(self, answer: Mapping[str, Any]) -> str:
        """Say what is held beyond what was held at first, or ever, if it is more than may come and go."""
        suspected = ""
        for process, now in answer["held"].items():
            host = process == answer["host"]
            first, most = self._first.setdefault(process, now), self._most.setdefault(process, dict(now))
            for what, amount in now.items():
                heap = host and what == "heap_bytes"
                in_all = _SUSPECT_OF_HOST_BYTES if heap else _SUSPECT[what]
                at_once = _SUSPECT_OF_HOST_AT_ONCE_BYTES if heap else _SUSPECT_AT_ONCE[what]
                since, beyond = amount - first.get(what, amount), amount - most.get(what, amount)
                if not suspected and (since > in_all or beyond > at_once):
                    suspected = f"process {process} holds {max(since, beyond)} more {what}"
                most[what] = max(amount, most.get(what, amount))
        return suspected

    def _leaks(self, point: Point) -> tuple[tuple[str, str], ...]:
        """Look closely, and at what seems to leak once more: a leak is there each time."""
        first = self._looked(point) or ()
        if not any(kind == "memory_kept" for kind, _ in first):
            return first
        second = self._looked(point)
        return first if second is None else second

    def _looked(self, point: Point) -> tuple[tuple[str, str], ...] | None:
        """Repeat a point with its fault and without, each on a recording of its own; say what grows with it alone.

        Whatever else is wrong then is said too. A host that may end, and ends, holds nothing. None: the fault does not
        fire often enough to say. Raises CutShort.
        """
        try:
            with_fault, without = [self._series(point, fires, anew=False) for fires in (True, False)]
            if len(with_fault[1] | without[1]) == 1:
                return _kept(with_fault[0], without[0])
            # A recording that goes on grows, and it is the host's. Where some steps went on with theirs and some did
            # not, the host is compared with a new one at each step; other processes would be new then too.
            if problems := _kept(with_fault[0], without[0], ("runtime", "of all")):
                return problems
            with_fault, without = [self._series(point, fires, anew=True) for fires in (True, False)]
            return _kept(with_fault[0], without[0], ("host",))
        except _NotRepeated as error:
            return error.problems

    def _series(self, point: Point, fires: bool, anew: bool) -> tuple[list[Counter[str]], set[bool]]:
        """Repeat a point; give what grows each time, and whether it went on with the same recording then.

        Raises _NotRepeated, CutShort.
        """
        steps, went_on = list[Counter[str]](), set[bool]()
        before: Mapping[str, Any] | None = None
        for number in range(_MOST_IN_SERIES):
            answer, outcome = self._ask(point, fires=fires, anew=anew or number == 0, closely=True)
            if outcome.problems or not answer:
                raise _NotRepeated(outcome.problems)
            if self._campaign.is_stopping:
                raise CutShort(point.name)
            if before is not None and (outcome.fired or not fires):
                steps.append(_growth(before, answer))
                went_on.add(before["recording"] == answer["recording"])
            # The first brings about what comes once.
            before = answer if number else None
            if len(steps) == _STEPS:
                return steps, went_on
        raise _NotRepeated(None)


def _kept(
    with_fault: Sequence[Counter[str]], without: Sequence[Counter[str]], whose: tuple[str, ...] = ("",)
) -> tuple[tuple[str, str], ...]:
    """Say what grows with the fault alone, step by step, among what belongs to these."""
    for what in sorted(each for each in set().union(*with_fault) if each.startswith(whose)):
        least = _LEAK[what.split()[-1]]
        with_it = [step[what] for step in with_fault]
        more = sum(with_it) - sum(step[what] for step in without)
        if more >= least * _STEPS and sum(step >= least for step in with_it) >= _STEPS - 1:
            text = f"{more} more {what} are held after {_STEPS} repetitions than without the fault"
            return (("memory_kept", text),)
    return ()


def _growth(before: Mapping[str, Any], after: Mapping[str, Any]) -> Counter[str]:
    """Give what processes that were there before hold more than before, the host apart. One that is new is counted."""
    grown = Counter[str]()
    for process, held in after["held"].items():
        whose = "of all" if process == "all" else "host" if process == after["host"] else "runtime"
        for what, amount in held.items():
            grown[f"{whose} {what}"] += amount - before["held"].get(process, held).get(what, amount)
    return grown
