"""Kill a subject's processes at random moments, again and again, and count what that cost."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qualification.host import Hosted

BLOCK_SAMPLES = 1_600
#: Of audio after each call: about fifteen times as fast as it is spoken.
PAUSE_S = 0.005
WORKER_SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
_READY_S = 60.0
_ANSWER_S = 60.0
_ORPHAN_S = 3.0


@dataclass
class Toll:
    """What some kills cost. Positions and losses are samples."""

    kills: int = 0
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
    recorded: int = 0
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
        self._acknowledged = 0
        self.toll = Toll()

    def kill(self) -> None:
        """Kill the host or one of its workers, at some moment. Raises what a host that fails of itself raises."""
        chance, toll, host = self._chance, self.toll, self._host
        anywhere = False
        if host is None:
            host = self._host = self._start()
            # Every fourth at any moment, start-up included.
            anywhere = chance.random() < 0.25
        if anywhere:
            host.read(chance.uniform(0.05, 0.8))
        else:
            host.wait_for("ready", _READY_S)
            self._look_at_start()
            host.read(chance.uniform(0.01, 0.4))
        toll.kills += 1
        workers = [] if anywhere else host.workers()
        # Drawn whatever there is, so that a seed gives the same moments to every subject.
        draw, number, patient = chance.random(), chance.choice(WORKER_SIGNALS), chance.random() < 0.8
        if workers and draw < 0.5:
            self._kill_worker(workers[int(draw * 2 * len(workers))], number, patient)
        else:
            self._kill_host()

    def finish(self) -> int:
        """Have the recording end in order; give what was acknowledged."""
        host = self._host or self._start()
        host.wait_for("ready", _READY_S)
        self._look_at_start()
        host.order("stop")
        status = host.end(_ANSWER_S)
        if status != 0:
            raise RuntimeError(f"the recording ended with status {status}: {host.said()}")
        self._take_in(host)
        self._host = None
        return self._acknowledged

    def _start(self) -> Hosted:
        host = self._hosted(self._folder, until_told=True, block_samples=BLOCK_SAMPLES, pause_s=PAUSE_S)
        self._host, self._looked = host, False
        return host

    def _look_at_start(self) -> None:
        """Compare what is stored with what was acknowledged before this process, once for each."""
        assert self._host is not None
        if self._looked:
            return
        self._looked = True
        stored = next(line["accepted"] for line in self._host.lines if "ready" in line)
        self.toll.lost = max(self.toll.lost, self._acknowledged - stored)
        self.toll.unexplained = max(self.toll.unexplained, stored - self._acknowledged - BLOCK_SAMPLES)
        self._acknowledged = stored

    def _take_in(self, host: Hosted) -> None:
        self._acknowledged = max([self._acknowledged, *host.all("accepted")])
        self.toll.recorded = self._acknowledged

    def _kill_worker(self, worker: psutil.Process, number: signal.Signals, patient: bool) -> None:
        assert self._host is not None
        answers = len(self._host.all("first_answer_s"))
        began_s = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)
            self.toll.workers_killed += 1
            self.toll.while_recording += 1
        if not patient:
            # The next one may come while it is replaced.
            return
        self._host.order("watch")
        first_s = self._host.wait_for("first_answer_s", _ANSWER_S, answers + 1)
        self.toll.first_answers_s.append(first_s - began_s)

    def _kill_host(self) -> None:
        host, self._host = self._host, None
        assert host is not None
        workers = host.workers()
        host.kill()
        if host.process.returncode == -signal.SIGKILL:
            self.toll.hosts_killed += 1
            began = next((line["accepted"] for line in host.lines if "ready" in line), self._acknowledged)
            self.toll.while_recording += max(host.all("accepted"), default=0) > max(self._acknowledged, began)
        # Killed in its start-up it may have said nothing about what it found.
        self._take_in(host)
        self.toll.orphans += len(orphans(workers, _ORPHAN_S))


class Unfinished:
    """Rounds of a long test that are done, in a file: a run that is cut off goes on where it ended."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        """Take up what an earlier run with the same ``key`` has done; of another nothing is taken."""
        self._path, self._key = path, json.loads(json.dumps(key))
        self.rounds: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == self._key:
                self.rounds = found["rounds"]

    def keep(self, name: str, outcome: Any) -> None:
        """Note the outcome of a round; it is on the disk when this returns."""
        self.rounds[name] = outcome
        beside = self._path.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"key": self._key, "rounds": self.rounds}, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def done(self) -> None:
        """Forget it: the next run begins anew."""
        self._path.unlink(missing_ok=True)


def orphans(processes: Sequence[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Give the processes that still run after so long, and end them. A zombie runs no more: nobody may reap it."""

    def runs(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        return False

    deadline_s = time.monotonic() + within_s
    while (left := [each for each in processes if runs(each)]) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def stop_and_go(processes: Sequence[psutil.Process], for_s: float) -> int:
    """Suspend processes and resume them in the same order; give how many really were stopped."""
    stopped = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        time.sleep(for_s)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                stopped += process.status() == psutil.STATUS_STOPPED
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
    return stopped
