"""Subjects that are broken on purpose, one way each, made of the pipeline that ships."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from typing import Any

import numpy as np

from backends.errors import classify
from protection import pipeline as ships
from protection import worker_process
from protection.engine import InProcessEngine
from protection.events import EventKind, Events
from protection.pipeline import DictationPipeline
from protection.policy import Policy
from protection.spool import AudioError, FloatArray, Result, Spool, SpoolError
from protection.worker_engine import WorkerEngine
from protection.worker_process import WorkerLost
from tests.meta import broken_workers

healthy = ships.factory
#: In the environment of a process that the tests started, and that may end.
HOSTED = "PLIMSOLL_HOSTED"


def _with(context: Any, **parts: Any) -> DictationPipeline:
    """Make the pipeline with one of its parts replaced by a broken one."""
    before = {name: getattr(ships, name) for name in parts}
    for name, part in parts.items():
        setattr(ships, name, part)
    try:
        return ships.factory(context)
    finally:
        for name, part in before.items():
            setattr(ships, name, part)


class _DroppingSpool(Spool):
    """Acknowledges its third block and does not store it; what is missing reads as silence."""

    appended = 0

    def append(self, start: int, samples: FloatArray) -> int:
        self.appended += 1
        if self.appended == 3:
            samples = np.zeros_like(samples)
        return super().append(start, samples)


def drops_a_block(context: Any) -> DictationPipeline:
    return _with(context, Spool=_DroppingSpool)


class _SilentEvents(Events):
    """Does not tell the user about the fallback."""

    def tell(self, kind: EventKind, message: str, action: str, meaning: str) -> None:
        if kind is not EventKind.CPU_FALLBACK:
            super().tell(kind, message, action, meaning)


def falls_back_silently(context: Any) -> DictationPipeline:
    return _with(context, Events=_SilentEvents)


class _ZeroingEngine(WorkerEngine):
    """Takes an out-of-memory error for silence."""

    def infer(self, features: FloatArray) -> FloatArray:
        try:
            return super().infer(features)
        except Exception as error:
            if not classify(error).is_oom:
                raise
            return np.zeros((len(features), self.spec.chunk_scores, 32), np.float32)


class _UnawarePipeline(DictationPipeline):
    """Does not look at the pressure, by which it would leave the device some time after the error it swallowed."""

    def _relieve(self) -> None:
        pass


def returns_zeros_on_oom(context: Any) -> DictationPipeline:
    return _with(context, WorkerEngine=_ZeroingEngine, DictationPipeline=_UnawarePipeline)


class _GuessingEngine(WorkerEngine):
    """Takes the loss of its worker for silence."""

    def infer(self, features: FloatArray) -> FloatArray:
        try:
            return super().infer(features)
        except WorkerLost:
            return np.zeros((len(features), self.spec.chunk_scores, 32), np.float32)


def returns_zeros_when_its_worker_dies(context: Any) -> DictationPipeline:
    return _with(context, WorkerEngine=_GuessingEngine)


class _RetreatingEngine(WorkerEngine):
    """Does not replace a worker that was lost: from then on it runs the model in its own process."""

    near: InProcessEngine | None = None

    def infer(self, features: FloatArray) -> FloatArray:
        if self.near is None:
            try:
                return super().infer(features)
            except WorkerLost:
                self.near = InProcessEngine(self._backend, self._path)
        return self.near.infer(features)


def retreats_into_its_own_process(context: Any) -> DictationPipeline:
    return _with(context, WorkerEngine=_RetreatingEngine)


class _WallClock:
    """Counts the time that its process was asleep."""

    STEP_S = 0.25

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def read_s(self) -> float:
        return time.monotonic() - self._began_s


def blames_its_worker_for_its_own_sleep(context: Any) -> DictationPipeline:
    if HOSTED in os.environ:
        vars(worker_process)["AwakeClock"] = _WallClock
    return ships.factory(context)


class _FragilePipeline(DictationPipeline):
    """Takes its process with it when it is fed."""

    def feed(self, start: int, block: FloatArray) -> int:
        os._exit(1)


def dies_by_itself_the_third_time(context: Any) -> DictationPipeline:
    context.workdir.mkdir(parents=True, exist_ok=True)
    count = context.workdir / "opened"
    times = int(count.read_text()) if count.exists() else 0
    count.write_text(str(times + 1))
    fragile = times >= 2 and HOSTED in os.environ
    return _with(context, DictationPipeline=_FragilePipeline) if fragile else ships.factory(context)


class _RashPipeline(DictationPipeline):
    """Sets everything aside that its worker had in hand when it died."""

    def _compute(self, chunks: list[tuple[int, int]]) -> list[Result]:
        try:
            self._engine.infer(np.stack([self._features(start, stop) for start, stop in chunks]))
        except WorkerLost as error:
            self._events.tell(EventKind.CHUNK_SET_ASIDE, str(error), "all of it was set aside", "no answers")
            return [Result(start, stop, None, self._engine.device, True) for start, stop in chunks]
        return super()._compute(chunks)


def sets_the_neighbours_aside(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_RashPipeline)


class _TrustingPipeline(DictationPipeline):
    """Blames every failure on the audio, and never on the engine."""

    def _engine_is_sound(self) -> bool:
        return True


def blames_the_audio(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_TrustingPipeline)


class _LateSpool(Spool):
    """Acknowledges first and stores later, but for long blocks: what it holds back is lost with the process."""

    def append(self, start: int, samples: FloatArray) -> int:
        late: list[tuple[int, FloatArray]] = self.__dict__.setdefault("late", [])
        late.append((start, samples))
        if len(late) == 8 or len(samples) > 16_000:
            for held_start, held in late:
                super().append(held_start, held)
            late.clear()
        return start + len(samples)


def acknowledges_before_it_stores(context: Any) -> DictationPipeline:
    return _with(context, Spool=_LateSpool)


class _BlindSpool(Spool):
    """Takes an error of the disk for success: nothing is stored from there on, and all is acknowledged."""

    def append(self, start: int, samples: FloatArray) -> int:
        try:
            return super().append(start, samples)
        except (SpoolError, AudioError):
            return start + len(samples)


def acknowledges_what_it_cannot_store(context: Any) -> DictationPipeline:
    return _with(context, Spool=_BlindSpool)


class _HopefulSpool(Spool):
    """Does so with the first error only, and stores silence in its place when there is room."""

    hopeful = True

    def append(self, start: int, samples: FloatArray) -> int:
        silence = np.zeros(max(0, start - self.accepted), np.float32)
        try:
            return super().append(start - len(silence), np.concatenate([silence, samples]))
        except SpoolError:
            if not self.hopeful:
                raise
            self.hopeful = False
            return start + len(samples)


def acknowledges_the_block_that_meets_the_full_disk(context: Any) -> DictationPipeline:
    return _with(context, Spool=_HopefulSpool)


class _UncountingPipeline(DictationPipeline):
    """Forgets its out-of-memory errors."""

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "oom_total": 0.0}


def counts_no_ooms(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_UncountingPipeline)


class _HastyPipeline(DictationPipeline):
    """Falls back before it tries a smaller batch. It returns, and meets the next fault on the device."""

    def _make_ladder(self) -> Any:
        ladder = super()._make_ladder()
        ladder._rungs.sort(key=lambda rung: rung.kind is EventKind.REDUCE_BUFFER)
        return ladder


def falls_back_too_early(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_HastyPipeline)


class _RepeatingPipeline(DictationPipeline):
    """Gives an answer twice after a resume."""

    def results(self) -> list[Result]:
        results = list(super().results())
        return [*results, results[0]] if results else results


def answers_twice(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_RepeatingPipeline)


def never_on_the_device(context: Any) -> DictationPipeline:
    """Lives on the fallback from the start: no fault of the device ever reaches it."""
    engine = InProcessEngine(context.backend, context.model_path)
    engine.fall_back()
    policy = Policy.from_options({**context.policy, "return_after_s": 1e5})
    return DictationPipeline(context.workdir, engine, policy)


def never_shuts_down(context: Any) -> DictationPipeline:
    rungs = tuple(rung for rung in Policy().rungs if rung != "emergency_shutdown")
    engine = InProcessEngine(context.backend, context.model_path)
    return DictationPipeline(context.workdir, engine, Policy(rungs=rungs))


class _MutePipeline(DictationPipeline):
    """Declares a failure of everything."""

    def results(self) -> list[Result]:
        return [dataclasses.replace(each, output=None) for each in super().results()]


def answers_nothing(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_MutePipeline)


class _SatedPipeline(DictationPipeline):
    """Accepts a few seconds and no more: what it does not accept, it cannot lose."""

    def feed(self, start: int, block: FloatArray) -> int:
        return super().feed(start, block) if start < 4 * 16_000 else start


def accepts_no_more(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_SatedPipeline)


class _TellingPipeline(DictationPipeline):
    """Tells of an emergency shutdown, and goes on recording."""

    def _emergency(self, why: str, kind: EventKind = EventKind.PRESSURE_EMERGENCY) -> None:
        self._events.tell(EventKind.EMERGENCY_SHUTDOWN, why, "nothing", "nothing")


def tells_of_a_shutdown_only(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_TellingPipeline)


_left: list[subprocess.Popen[bytes]] = []


def leaves_a_process_behind(context: Any) -> DictationPipeline:
    nothing = subprocess.DEVNULL
    _left.append(
        subprocess.Popen(["sleep", "20"], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    )
    return ships.factory(context)


#: What is lost stays lost, whatever becomes of the pipeline.
_lost: list[object] = []


class _LosingEngine(WorkerEngine):
    """Loses 20 kB with each chunk that it answers."""

    def infer(self, features: FloatArray) -> FloatArray:
        _lost.extend(bytearray(b"x") * 20_000 for _ in features)
        return super().infer(features)


def loses_20_kb_per_chunk(context: Any) -> DictationPipeline:
    return _with(context, WorkerEngine=_LosingEngine)


def loses_20_kb_per_chunk_in_its_worker(context: Any) -> DictationPipeline:
    return _with_workers(context, "LosesMemory")


class _OpeningPipeline(DictationPipeline):
    """Leaves a descriptor behind at each toggle."""

    def toggle(self) -> bool:
        os.open("/dev/null", os.O_RDONLY)
        return super().toggle()


class _KeepingEngine(WorkerEngine):
    """Leaves a thread behind at each recovery that ends on the fallback, and keeps 250 kB of what was on the device."""

    def fall_back(self) -> None:
        super().fall_back()
        threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()
        _lost.append(bytearray(b"x") * 250_000)


def keeps_a_descriptor_a_thread_and_memory(context: Any) -> DictationPipeline:
    return _with(context, DictationPipeline=_OpeningPipeline, WorkerEngine=_KeepingEngine)


def _with_workers(context: Any, name: str) -> DictationPipeline:
    """Make the pipeline with workers that are broken so, each that it starts."""
    # Workers start later, too: it stays.
    setattr(worker_process, "boot", broken_workers.boot_all(name))  # noqa: B010  # mypy knows no such attribute
    return ships.factory(dataclasses.replace(context, policy={**context.policy, "fork_workers": False}))
