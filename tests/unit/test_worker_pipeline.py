"""Whatever becomes of its workers, the pipeline answers everything it accepted, and says what it did."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import pytest

import protection.worker
import protection.worker_engine
import protection.worker_process
from backends.contract import FaultPlan, Site
from backends.cpu import Cpu
from backends.faults import ballast
from backends.model import DEFAULT_MODEL
from protection.engine import InProcessEngine
from protection.pipeline import DictationPipeline, PipelineClosed, make_engine
from protection.policy import RUNGS, Policy
from protection.spool import Result
from tests.meta import broken_workers
from tests.unit.waiting import until

SECOND = 16_000
pytestmark = pytest.mark.timeout(600)
Samples = npt.NDArray[np.float32]
Audio = Callable[[float], Samples]


class Open(Protocol):
    """Opens a pipeline in a folder below the test's own, closed when the test ends."""

    def __call__(self, folder: str = "a", **policy: Any) -> DictationPipeline: ...


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    left = psutil.Process().children(recursive=True)
    assert not left, f"processes left behind: {left}"


@pytest.fixture
def start(tmp_path: Path, bounded: Cpu) -> Iterator[Open]:
    with ExitStack() as opened:

        def make(folder: str = "a", **options: Any) -> DictationPipeline:
            policy = Policy(**options)
            engine = make_engine(bounded, DEFAULT_MODEL, policy)
            return opened.enter_context(DictationPipeline(tmp_path / folder, engine, policy))

        yield make


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Samples], Sequence[Result]]:
    """Give the answers of the engine in this process, without trouble."""
    known: dict[bytes, Sequence[Result]] = {}

    def make(samples: Samples) -> Sequence[Result]:
        if samples.tobytes() not in known:
            engine = InProcessEngine(Cpu(), DEFAULT_MODEL, owns_backend=True)
            with DictationPipeline(tmp_path_factory.mktemp("expected"), engine) as pipeline:
                pipeline.feed(0, samples)
                pipeline.drain(60.0)
                known[samples.tobytes()] = pipeline.results()
        return known[samples.tobytes()]

    return make


Expected = Callable[[Samples], Sequence[Result]]


def _kinds(pipeline: DictationPipeline) -> list[str]:
    return [event.kind.value for event in pipeline.events()]


def _workers(pipeline: DictationPipeline) -> list[psutil.Process]:
    return [psutil.Process(process_id) for process_id in pipeline.process_ids() if process_id != os.getpid()]


def _same(found: Sequence[Result], expected: Sequence[Result], but: Sequence[int] = ()) -> None:
    """Assert that these are the answers, bit for bit; ``but`` these, by their number, are declared failures."""
    ranges = [(each.start, each.stop) for each in found]
    assert ranges == [(each.start, each.stop) for each in expected], f"the results are about {ranges}"
    failed = [k for k, each in enumerate(found) if each.output is None]
    assert failed == list(but), f"declared failures are {failed}, expected {list(but)}"
    for x, y in zip(found, expected, strict=True):
        same = x.output is None or (y.output is not None and x.output.tobytes() == y.output.tobytes())
        assert same, f"[{x.start}, {x.stop}) differs"


def _where(pipeline: DictationPipeline) -> set[tuple[str, bool]]:
    return {(result.device, result.degraded) for result in pipeline.results()}


# A worker that dies, hangs or is broken.


