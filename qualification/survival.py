"""Kill a subject's processes at random moments, again and again, and count what that cost."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qualification.host import Hosted
from qualification.quoting import unquoted

BLOCK_SAMPLES = 1_600
#: Of audio after each call: about fifteen times as fast as it is spoken.
PAUSE_S = 0.005
WORKER_SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
_READY_S = 60.0
_ANSWER_S = 60.0
_DEATH_S = 3.0


@dataclass
class Toll:
    """What some kills cost. Positions and losses are samples."""

    kills: int = 0
    #: Kills for which there was a worker to choose.
    workers_seen: int = 0
    workers_killed: int = 0
    hosts_killed: int = 0
    #: Kills that came after something new was acknowledged: another proves nothing about what is acknowledged.
    while_recording: int = 0
    lost: int = 0
    unexplained: int = 0
    different: int = 0
    untiled: int = 0
    wrong: int = 0
    orphans: int = 0
    #: Recordings that failed by themselves: a host that died, hung or could not be started again.
    hosts_failed: int = 0
    why: str = ""
    first_answers_s: list[float] = field(default_factory=list)

    def __add__(self, other: Toll) -> Toll:
        """Add up two tolls."""
        names = [each.name for each in dataclasses.fields(self)]
        return Toll(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Killing:
    """One recording, in processes that are killed at moments that a seed decides."""

    def __init__(self, hosted: Callable[..., Hosted], folder: str, chance: random.Random) -> None:
        """Record into ``folder``; nothing is started yet."""
        self._hosted, self._folder, self._chance = hosted, folder, chance
        self._host: Hosted | None = None
        self._looked = False
        #: Positions that were acknowledged, or found in the spool by the host after it.
        self.acknowledged = 0
        self.toll = Toll()

    def run(self, kills: int) -> None:
        """Kill so often, then have the recording end in order. A host that fails by itself ends it; it is counted."""
        try:
            for _ in range(kills):
                self._kill()
            self._finish()
        except (RuntimeError, TimeoutError) as error:
            self.toll.hosts_failed += 1
            self.toll.why = f"{type(error).__name__}: {error}"[:500]
            if self._host is not None:
                self._host.close()

    def _kill(self) -> None:
        """Kill the host or one of its workers, at some moment."""
        chance, toll, host = self._chance, self.toll, self._host
        anywhere = False
        if host is None:
            host = self._start()
            # Every fourth at any moment, start-up included.
            anywhere = chance.random() < 0.25
        if anywhere:
            host.read(chance.uniform(0.05, 0.8))
        else:
            host.wait_for("ready", _READY_S)
            host.read(chance.uniform(0.01, 0.4))
        toll.kills += 1
        workers = [] if anywhere else host.workers()
        toll.workers_seen += bool(workers)
        # Drawn whatever there is, so that a seed gives the same moments to every subject.
        draw, number, patient = chance.random(), chance.choice(WORKER_SIGNALS), chance.random() < 0.8
        if workers and draw < 0.5:
            self._kill_worker(host, workers[int(draw * 2 * len(workers))], number, patient)
        else:
            self._kill_host(host)

    def _finish(self) -> None:
        host = self._host or self._start()
        host.wait_for("ready", _READY_S)
        host.order("stop")
        status = host.end(_ANSWER_S)
        self._take_in(host)
        self._host = None
        self.toll.orphans += len(still_running(host.family, _DEATH_S))
        if status != 0:
            raise RuntimeError(f"the recording ended with status {status}: {host.said()}")

    def _start(self) -> Hosted:
        self._host = self._hosted(self._folder, until_told=True, block_samples=BLOCK_SAMPLES, pause_s=PAUSE_S)
        return self._host

    def _take_in(self, host: Hosted) -> None:
        """Compare what a host found stored with what was acknowledged before it, and take in what it acknowledged."""
        stored = next((line["accepted"] for line in host.lines if "ready" in line), None)
        # One that was killed in its start-up may have said nothing about what it found: the next one does.
        if stored is not None:
            self.toll.lost = max(self.toll.lost, self.acknowledged - stored)
            self.toll.unexplained = max(self.toll.unexplained, stored - self.acknowledged - BLOCK_SAMPLES)
            self.acknowledged = stored
        self.acknowledged = max([self.acknowledged, *host.all("accepted")])

    def _kill_worker(self, host: Hosted, worker: psutil.Process, number: signal.Signals, patient: bool) -> None:
        answers = len(host.all("first_answer_s"))
        began_s = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
        if still_running(lambda: [worker], _DEATH_S):
            # It lives with the signal: that was no kill.
            return
        self.toll.workers_killed += 1
        self.toll.while_recording += 1
        if not patient:
            # The next one may come while it is replaced.
            return
        host.order("watch")
        first_s = host.wait_for("first_answer_s", _ANSWER_S, answers + 1)
        self.toll.first_answers_s.append(first_s - began_s)

    def _kill_host(self, host: Hosted) -> None:
        host.kill()
        self._host = None
        if host.process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the host had ended by itself with status {host.process.returncode}: {host.said()}")
        self.toll.hosts_killed += 1
        before = self.acknowledged
        self._take_in(host)
        stored = next((line["accepted"] for line in host.lines if "ready" in line), before)
        self.toll.while_recording += self.acknowledged > max(before, stored)
        self.toll.orphans += len(still_running(host.family, _DEATH_S))


class Unfinished:
    """Rounds of a long test that are done, in a file: a run that is cut off goes on where it ended."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Take up what an earlier run with the same ``key`` has done; of another, or of a damaged file, nothing."""
        self._path, self._key = path, json.loads(json.dumps(key))
        self.rounds: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == self._key:
                self.rounds = {str(name): dict(outcome) for name, outcome in found["rounds"].items()}

    def keep(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Note the outcome of a round, good or bad; it is on the disk when this returns."""
        self.rounds[name] = dict(outcome)
        self._write()

    def forget(self, names: Iterable[str]) -> None:
        """Forget these rounds; where there is none left, the file."""
        for name in names:
            self.rounds.pop(name, None)
        if self.rounds:
            self._write()
        else:
            self.done()

    def _write(self) -> None:
        beside = self._path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        # As private as the records.
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({"key": self._key, "rounds": unquoted(self.rounds)}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def done(self) -> None:
        """Forget it: the next run begins anew."""
        self._path.unlink(missing_ok=True)


def still_running(processes: Callable[[], Sequence[psutil.Process]], within_s: float) -> list[psutil.Process]:
    """Give the processes that still run after so long, and end them. A zombie runs no more: nobody may reap it."""

    def runs(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    deadline_s = time.monotonic() + within_s
    while (left := [each for each in processes() if runs(each)]) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


@contextmanager
def suspended(processes: Sequence[psutil.Process]) -> Iterator[Sequence[psutil.Process]]:
    """Have processes stopped for the length of the context (SIGSTOP, SIGCONT). One that ends meanwhile is none."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
