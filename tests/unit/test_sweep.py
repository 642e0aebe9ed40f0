"""The sweep tries what it says, judges what it sees, and goes on where it was cut off; each oracle finds its defect."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from backends.contract import Provenance, Site
from backends.faults import interposer
from backends.faults.interposer import Control
from qualification.run import DEFAULT_AUDIO, SWEEP_MODEL
from qualification.sweep import campaign as campaigns
from qualification.sweep.campaign import Campaign, Driver, DriverLost, Ledger, Outcome
from qualification.sweep.points import (
    DEVICE_SWEEPS,
    HOST,
    MODES,
    PERSISTENT,
    RUNTIME,
    SWEEPS,
    TRANSIENT,
    Point,
    PointError,
    Sweep,
    parse,
)
from qualification.sweep.scenarios import SCENARIOS
from qualification.sweep.stage import MOST_ATTEMPTS, MOST_EVENTS, Board, Setting

pytestmark = pytest.mark.timeout(600)
BLOCK = 1600
FEED = parse("feed/host/transient/1").sweep
Samples = npt.NDArray[np.float32]


# A subject that is small: it starts at once, and a process with it is a process with a subject.


@dataclass(frozen=True)
class Answer:
    start: int
    stop: int
    output: Any
    device: str = "small"
    degraded: bool = False


@dataclass(frozen=True)
class Told:
    kind: str
    time_s: float = 0.0
    message: str = "something happened"
    action: str = "something was done"
    meaning: str = "nothing is lost"


class Small:
    """Keeps what it is fed in a file, and answers each block by four sums."""

    def __init__(self, context: Any) -> None:
        context.workdir.mkdir(parents=True, exist_ok=True)
        self.path = context.workdir / "samples"
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.told: list[Told] = []
        self.answers: list[Answer] = []
        self.attempts = 0.0
        self.answer()

    def feed(self, start: int, block: Samples) -> int:
        self.store(block[len(self.recovered()) - start :])
        self.answer()
        return start + len(block)

    def store(self, samples: Samples) -> None:
        os.write(self.file, samples.tobytes())
        os.fsync(self.file)

    def answer(self) -> None:
        samples = self.recovered()
        for start in range(len(self.answers) * BLOCK, len(samples) - BLOCK + 1, BLOCK):
            self.answers.append(Answer(start, start + BLOCK, samples[start : start + BLOCK].reshape(4, -1).sum(1)))

    def recovered(self) -> Samples:
        return np.fromfile(self.path, np.float32)

    def results(self) -> list[Answer]:
        return self.answers

    def equivalent(self, a: Any, b: Any) -> bool:
        return a is not None and bool(np.allclose(a, b, atol=1e-3))

    def drain(self, timeout_s: float) -> None: ...

    def toggle(self) -> bool:
        return True

    def device(self) -> str:
        return "small"

    def process_ids(self) -> list[int]:
        return [os.getpid()]

    def events(self) -> list[Told]:
        return self.told

    def metrics(self) -> dict[str, float]:
        return {"cache_clear_attempts": self.attempts}

    def shutdown(self, reason: str) -> None: ...

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


# The same, broken one way each.


class Loses(Small):
    def recovered(self) -> Samples:
        return super().recovered()[: BLOCK - 3]

    def answer(self) -> None:
        samples = super().recovered()
        self.answers = [Answer(at, at + BLOCK, s.reshape(4, -1).sum(1)) for at, s in _blocks(samples)]


class Alters(Small):
    def store(self, samples: Samples) -> None:
        if len(samples):
            samples[7] = np.nextafter(samples[7], np.float32(1))
        super().store(samples)


class Skips(Small):
    def results(self) -> list[Answer]:
        return self.answers[1:]


class Repeats(Small):
    def results(self) -> list[Answer]:
        return [*self.answers, *self.answers[-1:]]


class Guesses(Small):
    def results(self) -> list[Answer]:
        return [dataclasses.replace(each, output=each.output + 1) for each in self.answers]


class ChangesABit(Small):
    def results(self) -> list[Answer]:
        return [dataclasses.replace(each, output=np.nextafter(each.output, np.float32(9))) for each in self.answers]


class SaysNothing(Small):
    def results(self) -> list[Answer]:
        return [dataclasses.replace(each, output=None) for each in self.answers]


class CutsElsewhere(Small):
    def results(self) -> list[Answer]:
        half = BLOCK // 2
        halves = ((each.start, each.start + half, each.output) for each in self.answers)
        return [each for a, b, output in halves for each in (Answer(a, b, output), Answer(b, b + half, output))]


class Tells(Small):
    """Tells of the same each time that it is fed."""

    kinds: tuple[str, ...] = ()

    def feed(self, start: int, block: Samples) -> int:
        accepted = super().feed(start, block)
        self.told += [Told(kind) for kind in self.kinds]
        return accepted


class FallsBack(Tells):
    def results(self) -> list[Answer]:
        return [dataclasses.replace(each, device="elsewhere", degraded=True) for each in self.answers]


class FallsBackAndTells(FallsBack):
    kinds: tuple[str, ...] = ("cpu_fallback",)


class FallsBackAndTellsOfSomethingElse(FallsBack):
    kinds = ("pressure_normal", "recovered")


class TellsWithoutEnd(FallsBackAndTells):
    kinds = ("cpu_fallback", *("cache_clear",) * MOST_EVENTS)


class TriesWithoutEnd(Small):
    def feed(self, start: int, block: Samples) -> int:
        self.attempts += MOST_ATTEMPTS + 1
        return super().feed(start, block)


class DoesNotSync(Small):
    def store(self, samples: Samples) -> None:
        os.write(self.file, samples.tobytes())


class SyncsTooSoon(Small):
    def store(self, samples: Samples) -> None:
        os.fsync(self.file)
        os.write(self.file, samples.tobytes())


class IsNeverDone(Small):
    def drain(self, timeout_s: float) -> None:
        raise TimeoutError("still at it")


class StopsSilently(Small):
    """Goes on when it is opened again."""

    kinds: tuple[str, ...] = ()

    def __init__(self, context: Any) -> None:
        self.is_new = not context.workdir.exists()
        super().__init__(context)

    def feed(self, start: int, block: Samples) -> int:
        if self.is_new:
            self.told = [Told(kind) for kind in self.kinds]
            raise RuntimeError("it is closed")
        return super().feed(start, block)


class StopsAndTells(StopsSilently):
    kinds = ("emergency_shutdown",)


class StopsForEver(StopsAndTells):
    def feed(self, start: int, block: Samples) -> int:
        self.told = [Told("emergency_shutdown")]
        raise RuntimeError("it is closed")


class Tires(Small):
    def results(self) -> list[Answer]:
        return [*self.answers[:2], *(dataclasses.replace(each, output=None) for each in self.answers[2:])]


class Dies(Small):
    """Ends its process where it has no memory to store."""

    def store(self, samples: Samples) -> None:
        try:
            super().store(samples)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)


class DiesAndForgets(Dies):
    """Stores what it acknowledged only when the next comes."""

    late = np.zeros(0, np.float32)

    def store(self, samples: Samples) -> None:
        super().store(self.late)
        self.late = samples

    def recovered(self) -> Samples:
        return np.concatenate([super().recovered(), self.late])


class Hangs(Small):
    """Waits for memory, and does not look."""

    def feed(self, start: int, block: Samples) -> int:
        try:
            return super().feed(start, block)
        except MemoryError:
            time.sleep(1000)
            raise


class Slow(Small):
    def store(self, samples: Samples) -> None:
        super().store(samples)
        time.sleep(0.05)


class Keeps(Small):
    """Has more with each block, as a recording does, and leaves its device where ``leaves`` says."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.kept: list[bytes] = []
        self.failed = False

    def feed(self, start: int, block: Samples) -> int:
        try:
            accepted = super().feed(start, block)
        except MemoryError:
            self.failed = True
            self.without_memory()
            raise
        self.kept.append(bytes(64 << 10))
        return accepted

    def without_memory(self) -> None: ...

    def leaves(self) -> bool:
        return False

    def device(self) -> str:
        return "elsewhere" if self.kept and self.leaves() else super().device()


