"""The scenarios: what is done while an allocation fails. Together they are a dictation, from its start to its resuming.

Each says how the moment before is brought about (``ready``), what is done in it (``act``), and what it held meanwhile
and gives back (``lift``). Nothing here looks at the outcome.
"""

from __future__ import annotations

import abc
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from backends.contract import Allocation, ArmedFault, FaultPlan, Site
from backends.errors import RuntimeFailure
from qualification.observe import first_recovery, told_since, wait_until
from qualification.subject import STRATEGIES
from qualification.sweep.stage import Problem, Stage

#: Nothing is asked of the runtime but what the scenario has it do: its requests repeat.
_QUIET = {
    "pressure_interval_s": 3600.0,
    "restart_backoff_s": 0.01,
    "heartbeat_s": 5.0,
    "infer_deadline_s": 8.0,
    "start_deadline_s": 15.0,
    # A point of which a worker dies costs the start of another.
    "fork_workers": True,
    # So that few allocations fill the device, and a batch that was reduced is whole again for the next point.
    "max_batch": 2,
    "batches_before_growth": 1,
}
#: Memory is watched closely, and a device that is free again is returned to at once; yet slowly enough for nothing to
#: be told, as a rule, of a device that others just filled before the fault is armed.
_WATCHFUL = {**_QUIET, "pressure_interval_s": 0.02, "return_after_s": 0.002}
SOON_S = 5.0
#: Where a fault was to stay, a subject may return later: it is not waited for, another takes its place.
AT_ONCE_S = 0.2
#: And while it is there, so long after its first refusal.
PERSISTENT_S = 1.0
_TOLD_WITHIN_S = 1.0
_LOOK_EVERY_S = 0.002


class Scenario(abc.ABC):
    """One part of a dictation."""

    policy: ClassVar[Mapping[str, Any]] = _QUIET
    #: Whether every answer comes from a batch of one: then it is the same to the bit.
    single: ClassVar[bool] = True
    #: Whether the subject is closed in it, or has to shut itself down.
    closes: ClassVar[bool] = False
    stops: ClassVar[bool] = False
    #: What the user is told in it when nothing fails besides: else it did not come about.
    tells: ClassVar[frozenset[str]] = frozenset()
    #: The device's own fault that it needs besides.
    plan: ClassVar[FaultPlan | None] = None

    def __init__(self, stage: Stage) -> None:
        """Take the stage that it plays on."""
        self.stage = stage
        self._fault: ArmedFault | None = None

    def ready(self) -> None:
        """Bring about the moment before."""
        self.stage.fresh(self.policy)
        self.stage.wants(self.blocks * self.stage.block_samples)
        self.arm()

    blocks: ClassVar[int] = 1

    def arm(self) -> None:
        """Bring about the device's own fault."""
        if self.plan is not None:
            self._fault = self.stage.backend.arm(self.plan)

    @abc.abstractmethod
    def act(self) -> None:
        """Do what is swept."""

    def lift(self) -> None:
        """Give back what it held."""
        fault, self._fault = self._fault, None
        if fault is not None:
            fault.disarm()

    def after(self, patience_s: float) -> list[Problem]:
        """Bring the subject back to where the next point begins, once everything was answered; say what keeps it."""
        return []

    def came_about(self, told: Sequence[str]) -> bool:
        """Whether what was told, when nothing failed besides, is this scenario: its rung is reached, and helps."""
        rungs = [rung for rung in STRATEGIES if rung in self.tells]
        beyond = STRATEGIES[STRATEGIES.index(rungs[-1]) + 1 :] if rungs else ()
        # The same acts prevent, when memory runs short before there is an error.
        climbed = told[first_recovery(told)]
        return self.tells <= set(told) and not set(climbed) & set(beyond)

    def check(self) -> list[Problem]:
        """Look for what only this policy can show: whether memory is still watched, where it is watched closely."""
        stage = self.stage
        if self.policy["pressure_interval_s"] > _TOLD_WITHIN_S or stage.require().device() != stage.device:
            return []
        subject = stage.require()
        before = len(subject.events())
        ballast = _taken(stage, Pressure.share)
        told = _wait(lambda: "pressure_critical" in told_since(subject, before), _TOLD_WITHIN_S)
        before = len(subject.events())
        ballast.free()
        _wait(lambda: "pressure_normal" in told_since(subject, before), _TOLD_WITHIN_S)
        share = f"{Pressure.share:.0%} of the device's memory is in use"
        return (
            [] if told else [("untold", f"{share} after the fault, and nobody is told: memory is not watched any more")]
        )