def test_a_worker_that_is_killed_in_the_middle_is_replaced_and_its_chunks_replayed(
    start: Open, audio: Audio, expected: Expected
) -> None:
    samples = audio(8.3)
    pipeline = start()
    pipeline.feed(0, samples[: 4 * SECOND])
    pipeline.drain(60.0)
    (worker,) = _workers(pipeline)
    # What it is asked next it never answers.
    worker.suspend()
    pipeline.feed(4 * SECOND, samples[4 * SECOND :])
    worker.kill()
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["worker_lost", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"
    assert _where(pipeline) == {("cpu:arena", False)}, f"answers were made on {_where(pipeline)}"
    message = pipeline.events()[0].message
    assert f"worker {worker.pid} was killed by SIGKILL" in message, f"the message is {message!r}"
    metrics = pipeline.metrics()
    counts = [metrics[name] for name in ("workers_lost_total", "workers_lost_died", "restart_worker_successes")]
    assert counts == [1, 1, 1] and worker not in _workers(pipeline), f"counts {counts}; workers {_workers(pipeline)}"


def test_a_worker_that_dies_idle_is_replaced_when_there_is_work(start: Open, audio: Audio, expected: Expected) -> None:
    samples = audio(2.0)
    pipeline = start()
    pipeline.feed(0, samples[:SECOND])
    pipeline.drain(60.0)
    _workers(pipeline)[0].kill()
    pipeline.quiesce()
    until(lambda: not _workers(pipeline), "it is gone")
    pipeline.feed(SECOND, samples[SECOND:])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["worker_lost", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"


def test_a_runtime_that_hangs_is_replaced(start: Open, bounded: Cpu, audio: Audio, expected: Expected) -> None:
    samples = audio(4.0)
    pipeline = start(infer_deadline_s=4.0)
    with bounded.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        record = fault.record()
    _same(pipeline.results(), expected(samples))
    assert record.faults_fired == 1, f"the record is {record}"
    assert _kinds(pipeline) == ["worker_lost", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"
    assert "hung: no answer within 4 s" in pipeline.events()[0].message, f"{pipeline.events()[0].message!r}"
    assert pipeline.metrics()["workers_lost_hung"] == 1, f"the counts are {dict(pipeline.metrics())}"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("AnswersTwice", "broke_the_protocol"),
        ("SpeaksGarbage", "broke_the_protocol"),
        ("FlipsABit", "broke_the_protocol"),
        ("EndsInTheMiddle", "died"),
        ("TalksAndDies", "died"),
        ("HangsInTheMiddle", "hung"),
        ("NeverAnswers", "hung"),
    ],
)
def test_a_broken_worker_is_replaced_and_recorded(
    start: Open, audio: Audio, expected: Expected, monkeypatch: pytest.MonkeyPatch, name: str, cause: str
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot(name))
    samples = audio(4.0)
    pipeline = start(infer_deadline_s=4.0, heartbeat_s=3.0)
    for stop in (2 * SECOND, 4 * SECOND):
        pipeline.feed(stop - 2 * SECOND, samples[stop - 2 * SECOND : stop])
        pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["worker_lost", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"
    metrics = pipeline.metrics()
    lost = {name: value for name, value in metrics.items() if name.startswith("workers_lost")}
    assert lost == {"workers_lost_total": 1, f"workers_lost_{cause}": 1}, f"counted: {lost}"


def test_a_device_after_whose_error_nothing_works_costs_the_worker(
    start: Open, audio: Audio, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("LosesTheDevice"))
    samples = audio(2.0)
    pipeline = start()
    workers = _workers(pipeline)
    pipeline.feed(0, samples)
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["device_error", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"
    assert workers[0] not in _workers(pipeline), f"workers before {workers}, after {_workers(pipeline)}"


@pytest.mark.parametrize("woken", ["WakesUpToUnknownErrors", "WakesUpToLaunchFailures"])
def test_a_device_that_is_lost_to_a_worker_by_a_suspend_costs_the_worker_and_nothing_else(
    woken: str, start: Open, audio: Audio, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot(woken))
    samples = audio(4.0)
    pipeline = start()
    workers = _workers(pipeline)
    pipeline.feed(0, samples[: 2 * SECOND])
    pipeline.drain(60.0)
    assert not _kinds(pipeline), f"told before the sleep: {_kinds(pipeline)}"
    for worker in workers:
        worker.suspend()
    time.sleep(broken_workers.SLEEP_S + 1.0)
    for worker in workers:
        worker.resume()
    pipeline.feed(2 * SECOND, samples[2 * SECOND :])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["device_error", "restart_worker", "recovered"], f"told: {_kinds(pipeline)}"
    assert workers[0] not in _workers(pipeline), f"workers before {workers}, after {_workers(pipeline)}"


#: An error that another process would have too. There is no such device here: what is proved is what comes of it.
DEVICE_GONE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tests.meta import broken_workers

class DeviceGone(broken_workers._Broken):
    def _do(self, request):
        if request.meta["do"] == "infer":
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
        return super()._do(request)

broken_workers.run(DeviceGone)
"""


def test_a_device_that_is_gone_means_the_fallback_at_once(
    start: Open, audio: Audio, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def boot(*numbers: int) -> list[str]:
        arguments = protection.worker.boot(*numbers)
        if not started:
            arguments[arguments.index("-c") + 1] = DEVICE_GONE
        started.append(len(started))
        return arguments

    monkeypatch.setattr(protection.worker_process, "boot", boot)
    samples = audio(2.0)
    pipeline = start(pressure_interval_s=60.0)
    pipeline.feed(0, samples)
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _kinds(pipeline) == ["device_error", "cpu_fallback", "recovered"], f"told: {_kinds(pipeline)}"
    assert _where(pipeline) == {("cpu", True)}, f"answers were made on {_where(pipeline)}"
    metrics = pipeline.metrics()
    assert metrics["device_errors_total"] == 1 and len(started) == 2, f"{len(started)} workers; {dict(metrics)}"
    assert "workers_lost_total" not in metrics, f"the worker did not die, but was ended: {dict(metrics)}"


def test_the_user_is_told_why_there_was_no_memory(start: Open, bounded: Cpu, audio: Audio) -> None:
    pipeline = start()
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY)):
        pipeline.feed(0, audio(4.0))
        pipeline.drain(60.0)
    first = pipeline.events()[0].message
    assert first.startswith("the device ran out of memory: a limit refused (RuntimeFailure: "), f"told: {first}"


# Up the ladder.


def test_a_device_that_always_kills_its_worker_means_the_fallback_until_it_does_not(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(4.0)
    pipeline = start(restart_backoff_s=0.2)
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH, times=None)) as fault:
        pipeline.feed(0, samples[: 2 * SECOND])
        pipeline.drain(60.0)
        metrics, told = pipeline.metrics(), _kinds(pipeline)
        until(lambda: pipeline.metrics().get("returns_failed", 0) >= 1, "a return was tried and failed")
        pipeline.feed(2 * SECOND, samples[2 * SECOND : 3 * SECOND])
        pipeline.drain(60.0)
        record = fault.record()
    until(lambda: pipeline.device() == "cpu:arena", "it returned to the device")
    pipeline.feed(3 * SECOND, samples[3 * SECOND :])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    lost = ["worker_lost", "restart_worker"] * 2
    assert told == [*lost, "worker_lost", "cpu_fallback", "recovered"], f"told: {told}"
    assert _kinds(pipeline)[len(told) :] == ["returned_to_device"], f"told: {_kinds(pipeline)}"
    where = [(result.device, result.degraded) for result in pipeline.results()]
    assert where == [("cpu", True)] * 3 + [("cpu:arena", False)], f"answers were made on {where}"
    assert metrics["workers_lost_died"] == metrics["workers_lost_total"] == 3, f"the counts are {dict(metrics)}"
    assert record.faults_fired >= 4 and "chunks_set_aside" not in pipeline.metrics(), f"{record}"
    # Before the third worker and before the fallback it waited, the second time for longer.
    waited_s = metrics["recovery_latency_last_s"]
    assert waited_s >= 0.2 + 0.4, f"the recovery took {waited_s:.2f} s"


def test_without_the_restart_a_lost_worker_means_the_fallback(start: Open, bounded: Cpu, audio: Audio) -> None:
    pipeline = start(rungs=tuple(rung for rung in RUNGS if rung != "restart_worker"), pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH)):
        pipeline.feed(0, audio(2.0))
        pipeline.drain(60.0)
    assert _kinds(pipeline) == ["worker_lost", "cpu_fallback", "recovered"], f"told: {_kinds(pipeline)}"


def test_workers_that_all_die_end_in_an_orderly_shutdown_and_nothing_is_lost(
    start: Open, audio: Audio, expected: Expected
) -> None:
    samples = audio(3.4)
    pipeline = start(restart_backoff_s=0.001)
    over = threading.Event()
    killed: set[int] = set()

    def kill() -> None:
        while not over.is_set():
            for process_id in pipeline.process_ids()[1:]:
                killed.add(process_id)
                with suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            over.wait(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        until(lambda: bool(killed), "the first is killed")
        pipeline.feed(0, samples)
        with pytest.raises(PipelineClosed, match="no rung of the ladder helped"):
            pipeline.drain(60.0)
    finally:
        over.set()
        killer.join()
    kinds = _kinds(pipeline)
    rungs = [kind for kind in kinds if kind in RUNGS]
    assert rungs[-1] == kinds[-1] == "emergency_shutdown" and "cpu_fallback" in rungs, f"told: {kinds}"
    assert len(rungs) - 1 <= Policy().max_attempts, f"{len(rungs) - 1} attempts, at most {Policy().max_attempts}"
    assert 3 < len(killed) <= Policy().max_attempts + 1, f"{len(killed)} workers were killed"
    assert not pipeline.results(), f"answered or set aside: {pipeline.results()}"
    assert np.array_equal(pipeline.recovered(), samples), "accepted audio is missing"
    metrics = pipeline.metrics()
    assert metrics["workers_lost_total"] >= len(killed) - 1, f"{len(killed)} were killed, counted: {dict(metrics)}"
    pipeline.close()
    with start() as after:
        after.drain(60.0)
        _same(after.results(), expected(samples))


def test_a_chunk_that_kills_its_workers_is_set_aside_and_its_neighbours_are_answered(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(6.0) * np.float32(0.1)
    # A tone at full scale, far enough from the chunk's end not to be in the context of the next.
    at = 2 * SECOND + np.arange(SECOND // 10, SECOND * 4 // 10)
    samples[at] = np.sin(2 * np.pi * 1000 * at / SECOND)
    pipeline = start(restart_backoff_s=0.01)
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH, times=None, input_above=8.8)) as fault:
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        record = fault.record()
    _same(pipeline.results(), expected(samples), but=[2])
    told = [event for event in pipeline.events() if event.kind.value == "chunk_set_aside"]
    assert len(told) == 1 and "samples [32000, 48000) failed 4 times" in told[0].message, f"told: {told}"
    assert "was killed by SIGFPE" in told[0].message, f"the message is {told[0].message!r}"
    assert pipeline.metrics()["chunks_set_aside"] == 1, f"the counts are {dict(pipeline.metrics())}"
    # With its neighbours once, then alone on the device, and at last on the fallback.
    assert record.faults_fired <= 5, f"it killed {record.faults_fired} workers: {record}"
    assert np.array_equal(pipeline.recovered(), samples), "the audio of the chunk is not kept"


def test_a_chunk_that_the_device_dies_of_three_times_is_answered_by_the_fallback(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(1.0)
    pipeline = start(restart_backoff_s=0.01, pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH, times=3)) as fault:
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        record = fault.record()
    _same(pipeline.results(), expected(samples))
    assert record.faults_fired == 3 and _where(pipeline) == {("cpu", True)}, f"{record}; on {_where(pipeline)}"


def test_a_device_whose_worker_died_unasked_is_returned_to(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(2.0)
    pipeline = start()
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        pipeline.feed(0, samples[:SECOND])
        pipeline.drain(60.0)
        (device, _) = _workers(pipeline)
        device.kill()
    until(lambda: "returned_to_device" in _kinds(pipeline), "it is back on the device")
    pipeline.feed(SECOND, samples[SECOND:])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert pipeline.results()[-1].device == "cpu:arena", f"the last answer was made on {pipeline.results()[-1].device}"


def test_a_worker_that_cannot_load_again_means_the_fallback_and_no_emergency(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(1.0)
    pipeline = start(restart_backoff_s=0.01, pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.HOST_MEMORY, min_bytes=256_000)) as fault:
        _workers(pipeline)[0].kill()
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        record = fault.record()
    _same(pipeline.results(), expected(samples))
    assert record.faults_fired == 1, f"the record is {record}"
    assert _where(pipeline) == {("cpu", True)} and "emergency_shutdown" not in _kinds(pipeline), f"{_kinds(pipeline)}"


def test_a_pipeline_whose_thread_cannot_be_started_leaves_nothing(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    really = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "plimsoll-pressure":
            raise RuntimeError("can't start new thread")
        really(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        start()
    monkeypatch.undo()
    # The spool is free again, and no process is left.
    start()


def test_a_device_that_misses_a_library_for_ever_means_the_fallback_and_nothing_is_set_aside(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(4.0)
    pipeline = start(restart_backoff_s=0.01, pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.LIBRARY_MISSING, times=None)) as fault:
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
        record = fault.record()
    _same(pipeline.results(), expected(samples))
    assert record.faults_fired >= 3 and _where(pipeline) == {("cpu", True)}, f"{record}; on {_where(pipeline)}"
    assert "cpu_fallback" in _kinds(pipeline) and "chunk_set_aside" not in _kinds(pipeline), f"{_kinds(pipeline)}"


# Memory, where the model runs in another process.


def test_the_first_rungs_reach_the_worker(start: Open, bounded: Cpu, audio: Audio, expected: Expected) -> None:
    samples = audio(32.0)
    pipeline = start(pressure_interval_s=60.0)
    workers, told = _workers(pipeline), 0
    for turn, (site, rung) in enumerate(((Site.DEVICE_CACHE, "cache_clear"), (Site.DEVICE_GARBAGE, "garbage_collect"))):
        with bounded.arm(FaultPlan(site)) as fault:
            pipeline.feed(16 * turn * SECOND, samples[16 * turn * SECOND :][: 16 * SECOND])
            pipeline.drain(60.0)
            record = fault.record()
        kinds = _kinds(pipeline)[told:]
        assert record.faults_fired >= 1 and kinds[-2:] == [rung, "recovered"], f"{site}: {record}, told: {kinds}"
        told += len(kinds)
    _same(pipeline.results(), expected(samples))
    assert _workers(pipeline) == workers, "the worker was replaced"


def test_a_full_device_is_left_after_everything_else_was_tried_once(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(16.0)
    pipeline = start(pressure_interval_s=60.0)
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    rungs = [kind for kind in _kinds(pipeline) if kind in RUNGS]
    first = ["cache_clear", "garbage_collect", *["reduce_buffer"] * 4]
    assert rungs == [*first, "restart_worker", "cpu_fallback"], f"the rungs were {rungs}"


def test_a_device_that_is_full_at_the_start_means_the_fallback_until_it_is_not(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(2.0)
    held = ballast.fill(bounded.allocate)
    pipeline = start()
    pipeline.feed(0, samples[:SECOND])
    pipeline.drain(60.0)
    told = _kinds(pipeline)
    ballast.free(held)
    until(lambda: pipeline.device() == "cpu:arena", "it goes to the device once there is memory")
    pipeline.feed(SECOND, samples[SECOND:])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert told == ["oom_detected", "cpu_fallback"], f"told at the start: {told}"


# Choices of the policy.


def test_a_standby_is_there_before_it_is_needed_and_after_the_return(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(4.0)
    pipeline = start(standby=True, restart_backoff_s=0.01)
    _, standby = _workers(pipeline)
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH, times=3)):
        pipeline.feed(0, samples[: 2 * SECOND])
        pipeline.drain(60.0)
    degraded = {result.device for result in pipeline.results()}
    there = standby in _workers(pipeline)
    until(lambda: pipeline.device() == "cpu:arena", "it returned to the device")
    pipeline.feed(2 * SECOND, samples[2 * SECOND :])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert degraded == {"cpu"} and there, f"answers on {degraded}, by the standby: {there}"
    assert standby in _workers(pipeline) and len(_workers(pipeline)) == 2, f"workers: {_workers(pipeline)}"


def test_an_idle_pipeline_gives_the_memory_of_its_workers_back_for_real(
    start: Open, audio: Audio, expected: Expected
) -> None:
    samples = audio(2.0)
    pipeline = start(unload_after_idle_s=0.2, pressure_interval_s=0.02)
    pipeline.feed(0, samples[:SECOND])
    pipeline.drain(60.0)
    until(lambda: not psutil.Process().children(), "the worker's process is gone")
    for _ in range(5):
        # Idle, it stays so.
        threading.Event().wait(0.05)
        assert pipeline.process_ids() == [os.getpid()], f"processes {pipeline.process_ids()}"
    pipeline.feed(SECOND, samples[SECOND:])
    pipeline.drain(60.0)
    _same(pipeline.results(), expected(samples))
    assert _where(pipeline) == {("cpu:arena", False)} and _kinds(pipeline) == [], f"told: {_kinds(pipeline)}"
    assert pipeline.metrics()["unloads"] >= 1, f"the counts are {dict(pipeline.metrics())}"


def test_an_embedder_can_have_one_process(start: Open, bounded: Cpu, audio: Audio, expected: Expected) -> None:
    samples = audio(4.0)
    pipeline = start(engine="in_process")
    with bounded.arm(FaultPlan(Site.DEVICE_CACHE)):
        pipeline.feed(0, samples)
        pipeline.drain(60.0)
    children = psutil.Process().children()
    assert pipeline.process_ids() == [os.getpid()] and not children, f"{pipeline.process_ids()}, {children}"
    _same(pipeline.results(), expected(samples))
    assert "restart_worker" not in _kinds(pipeline), f"told: {_kinds(pipeline)}"


def test_the_worker_is_the_default() -> None:
    assert Policy().engine == "worker", f"it is {Policy().engine}"


# The end.


def test_a_worker_that_does_not_answer_does_not_hold_up_the_shutdown(
    start: Open, bounded: Cpu, audio: Audio, expected: Expected
) -> None:
    samples = audio(2.0)
    pipeline = start(infer_deadline_s=1000.0, shutdown_deadline_s=0.5)
    (worker,) = _workers(pipeline)
    with bounded.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:
        pipeline.feed(0, samples)
        until(lambda: fault.record().faults_fired == 1, "the runtime hangs")
        began_s = time.monotonic()
        pipeline.shutdown("a test")
        took_s = time.monotonic() - began_s
        pipeline.close()
    until(lambda: not worker.is_running(), "the worker is gone")
    # It waits as long as the policy says, and then no longer.
    assert took_s < 20.0, f"a shutdown within 0.5 s took {took_s:.1f} s"
    with start() as after:
        after.drain(60.0)
        _same(after.results(), expected(samples))


def test_a_pipeline_leaves_no_thread_and_no_process_behind(start: Open, audio: Audio) -> None:
    before = set(threading.enumerate())
    for k in range(2):
        with start(str(k), standby=bool(k)) as pipeline:
            pipeline.feed(0, audio(0.5))
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not left, f"threads left behind: {left}"
    assert not psutil.Process().children(), f"processes left behind: {psutil.Process().children()}"