class LeavesUndisturbed(Keeps):
    def leaves(self) -> bool:
        return not self.failed


class LeavesAndForgets(Keeps):
    """Without memory it leaves what it took in the process: less than its recording takes."""

    forgotten: ClassVar[list[bytes]] = []

    def leaves(self) -> bool:
        return self.failed

    def without_memory(self) -> None:
        with interposer.uncounted():
            self.forgotten.append(bytes(48 << 10))


class Reduces(Tells):
    """Recovers by its third rung, and goes to the processor before it comes to an error."""

    kinds: tuple[str, ...] = ("oom_detected", "cache_clear", "reduce_buffer", "recovered", "cpu_fallback")


class ReducesAndFallsBack(Reduces):
    kinds = ("oom_detected", "cache_clear", "reduce_buffer", "cpu_fallback", "recovered")


class CannotBegin(Small):
    def __init__(self, context: Any) -> None:
        raise RuntimeError("this one cannot be made")


def _blocks(samples: Samples) -> Iterator[tuple[int, Samples]]:
    return ((at, samples[at : at + BLOCK]) for at in range(0, len(samples) - BLOCK + 1, BLOCK))


def broken(context: Any) -> Small:
    """Make the one that the policy asks for."""
    made: Small = globals()[context.policy.get("defect", "Small")](context)
    return made