class Feed(Scenario):
    """Audio comes in; it is too little for an answer."""

    def ready(self) -> None:
        """Bring about the moment before."""
        self.stage.fresh(self.policy)
        self.stage.wants(self.stage.block_samples // 2)

    def act(self) -> None:
        """Do what is swept."""
        self.stage.feed()

    def lift(self) -> None:
        """Give back what it held."""
        # The other half: the answers are cut where they are in the undisturbed run.
        stage = self.stage
        stage.wanted += stage.block_samples - stage.block_samples // 2


class Inference(Scenario):
    """Audio comes in and is answered."""

    def act(self) -> None:
        """Do what is swept."""
        self.stage.feed()
        self.stage.require().drain(self.stage.patience_s)


class CacheClear(Inference):
    """The runtime's cache is in the way."""

    plan = FaultPlan(Site.DEVICE_CACHE)
    tells = frozenset({"cache_clear"})


class GarbageCollect(Inference):
    """Garbage is in the way."""

    plan = FaultPlan(Site.DEVICE_GARBAGE)
    tells = frozenset({"garbage_collect"})


class ReduceBuffer(Inference):
    """There is memory for a small batch, and for no large one."""

    blocks, single = 2, False
    tells = frozenset({"reduce_buffer"})

    def arm(self) -> None:
        """Bring about the device's own fault."""
        plan = FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=self.stage.small_batch_bytes)
        self._fault = self.stage.backend.arm(plan)


class RestartWorker(Inference):
    """The runtime crashes, and another process takes its place."""

    plan = FaultPlan(Site.RUNTIME_CRASH)
    tells = frozenset({"restart_worker"})


class CpuFallback(Inference):
    """The device has no memory at all: the fallback is loaded, and answers."""

    policy = {**_WATCHFUL, "rungs": [each for each in STRATEGIES if each != "restart_worker"]}
    plan = FaultPlan(Site.DEVICE_MEMORY, times=None)
    tells = frozenset({"cpu_fallback"})

    def after(self, patience_s: float) -> list[Problem]:
        """Bring the subject back to where the next point begins; it has to come back by itself."""
        return _returned(self.stage, patience_s)


class Pressure(Scenario):
    """Others take the device's memory, before there is an error, and give it back."""

    policy = _WATCHFUL
    blocks = 0
    tells = frozenset({"pressure_critical"})
    share: ClassVar[float] = 0.92
    _ballast: Allocation | None = None

    def take(self) -> None:
        """Have others take so much that this share is in use."""
        self._ballast = _taken(self.stage, self.share)

    def ready(self) -> None:
        """Bring about the moment before."""
        super().ready()
        self._ballast = None
        self._before = len(self.stage.require().events())
        # Now, and not in the act: what takes it is not the subject.
        self.take()

    def act(self) -> None:
        """Do what is swept."""
        self.wait_for("pressure_critical")

    def wait_for(self, kind: str) -> bool:
        """Wait until the subject told of it; say whether it did."""
        return _wait(lambda: self.told(kind), _TOLD_WITHIN_S)

    def told(self, kind: str) -> bool:
        """Whether the subject told of it since the moment before."""
        return kind in told_since(self.stage.require(), self._before)

    def lift(self) -> None:
        """Give back what it held."""
        ballast, self._ballast = self._ballast, None
        if ballast is None:
            return
        self.wait_for("pressure_critical")
        ballast.free()
        self.wait_for("pressure_normal")


class ReturnToDevice(Pressure):
    """The device has memory again: the model is loaded there, tried, and used."""

    policy = CpuFallback.policy
    tells = frozenset({"returned_to_device"})
    share = 0.97

    def ready(self) -> None:
        """Bring about the moment before."""
        super().ready()
        _wait(lambda: self.stage.require().device() != self.stage.device, SOON_S)

    def act(self) -> None:
        """Do what is swept."""
        ballast, self._ballast = self._ballast, None
        if ballast is not None:
            ballast.free()
        # Its device is told to be another before the return is over.
        stage, stays = self.stage, self.stage.persistent and self.stage.patience_s > SOON_S
        returned = partial(self.told, "returned_to_device")
        _wait(lambda: returned() or (stays and stage.control.record().faults_fired > 0), min(SOON_S, stage.patience_s))
        if stays:
            _wait(returned, PERSISTENT_S)

    def after(self, patience_s: float) -> list[Problem]:
        """Bring the subject back to where the next point begins; it has to come back by itself."""
        return _returned(self.stage, patience_s)