def _setting(folder: str, subject: str = "Small") -> Setting:
    return Setting(
        subject=f"{Path(__file__).resolve()}:{subject}",
        backend="cpu",
        device=None,
        model=str(SWEEP_MODEL),
        audio=str(DEFAULT_AUDIO),
        device_limit_bytes=24_000_000,
        block_samples=BLOCK,
        folder=folder,
    )


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="module")
def _interposed() -> None:
    if (refused := interposer.refusal()) is not None:
        pytest.skip(f"not run: {refused}")


# Points.


def test_every_point_is_found_by_its_name() -> None:
    for sweep in (*SWEEPS, *DEVICE_SWEEPS):
        for mode in MODES:
            point = Point(sweep, mode, 117)
            assert parse(point.name) == point, f"{point.name} names {parse(point.name)}"


def test_no_two_sweeps_have_the_same_name() -> None:
    names = [sweep.name for sweep in (*SWEEPS, *DEVICE_SWEEPS)]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"named twice: {twice}"


def test_every_scenario_is_swept_and_every_sweep_has_a_scenario() -> None:
    swept = {sweep.scenario for sweep in (*SWEEPS, *DEVICE_SWEEPS)}
    assert swept == set(SCENARIOS), f"one without the other: {sorted(swept ^ set(SCENARIOS))}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected SCENARIO/TARGET/MODE/NUMBER, begun by one of start/host, "),
        ("coffee/host/transient/1", "expected SCENARIO/TARGET/MODE/NUMBER, begun by one of start/host, "),
        ("feed/runtime/transient/1", "expected SCENARIO/TARGET/MODE/NUMBER, begun by one of start/host, "),
        ("feed/host", "after feed/host expected /transient or /persistent, and / with a number from 1"),
        ("feed/host/sometimes/1", "after feed/host expected /transient or /persistent"),
        ("feed/host/transient/0", "a number from 1"),
        ("feed/host/transient/-1", "a number from 1"),
        ("feed/host/transient/x", "a number from 1"),
        ("feed/host/transient/1/2", "a number from 1"),
    ],
)
def test_what_names_no_point_is_refused_with_what_was_expected(name: str, message: str) -> None:
    with pytest.raises(PointError) as caught:
        parse(name)
    assert message in str(caught.value), f"the message is: {caught.value}"
    assert f"--point {name}" in str(caught.value), f"the message does not repeat {name!r}: {caught.value}"


def test_a_point_is_a_plan_for_the_interposer() -> None:
    alone, on = parse("feed/host/transient/3").plan(), parse("inference/runtime/persistent/4").plan()
    expected = {"site": Site.HOST_ALLOCATION, "nth": 3, "times": 1, "min_bytes": 16, "process": HOST, "thread": "main"}
    found = {name: getattr(alone, name) for name in expected}
    assert found == expected, f"the plan is {found}"
    expected = {"nth": 4, "times": None, "min_bytes": 64, "process": RUNTIME, "thread": "!plimsoll-side"}
    found = {name: getattr(on, name) for name in expected}
    assert found == expected, f"the plan is {found}"
    launch = parse("inference/runtime.device_launch/transient/1").plan()
    assert launch.site is Site.DEVICE_LAUNCH, f"the site is {launch.site}"


# What was tried is kept.

KEY = {"git": "abc", "seed": 5}
DONE = Outcome(
    "feed/host/transient/3",
    *(1, False, True),
    problems=(("untold", "nobody was told"),),
    detail="64 bytes",
    call_site=("libc+0x1 malloc", "python+0x2"),
    took_s=0.5,
)


def _ledger(path: Path, key: dict[str, Any] = KEY) -> tuple[dict[str, list[int]], dict[str, Outcome]]:
    ledger = Ledger(path, key)
    ledger.close()
    return ledger.counts, ledger.outcomes


def _written(path: Path) -> None:
    ledger = Ledger(path, KEY)
    ledger.count("feed/host", [9, 8])
    ledger.keep(DONE)
    ledger.close()


def test_what_was_tried_is_known_to_the_next_run_of_the_same_campaign(tmp_path: Path) -> None:
    _written(tmp_path / "l")
    for run in (2, 3):
        counts, outcomes = _ledger(tmp_path / "l", dict(reversed(KEY.items())))
        assert counts == {"feed/host": [9, 8]}, f"run {run} knows the counts {counts}"
        assert outcomes == {DONE.point: DONE}, f"run {run} knows {outcomes}"


def test_what_another_campaign_tried_is_forgotten(tmp_path: Path) -> None:
    _written(tmp_path / "l")
    assert _ledger(tmp_path / "l", {**KEY, "seed": 6}) == ({}, {}), "another seed goes on with what it did not try"
    assert _ledger(tmp_path / "l") == ({}, {}), "what another campaign began anew is there again"


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_was_not_finished_is_tried_again_and_all_before_it_is_known(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "l"
    _written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    counts, outcomes = _ledger(path)
    assert counts == {"feed/host": [9, 8]}, f"with {cut} bytes missing the counts are {counts}"
    # Of a line without its end only the newline is missing: it says everything.
    assert set(outcomes) == ({DONE.point} if cut == 1 else set()), f"with {cut} bytes missing: {outcomes}"
    ledger = Ledger(path, KEY)
    ledger.keep(DONE)
    ledger.close()
    assert _ledger(path)[1] == {DONE.point: DONE}, "what came after a torn line is not known"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"[]\n", b'{"key": 1}\nnull\n'])
def test_what_is_no_ledger_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l").write_bytes(content)
    assert _ledger(tmp_path / "l") == ({}, {}), f"{content!r} said something"


def test_the_ledger_is_for_the_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        _written(tmp_path / "l")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "l").stat().st_mode)
    assert mode == 0o600, f"the mode is {mode:o}"


def test_two_campaigns_have_ledgers_of_their_own_and_one_that_is_done_has_none(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "a", KEY), Ledger(tmp_path / "b", KEY)
    first.keep(DONE)
    second.done()
    for ledger in (first, second):
        ledger.close()
    assert set(_ledger(tmp_path / "a")[1]) == {DONE.point}, "what the first tried is gone"
    assert not (tmp_path / "b").exists(), "what is done is kept"


def test_without_a_file_nothing_is_kept() -> None:
    ledger = Ledger(None, KEY)
    ledger.keep(DONE)
    ledger.done()
    ledger.close()
    assert set(ledger.outcomes) == {DONE.point}


# The board.