class EmergencyShutdown(Inference):
    """Nothing helps: the recording ends in order."""

    policy = {**_QUIET, "rungs": ["cache_clear", "garbage_collect", "reduce_buffer", "emergency_shutdown"]}
    plan = FaultPlan(Site.DEVICE_MEMORY, times=None)
    stops = True
    tells = frozenset({"emergency_shutdown"})


class Toggle(Scenario):
    """The recording is stopped, which answers what was accepted, and started again."""

    def act(self) -> None:
        """Do what is swept."""
        subject = self.stage.require()
        self.stage.feed()
        subject.toggle()
        subject.drain(self.stage.patience_s)
        subject.toggle()

    def lift(self) -> None:
        """Give back what it held."""
        subject = self.stage.require()
        if not subject.toggle():
            subject.toggle()


class Start(Scenario):
    """A subject begins: its processes, the model, the warm-up, the first answer."""

    def ready(self) -> None:
        """Bring about the moment before."""
        stage = self.stage
        stage.begin(self.policy, stage.new_folder())
        stage.wants(stage.block_samples)

    def act(self) -> None:
        """Do what is swept."""
        stage = self.stage
        stage.open()
        stage.feed()
        stage.require().drain(stage.patience_s)


class Resume(Start):
    """A subject goes on with what another left: half a block without an answer."""

    _left: Path | None = None

    def ready(self) -> None:
        """Bring about the moment before."""
        stage, half = self.stage, self.stage.block_samples // 2
        if self._left is None:
            left = stage.new_folder()
            stage.begin(self.policy, left)
            stage.open()
            stage.wants(stage.block_samples)
            stage.finish()
            stage.wants(half)
            stage.feed()
            subject, stage.subject = stage.require(), None
            subject.close()
            self._left = left
        folder = stage.new_folder()
        shutil.copytree(self._left, folder)
        stage.begin(self.policy, folder, stage.block_samples + half)
        stage.wants(stage.block_samples - half)


class Shutdown(Scenario):
    """The recording ends while something is unanswered."""

    closes = True

    def ready(self) -> None:
        """Bring about the moment before."""
        stage = self.stage
        stage.begin(self.policy, stage.new_folder())
        stage.open()
        stage.wants(stage.block_samples // 2)
        stage.feed()

    def act(self) -> None:
        """Do what is swept."""
        subject = self.stage.require()
        subject.shutdown("the sweep's end")
        subject.close()

    def lift(self) -> None:
        """Give back what it held."""
        stage = self.stage
        stage.wanted = stage.block_samples


def _taken(stage: Stage, share: float) -> Allocation:
    """Take so much of the device that this share is in use. What was given up before may be given back only now."""
    wanted_bytes = int(share * stage.setting.device_limit_bytes)
    _wait(lambda: stage.backend.memory().used_bytes < wanted_bytes, SOON_S)
    try:
        return stage.backend.allocate(wanted_bytes - stage.backend.memory().used_bytes)
    except RuntimeFailure:
        # A reading may be an estimate: what a runtime keeps for reuse is not in it.
        stage.backend.release_cached()
        return stage.backend.allocate(wanted_bytes - stage.backend.memory().used_bytes)


def _returned(stage: Stage, patience_s: float) -> list[Problem]:
    """Wait for the way back to the device; with no patience to speak of, another subject takes this one's place."""
    if _wait(lambda: stage.require().device() == stage.device, patience_s) or patience_s < SOON_S:
        return []
    return [("clean_runs_wrong", f"its device has had memory for {patience_s:g} s, and it did not return to it")]


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for a condition, looking often: a point takes some milliseconds."""
    return wait_until(condition, timeout_s, _LOOK_EVERY_S)


SCENARIOS: Mapping[str, Callable[[Stage], Scenario]] = {
    "start": Start,
    "feed": Feed,
    "inference": Inference,
    "pressure": Pressure,
    "cache_clear": CacheClear,
    "garbage_collect": GarbageCollect,
    "reduce_buffer": ReduceBuffer,
    "restart_worker": RestartWorker,
    "cpu_fallback": CpuFallback,
    "return_to_device": ReturnToDevice,
    "emergency_shutdown": EmergencyShutdown,
    "toggle": Toggle,
    "shutdown": Shutdown,
    "resume": Resume,
}