def test_the_board_tells_another_process_where_it_was(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    board.begin(tmp_path / "recording", 3200)
    board.write(3200, 4800)
    board.arm(1)
    seen = Board(tmp_path / "board")
    assert seen.read() == (3200, 4800) and seen.was_armed(), f"{seen.read()}, armed {seen.was_armed()}"
    assert seen.folder() == str(tmp_path / "recording"), f"the folder is {seen.folder()!r}"
    board.arm(0)
    assert not seen.was_armed(), "it is armed after it was disarmed"
    mode = stat.S_IMODE((tmp_path / "board").stat().st_mode)
    assert mode == 0o600, f"the mode is {mode:o}"


# The order, the shares.


def _planned(seed: int = 5, shard: tuple[int, int] = (1, 1), sample: int | None = None) -> list[list[str]]:
    sweeps = SWEEPS[:4]
    made = Campaign(_setting, sweeps, seed, Ledger(None, {}), Path(), shard=shard, sample=sample)
    for number, sweep in enumerate(sweeps):
        for mode in MODES:
            made.tallies[sweep.name, mode].counted = [40 * number + 3, 40 * number + 2]
    return [[point.name for point in chunk] for chunk in made._chunks()]


def _flat(chunks: list[list[str]]) -> list[str]:
    return [name for chunk in chunks for name in chunk]


def test_the_order_is_the_seeds() -> None:
    assert _planned(5) == _planned(5), "the same seed has another order"
    assert _planned(5) != _planned(6), "another seed has the same order"
    assert sorted(_flat(_planned(5))) == sorted(_flat(_planned(6))), "another seed has other points"


def test_every_point_is_planned_once() -> None:
    names = _flat(_planned())
    expected = 2 * (3 + 43 + 83 + 123)
    assert len(names) == len(set(names)) == expected, f"{len(names)} points, {len(set(names))} of them different"


@pytest.mark.parametrize("of", [2, 3])
def test_all_shares_together_are_the_whole_and_none_has_what_another_has(of: int) -> None:
    shares = [_flat(_planned(shard=(number, of))) for number in range(1, of + 1)]
    whole = _flat(_planned())
    assert sorted(name for share in shares for name in share) == sorted(whole), "the shares are not the whole"
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= len(SWEEPS[:4]) * 2, f"{of} shares have {sizes} points"


def test_a_sample_is_so_many_of_each_sweep_in_one_mode() -> None:
    names = _flat(_planned(sample=2))
    of_each = {name.rpartition("/")[0]: 0 for name in names}
    for name in names:
        of_each[name.rpartition("/")[0]] += 1
    assert set(of_each.values()) == {2} and len(of_each) == 4, f"of each: {of_each}"


@pytest.mark.parametrize("number", [1, 2])
def test_a_sample_is_tried_whole_whatever_the_share(number: int) -> None:
    """It is quick; half of it would leave sweeps out of which no fault fires."""
    assert _planned(shard=(number, 2), sample=1) == _planned(sample=1)


# What came of it.


def _told_of(*outcomes: Outcome, sweeps: tuple[Sweep, ...] = SWEEPS[:3]) -> Campaign:
    made = Campaign(_setting, sweeps, 5, Ledger(None, {}), Path())
    for outcome in outcomes:
        made._note(parse(outcome.point), outcome)
    return made


def test_a_sweep_of_which_nothing_fired_is_named() -> None:
    made = _told_of(Outcome("start/host/transient/1", 1), Outcome("feed/host/transient/1", 0))
    assert made.unfired() == ["start/runtime", "feed/host"], f"nothing fired in {made.unfired()}"


def test_a_sweep_that_did_not_come_to_its_end_is_named_by_mode() -> None:
    made = _told_of()
    made.tallies["start/host", TRANSIENT].complete = True
    found = made.incomplete()
    assert "start/host/transient" not in found and len(found) == 5, f"incomplete: {found}"


def test_what_came_of_the_points_is_added_up() -> None:
    made = _told_of(
        Outcome("start/host/transient/1", 1, absorbed=True),
        Outcome("start/host/transient/2", 7, died=True, problems=(("untold", "a"), ("untold", "b"), ("hangs", "c"))),
        Outcome("start/host/persistent/1", 9, stopped=True),
        Outcome("start/host/persistent/2", 0),
    )
    record = made.record()
    found = (record.points_seen, record.faults_fired, record.absorbed, record.provenance, record.detail)
    assert found == (4, 3, 1, Provenance.INTERPOSED, "runtime_died 1"), f"{record}"
    assert [made.count(kind) for kind in ("untold", "hangs", "hosts_lost")] == [1, 1, 0], "points were counted twice"
    plain = made.tallies["start/host", PERSISTENT].plain()
    assert (plain["points_tried"], plain["faults_fired"], plain["host_stopped"]) == (2, 1, 1), f"{plain}"


# The oracles, each by a subject that does what it looks for.

LOOK = """
import json
from qualification.sweep.stage import Setting, Stage
stage = Stage(Setting(**{setting!r}))
stage.fresh({{}})
found = {{}}
for name in {defects!r} + ["StopsAndTells where it may not"]:
    defect = name.split()[0]
    stage.may_stop = "stopped" if name == defect else ""
    stage.begin({{"defect": defect}}, stage.new_folder())
    stage.open()
    before = stage.before()
    stage.wants(2 * stage.block_samples)
    found[name] = stage.finish() or stage.look(before, single=True) or stage.clean_run()
    if defect == "ChangesABit":
        found["ChangesABit in a batch"] = stage.look(before, single=False)
    stage.close()
print(json.dumps(found))
"""

#: What is found, and what the text says.
DEFECTS: dict[str, dict[str, str]] = {
    "Small": {},
    "Loses": {"samples_lost": f"{BLOCK + 3} of {2 * BLOCK} samples are gone"},
    "Alters": {"samples_different": f"1 of {2 * BLOCK} samples are not what was fed"},
    "Skips": {"gaps_and_overlaps": f"1 gaps and 0 overlaps in [0, {2 * BLOCK})"},
    "Repeats": {"gaps_and_overlaps": f"0 gaps and 1 overlaps in [0, {2 * BLOCK})"},
    "Guesses": {"answers_wrong": "2 answers: [0, 1600) is answered otherwise than in the undisturbed run"},
    "ChangesABit": {"answers_wrong": "differs in some bit from the undisturbed run's answer"},
    "ChangesABit in a batch": {},
    "SaysNothing": {"answers_wrong": "has no answer", "untold": "nobody was told"},
    "CutsElsewhere": {"answers_wrong": "4 answers: [0, 800) is cut elsewhere than in the undisturbed run"},
    "FallsBack": {"untold": "[0, 1600) was answered on «elsewhere»: nobody was told"},
    "FallsBackAndTells": {},
    "FallsBackAndTellsOfSomethingElse": {"untold": "[0, 1600) was answered on «elsewhere»: nobody was told"},
    "TellsWithoutEnd": {"livelocks": f"{MOST_EVENTS + 1} events and 0 attempts for one fault"},
    "TriesWithoutEnd": {"livelocks": f"0 events and {MOST_ATTEMPTS + 1} attempts for one fault"},
    "DoesNotSync": {
        "feeds_not_durable": f"samples [0, {2 * BLOCK}) were acknowledged without a sync since their write"
    },
    "SyncsTooSoon": {"feeds_not_durable": "without a sync since their write"},
    "IsNeverDone": {"livelocks": "still at work 20 s after the fault was over: TimeoutError: «still at it»"},
    "StopsSilently": {
        "untold": "the subject refuses (RuntimeError: «it is closed»), and told of no emergency shutdown"
    },
    "StopsAndTells": {},
    "StopsAndTells where it may not": {"hosts_lost": "stopped it: RuntimeError: «it is closed»"},
    "StopsForEver": {"hosts_lost": "no subject goes on with the recording: RuntimeError: «it is closed»"},
    "Tires": {"clean_runs_wrong": "the next run: 1 answers: [3200, 4800) has no answer"},
}


@pytest.fixture(scope="module")
def looked(_interposed: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """Give what the oracles say of each subject."""
    folder = tmp_path_factory.mktemp("stage")
    control = Control.create(folder / "control")
    program = LOOK.format(
        setting=dataclasses.asdict(_setting(str(folder), "broken")),
        defects=[each for each in DEFECTS if " " not in each],
    )
    with pytest.MonkeyPatch.context() as patched:
        for name, value in control.environment(os.environ).items():
            patched.setenv(name, value)
        return dict(_run(program))


def _run(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"the child ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_oracle_finds_its_defect_and_nothing_else(looked: dict[str, list[list[str]]], defect: str) -> None:
    problems, expected = looked[defect], DEFECTS[defect]
    assert {kind for kind, _ in problems} == set(expected), f"{defect}: {problems}"
    for kind, text in expected.items():
        assert any(text in said for each, said in problems if each == kind), f"{defect}: {problems}"


# Campaigns, with processes that are tried.

NewCampaign = Callable[..., Campaign]


@pytest.fixture
def new_campaign(_interposed: None, tmp_path: Path) -> Iterator[NewCampaign]:
    made: list[Campaign] = []

    def make(subject: str = "Small", sweeps: tuple[Sweep, ...] = (FEED,), ledger: str = "l", **others: Any) -> Campaign:
        found = Campaign(
            lambda folder: _setting(folder, subject),
            *(sweeps, 5, Ledger(tmp_path / ledger, KEY), tmp_path / f"campaign-{len(made)}"),
            **{"jobs": 1, **others},
        )
        made.append(found)
        return found

    yield make
    for each in made:
        each.ledger.close()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the names of the points that were really tried, as they are."""
    names: list[str] = []
    attempt = campaigns._Player.attempt

    def noted(self: campaigns._Player, point: Point) -> Outcome:
        names.append(point.name)
        return attempt(self, point)

    monkeypatch.setattr(campaigns._Player, "attempt", noted)
    return names


def _complete(made: Campaign) -> None:
    """Assert that every point was tried, up to a run in which nothing fired."""
    assert not made.failures, f"failed: {made.failures}"
    assert not made.unfired() and not made.incomplete(), f"unfired {made.unfired()}, incomplete {made.incomplete()}"
    for tally in made.tallies.values():
        numbers = sorted(int(name.rpartition("/")[2]) for name in made.ledger.outcomes if f"/{tally.mode}/" in name)
        assert numbers == list(range(1, len(numbers) + 1)), f"{tally.mode}: these were tried: {numbers}"
        last = made.ledger.outcomes[f"feed/host/{tally.mode}/{numbers[-1]}"]
        assert last.fired == 0, f"{tally.mode}: with the last point {last.fired} faults fired"
        assert tally.fired >= 2, f"{tally.mode}: {tally.fired} faults fired: nothing is shown"


def test_a_campaign_goes_on_until_nothing_fires(new_campaign: NewCampaign, tried: list[str]) -> None:
    said: list[str] = []
    made = new_campaign(jobs=2, say=said.append)
    made.run()
    _complete(made)
    counted = made.tallies["feed/host", TRANSIENT].counted
    assert len(counted) == 2 and min(counted) >= 2, f"the points were counted twice: {counted}"
    assert len(tried) == len(set(tried)) == len(made.ledger.outcomes), f"tried: {sorted(tried)}"
    assert said, "nothing was said meanwhile"


def test_an_interrupted_campaign_ends_its_processes_and_goes_on_where_it_was(
    new_campaign: NewCampaign, tried: list[str], tmp_path: Path
) -> None:
    def interrupt(_: str) -> None:
        if len(cut.ledger.outcomes) >= 2:
            raise KeyboardInterrupt

    cut = new_campaign("Slow", say=interrupt)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    left = psutil.Process().children(recursive=True)
    assert not left, f"processes that are left: {left}"
    threads = [each.name for each in threading.enumerate() if "_play" in each.name]
    assert not threads, f"threads that are left: {threads}"
    first = set(tried)
    tried.clear()
    resumed = new_campaign()
    known = set(resumed.ledger.outcomes)
    assert known == first and known, f"{len(first)} points were tried, {len(known)} are known"
    resumed.run()
    again = known & set(tried)
    assert not again, f"tried again: {sorted(again)}"
    _complete(resumed)
    assert resumed.record().points_seen == len(resumed.ledger.outcomes), "what was known is not counted"


def test_two_shares_are_tried_apart_and_are_the_points_that_were_counted(
    new_campaign: NewCampaign, tried: list[str]
) -> None:
    shares = []
    for number in (1, 2):
        made = new_campaign(ledger=f"ledger-{number}", shard=(number, 2))
        # As many in both, whatever the counts vary by.
        made.ledger.count(f"{FEED.name}/{TRANSIENT}", [6, 5])
        made.run()
        shares.append(set(tried))
        tried.clear()
    whole = {Point(FEED, mode, number).name for mode in MODES for number in range(1, 7)}
    assert not shares[0] & shares[1], f"in both: {shares[0] & shares[1]}"
    assert shares[0] | shares[1] == whole, f"not tried: {sorted(whole - shares[0] - shares[1])}"


def test_a_host_that_dies_is_judged_and_another_takes_its_place(new_campaign: NewCampaign) -> None:
    made = new_campaign("Dies")
    made.run()
    tallies = [made.tallies["feed/host", mode] for mode in MODES]
    assert [tally.complete for tally in tallies] == [True, True], "the campaign did not go on to its end"
    # Refused one request it has to live; refused everything it may end, with all that it acknowledged.
    found = [(tally.failed, tally.host_stopped) for tally in tallies]
    assert found == [(1, 0), (0, 1)], f"(failed, stopped) alone and with all that follow: {found}: {made.failures}"
    (failure,) = made.failures
    assert failure.problems[0][0] == "hosts_lost" and "status -9" in failure.problems[0][1], f"{failure}"
    assert len(failure.problems) == 1, f"nothing else was wrong: {failure.problems}"
    assert failure.fired == 1 and failure.detail and failure.call_site, f"where it struck is not told: {failure}"
    assert made.count("hosts_lost") == 1


def test_what_a_host_that_died_had_acknowledged_is_looked_for(new_campaign: NewCampaign) -> None:
    made = new_campaign("DiesAndForgets")
    made.run()
    kinds = {failure.point.split("/")[2]: {kind for kind, _ in failure.problems} for failure in made.failures}
    expected = {TRANSIENT: {"hosts_lost", "samples_lost"}, PERSISTENT: {"samples_lost"}}
    assert kinds == expected, f"found: {made.failures}"
    stopped = sum(tally.host_stopped for tally in made.tallies.values())
    assert not stopped, f"{stopped} ends with samples lost are said to be in order"


def test_a_host_that_hangs_is_ended_at_its_deadline_and_judged(
    new_campaign: NewCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Driver.ask, "__defaults__", (15.0,))
    outcome = new_campaign("Hangs").try_point(Point(FEED, TRANSIENT, 1))
    assert outcome.problems == (("hangs", "no answer within 15 s"),), f"{outcome}"
    assert outcome.fired == 1 and not outcome.stopped, f"{outcome}"


@pytest.mark.parametrize(
    ("subject", "found"), [("Keeps", []), ("LeavesUndisturbed", []), ("LeavesAndForgets", ["memory_kept"])]
)
def test_a_recording_that_goes_on_is_not_compared_with_one_that_begins(
    new_campaign: NewCampaign, subject: str, found: list[str]
) -> None:
    outcome = new_campaign(subject).try_point(Point(FEED, TRANSIENT, 1))
    assert [kind for kind, _ in outcome.problems] == found, f"{subject}: {outcome}"
    assert outcome.fired == 1, f"nothing was tried: {outcome}"


def test_a_share_of_points_that_are_not_reached_tries_some_that_are(new_campaign: NewCampaign) -> None:
    # Of so many, counted in a run that made more requests, each share has one in each mode.
    counted, of = [64, 64], 64

    def least(made: Campaign) -> int:
        for tally in made.tallies.values():
            tally.counted = counted
        return min(point.nth for chunk in made._chunks() for point in chunk)

    number = next(number for number in range(1, of + 1) if least(new_campaign(shard=(number, of))) > 32)
    made = new_campaign(ledger="share", shard=(number, of))
    made.ledger.count(f"{FEED.name}/{TRANSIENT}", counted)
    made.run()
    late = [each for name, each in made.ledger.outcomes.items() if int(name.rpartition("/")[2]) > 32]
    assert len(late) == 2 and not any(each.fired for each in late), f"its own were reached: {late}"
    fired = {tally.mode: tally.fired for tally in made.tallies.values()}
    assert not made.unfired() and min(fired.values()) >= 1, f"fired in share {number} of {of}: {fired}"


@pytest.mark.parametrize(("subject", "failed"), [("Reduces", 0), ("ReducesAndFallsBack", 1)])
def test_a_scenario_that_needs_more_than_its_rung_did_not_come_about(
    new_campaign: NewCampaign, subject: str, failed: int
) -> None:
    made = new_campaign(subject, sweeps=(parse("reduce_buffer/host/transient/1").sweep,), sample=1)
    made.run()
    found = (made.count("clean_runs_wrong"), len(made.failures))
    assert found == (failed, failed), f"{subject}: {made.failures}"


def test_what_grows_with_the_fault_alone_is_a_leak() -> None:
    heap, few = "runtime heap_bytes", 30 << 10
    grows = [Counter({heap: each}) for each in (-4096, 2 * few, 2 * few, 2 * few)]
    rests, once = [Counter({heap: 0})] * 4, [Counter({heap: each}) for each in (4 * few, 0, 0, 0)]
    found = [bool(campaigns._kept(*each)) for each in ((grows, rests), (grows, grows), (once, rests), (rests, rests))]
    assert found == [True, False, False, False], f"with it alone, with and without, once, never: {found}"
    assert not campaigns._kept(grows, rests, ("host",)), "what a worker keeps is said to be the host's"


def test_a_subject_that_cannot_be_made_is_told_with_its_reason(new_campaign: NewCampaign) -> None:
    with pytest.raises(RuntimeError, match=r"the subject cannot be swept: .*(?s:.)*this one cannot be made"):
        new_campaign("CannotBegin").run()


def test_a_subject_that_fails_with_no_fault_is_told_and_not_swept(new_campaign: NewCampaign) -> None:
    played = new_campaign("DoesNotSync")
    played.run()
    assert played.count("feeds_not_durable") == 1 and played.unfired() == ["feed/host"], played.failures


@pytest.mark.usefixtures("_interposed")
def test_a_process_that_is_killed_is_lost_and_not_waited_for(tmp_path: Path) -> None:
    driver = Driver(_setting(str(tmp_path / "driver"), "Small"), tmp_path / "log")
    try:
        os.kill(driver.process.pid, signal.SIGKILL)
        with pytest.raises(DriverLost, match="it ended with status -9") as caught:
            driver.ask(point="feed/host/transient/1", fires=True, anew=False, closely=False)
        assert not caught.value.hung, "it was waited for"
    finally:
        driver.close()
        driver.close()
