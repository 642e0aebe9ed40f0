"""The host survives its worker, the worker ends with its host, and what is answered is right or not answered at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import pytest

import protection.template
import protection.worker
import protection.worker_engine
import protection.worker_process
from backends.contract import Backend, BackendError, FaultPlan, FaultRecord, ModelError, Site
from backends.cpu import Cpu
from backends.errors import ErrorKind, RuntimeFailure, Shortage, classify
from backends.faults import ballast
from backends.model import DEFAULT_MODEL
from backends.process import NO_ACCELERATOR
from protection.channel import Channel
from protection.engine import EngineError, InProcessEngine
from protection.worker_engine import WorkerEngine
from protection.worker_process import Deadlines, WorkerLost
from tests.meta import broken_workers
from tests.unit.descriptors import changes_since, open_descriptors
from tests.unit.waiting import until

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


class Start(Protocol):
    """Starts an engine that is closed when the test ends; other arguments are deadlines in seconds."""

    def __call__(
        self,
        backend: Backend | None = None,
        model: Path = DEFAULT_MODEL,
        *,
        standby: bool = False,
        fork_workers: bool | None = None,
        **deadlines: float,
    ) -> WorkerEngine: ...


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    # The shared engine's are there before, and after.
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="module")
def _kept() -> Iterator[tuple[WorkerEngine, Cpu]]:
    device = Cpu()
    device.limit_memory(96 * MIB)
    with pytest.MonkeyPatch.context() as patched:
        for name in NO_ACCELERATOR:
            patched.setenv(name, "0")
        engine = WorkerEngine(device, DEFAULT_MODEL, standby=True)
        # So the standby runs as well.
        engine.fall_back()
        engine.return_to_device()
    yield engine, device
    engine.close()
    device.close()


@pytest.fixture
def shared(_kept: tuple[WorkerEngine, Cpu]) -> Iterator[WorkerEngine]:
    """Give an engine with a standby, for tests that leave its two workers as they found them."""
    engine, device = _kept
    before = engine.process_ids()
    yield engine
    if engine.degraded:
        engine.return_to_device()
    device.release_cached()
    assert engine.process_ids() == before, f"processes before {before}, after {engine.process_ids()}"


@pytest.fixture
def handle(_kept: tuple[WorkerEngine, Cpu]) -> Cpu:
    """Give the backend whose device the shared engine's worker has."""
    return _kept[1]


@pytest.fixture
def start(bounded: Cpu) -> Iterator[Start]:
    with ExitStack() as opened:

        def make(
            backend: Backend | None = None,
            model: Path = DEFAULT_MODEL,
            *,
            standby: bool = False,
            fork_workers: bool | None = None,
            **deadlines: float,
        ) -> WorkerEngine:
            engine = WorkerEngine(
                *(backend or bounded, model),
                deadlines=Deadlines(**deadlines),
                standby=standby,
                fork_workers=fork_workers,
            )
            opened.callback(engine.close)
            return engine

        yield make


def _features(batch: int = 4) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


@functools.cache
def _expected(batch: int = 4) -> Any:
    """Compute in this process, without a limit."""
    backend = Cpu()
    engine = InProcessEngine(backend, DEFAULT_MODEL, owns_backend=True)
    scores = engine.infer(_features(batch))
    engine.close()
    return scores


def _workers(engine: WorkerEngine) -> list[psutil.Process]:
    """Give the workers: the device's first."""
    host, *workers = engine.process_ids()
    assert host == os.getpid(), f"the first process is {host}: expected this one, {os.getpid()}"
    return [psutil.Process(process_id) for process_id in workers]


def _gone(process: psutil.Process) -> bool:
    """Whether it has ended. An orphan may stay as a zombie where nobody reaps it: its memory is gone."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_right(engine: WorkerEngine, batch: int = 4) -> bool:
    return np.array_equal(engine.infer(_features(batch)), _expected(batch))


def _is_lost(engine: WorkerEngine) -> bool:
    return engine.lost


# What it answers, and where.


def test_its_answers_are_those_of_the_engine_in_this_process(shared: WorkerEngine, bounded: Cpu) -> None:
    within = InProcessEngine(bounded, DEFAULT_MODEL)
    expected = [within.infer(_features(batch)) for batch in (1, 3, 16)]
    within.close()
    for move in (None, shared.fall_back):
        if move is not None:
            move()
        for scores in expected:
            found = shared.infer(_features(len(scores)))
            assert found.shape == scores.shape and found.dtype == scores.dtype, f"they are {found.dtype} {found.shape}"
            assert found.tobytes() == scores.tobytes(), f"of {len(scores)} chunks on {shared.device} the scores differ"


def test_it_says_what_it_is(shared: WorkerEngine) -> None:
    assert (shared.device, shared.degraded, shared.lost) == ("cpu:arena", False, False), f"{shared.device}"
    assert (shared.spec.context_frames, shared.spec.chunk_frames) == (50, 100), f"the windows are {shared.spec}"
    assert shared.can_restart, "it says that it cannot be restarted"
    parents = [worker.ppid() for worker in _workers(shared)]
    assert parents == [os.getpid()] * 2, f"the workers' parents are {parents}, this is {os.getpid()}"


@pytest.mark.parametrize("shape", [(2, 150, 79), (150, 80), (0, 150, 80)], ids=str)
def test_what_is_no_window_is_refused_by_the_model_and_the_worker_goes_on(
    shared: WorkerEngine, shape: tuple[int, ...]
) -> None:
    before = shared.process_ids()
    with pytest.raises(ModelError, match=r"expected float32 \[batch, 150, 80\]"):
        shared.infer(np.zeros(shape, np.float32))
    assert _is_right(shared) and shared.process_ids() == before, "the worker was replaced"


def test_what_is_not_contiguous_or_not_float32_is_taken_as_it_reads(shared: WorkerEngine) -> None:
    wide: Any = np.repeat(_features(), 2, axis=2).astype(np.float64)
    assert np.array_equal(shared.infer(wide[:, :, ::2]), _expected()), "the scores differ"


# Beginning.


@pytest.mark.parametrize("found", ["nothing", "garbage"])
def test_a_model_that_cannot_be_used_is_an_error_at_once(start: Start, tmp_path: Path, found: str) -> None:
    path = tmp_path / "model.onnx"
    if found == "garbage":
        path.write_bytes(b"no model" * 100)
    before = open_descriptors()
    with pytest.raises(ModelError, match="there is no model file" if found == "nothing" else "does not load"):
        start(model=path)
    assert not (changes := changes_since(before)), changes


def test_a_worker_that_ends_while_it_starts_is_replaced_and_then_the_fallback_takes_over(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = protection.worker.boot
    for ends, where in ((1, "cpu:arena"), (2, "cpu")):
        started: list[int] = []

        def boot(*numbers: int, ends: int = ends, started: list[int] = started) -> list[str]:
            started.append(len(started))
            return ["-c", "raise SystemExit(9)"] if len(started) <= ends else sound(*numbers)

        monkeypatch.setattr(protection.worker_process, "boot", boot)
        engine = start()
        assert engine.device == where and _is_right(engine), f"after {ends} that ended it is on {engine.device}"
        assert len(started) == ends + 1, f"{len(started)} workers were started, {ends} of them ended"


def test_workers_that_all_end_while_they_start_are_an_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('no libraries today', file=sys.stderr); sys.exit(9)"
    monkeypatch.setattr(protection.worker_process, "boot", lambda *_: ["-c", program])
    before = open_descriptors()
    with pytest.raises(WorkerLost, match="ended with status 9; it said: no libraries today"):
        start()
    assert not (changes := changes_since(before)), changes


def test_a_load_without_host_memory_is_tried_again_where_there_is_some(start: Start, bounded: Cpu) -> None:
    engine = start()
    with bounded.arm(FaultPlan(Site.HOST_MEMORY, min_bytes=1 << 20)) as fault:
        with pytest.raises(RuntimeFailure) as caught:
            engine.restart()
        record = fault.record()
    assert caught.value.kind is ErrorKind.HOST_OOM and record.faults_fired == 1, f"{caught.value}; {record}"
    assert caught.value.shortage is None, f"a bare MemoryError does not tell why: {caught.value.shortage}"
    (worker,) = _workers(engine)
    assert _is_right(engine) and _workers(engine) == [worker], f"workers: {worker}, then {_workers(engine)}"


def test_a_worker_outlives_the_thread_that_asked_for_it(start: Start) -> None:
    with ThreadPoolExecutor(1) as passing:
        engine = passing.submit(start).result(60.0)
        first = _workers(engine)
        passing.submit(engine.restart).result(60.0)
    second = _workers(engine)
    # The kernel ends a worker with the thread that started it: that one lasts.
    assert _is_right(engine) and _workers(engine) == second != first, f"{first}, {second}, {_workers(engine)}"


def test_a_worker_that_cannot_be_started_leaves_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    before, threads = open_descriptors(), set(threading.enumerate())
    with pytest.raises(WorkerLost, match="/nowhere/python") as caught:
        start()
    assert caught.value.cause == "did not start" and caught.value.at_start, f"cause {caught.value.cause}"
    assert not (changes := changes_since(before)), changes
    assert set(threading.enumerate()) == threads, f"threads left: {set(threading.enumerate()) - threads}"


def test_a_host_without_descriptors_cannot_start_a_worker_and_leaves_none(start: Start) -> None:
    before = open_descriptors()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    refused = []
    for most in range(lowest, lowest + 60):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limit[1]))
        try:
            start().close()
            break
        except OSError as error:
            refused.append(error.errno)
        except WorkerLost as lost:
            refused.append(lost.__cause__.errno if isinstance(lost.__cause__, OSError) else -1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert not (changes := changes_since(before)), f"{changes}, at most {most}"
    assert set(refused) == {errno.EMFILE} and 5 < len(refused) < 60, f"so many starts were refused: {len(refused)}"


def test_a_device_that_is_full_at_the_start_means_the_fallback(start: Start, bounded: Cpu) -> None:
    held = ballast.fill(bounded.allocate)
    engine = start()
    assert (engine.device, engine.degraded) == ("cpu", True), f"{engine.device}, degraded {engine.degraded}"
    assert (engine.spec.context_frames, engine.spec.chunk_frames) == (50, 100), f"the windows are {engine.spec}"
    assert _is_right(engine), "the fallback's scores differ"
    assert not engine.return_to_device(), "it returned to a full device"
    ballast.free(held)
    assert engine.return_to_device() and _is_right(engine), "it did not return to a device that has memory again"


# What kind of process a worker is.


def test_a_worker_is_the_first_to_go_and_leaves_no_core(shared: WorkerEngine) -> None:
    for worker in _workers(shared):
        score = int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text())
        assert score == 1000, f"oom_score_adj is {score}"
        limits = Path(f"/proc/{worker.pid}/limits").read_text()
        (core,) = [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core file size")]
        # A limit of 1 keeps a pipe from having it, too; 0 where it was 0 for good.
        assert core in (["1", "1"], ["0", "0"]), f"core dumps are limited to {core}"
        assert os.getsid(worker.pid) == worker.pid, "it is in another session than its own"


def test_only_the_fallback_is_blind_to_accelerators(shared: WorkerEngine) -> None:
    # The shared engine was started where each of them says 0.
    device, fallback = (worker.environ() for worker in _workers(shared))
    assert {name: device.get(name) for name in NO_ACCELERATOR} == dict.fromkeys(NO_ACCELERATOR, "0"), "the device's"
    assert {name: fallback.get(name) for name in NO_ACCELERATOR} == dict.fromkeys(NO_ACCELERATOR, ""), "the fallback's"


def test_a_worker_has_no_descriptor_of_its_hosts(shared: WorkerEngine, tmp_path: Path) -> None:
    with (tmp_path / "audio").open("wb"):
        worker = psutil.Process(shared.process_ids()[1])
        opened = [str(path.readlink()) for path in Path(f"/proc/{worker.pid}/fd").iterdir()]
    assert not any(str(tmp_path) in name for name in opened), f"the worker has {opened}"
    sockets = [name for name in opened if name.startswith("socket:")]
    assert len(sockets) == 2, f"the worker has {len(sockets)} sockets: one for work, one beside it"


def test_what_a_worker_says_is_bounded_and_never_on_the_hosts_output(
    start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("TalksALot"))
    engine = start()
    worker = engine._device
    assert worker is not None, "there is no worker"
    sizes = []
    for _ in range(4):
        assert _is_right(engine), "the scores differ"
        sizes.append(os.fstat(worker._stderr).st_blocks * 512)
    output, errors = capfd.readouterr()
    # It says some 8 MB with each answer.
    assert max(sizes) <= 16 * MIB, f"after each answer {sizes} bytes were kept of what it said"
    assert (output, errors) == ("", ""), f"{len(output)} and {len(errors)} characters reached the host's"


def test_the_last_words_of_a_worker_are_in_the_error(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("TalksAndDies", "TalksAndDies"))
    engine = start()
    for move in (None, engine.fall_back):
        if move is not None:
            move()
        with pytest.raises(WorkerLost) as caught:
            engine.infer(_features())
        text = str(caught.value)
        told = "was killed by SIGABRT; it said: " in text and text.endswith("the mast went overboard")
        assert told, f"on {engine.device} it is {text!r}"
        assert len(text) < 1000, f"of some 4 MB {len(text)} characters are in the error"


# A worker that dies.


def test_a_worker_that_is_killed_is_named_and_replaced(start: Start) -> None:
    engine = start()
    for name in ("SIGKILL", "SIGSEGV", "SIGABRT"):
        (worker,) = _workers(engine)
        worker.send_signal(signal.Signals[name])
        with pytest.raises(WorkerLost, match=f"worker {worker.pid} was killed by {name}") as caught:
            engine.infer(_features())
        assert (caught.value.cause, classify(caught.value)) == ("died", ErrorKind.PROCESS_LOST), f"{caught.value!r}"
        assert _is_lost(engine) and not _workers(engine), f"lost {engine.lost}, workers {_workers(engine)}"
        engine.restart()
        assert _is_right(engine) and not _is_lost(engine), "after a restart it is lost, or the scores differ"


def test_a_worker_that_dies_idle_is_missed_at_once_and_told_at_the_next_inference(start: Start) -> None:
    engine = start()
    engine.infer(_features())
    (worker,) = _workers(engine)
    worker.kill()
    until(lambda: list(engine.process_ids()) == [os.getpid()], "its id is no longer given")
    assert not worker.is_running(), "it was not reaped"
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
        engine.infer(_features())
    assert _is_right(engine) and len(_workers(engine)) == 1, "the next inference starts no other, or not one"


def test_each_of_two_workers_can_die_and_is_replaced_by_its_own_kind(start: Start) -> None:
    engine = start()
    _workers(engine)[0].kill()
    # That the device's is dead does not keep the fallback from taking over.
    engine.fall_back()
    assert engine.degraded and not _is_lost(engine) and _is_right(engine), f"{engine.device}, lost {engine.lost}"
    (fallback,) = _workers(engine)
    fallback.kill()
    with pytest.raises(WorkerLost, match=f"worker {fallback.pid} was killed by SIGKILL"):
        engine.infer(_features())
    engine.restart()
    assert engine.device == "cpu" and not _is_lost(engine) and _is_right(engine), f"on {engine.device}"
    assert engine.return_to_device() and _is_right(engine), "it did not return to a device that a new worker has"


def test_a_crash_of_the_runtime_is_survived_and_counted(start: Start, bounded: Cpu) -> None:
    engine = start()
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH, nth=2)) as fault:
        engine.infer(_features())
        with pytest.raises(WorkerLost, match="was killed by SIGFPE") as caught:
            engine.infer(_features())
        assert caught.value.cause == "died", f"the cause is {caught.value.cause}"
        engine.restart()
        assert _is_right(engine), "after a restart the scores differ"
        record = fault.record()
    assert (record.points_seen, record.faults_fired, record.absorbed) == (3, 1, 0), f"the record is {record}"


def test_a_hang_of_the_runtime_is_detected_and_ended(start: Start, bounded: Cpu) -> None:
    # The deadline comes after the heartbeat: the process gives signs of life while the runtime gives none.
    engine = start(infer_s=4.0, heartbeat_s=3.0)
    (worker,) = _workers(engine)
    with bounded.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:
        with pytest.raises(WorkerLost, match="hung: no answer within 4 s") as caught:
            engine.infer(_features())
        assert caught.value.cause == "hung" and _gone(worker), f"{caught.value.cause}; {worker}"
        record = fault.record()
    assert (record.points_seen, record.faults_fired) == (1, 1), f"the record is {record}"


def test_a_worker_that_is_stopped_for_a_moment_is_waited_for(shared: WorkerEngine) -> None:
    worker = _workers(shared)[0]
    worker.suspend()
    until(lambda: worker.status() == psutil.STATUS_STOPPED, "it is stopped")
    with ThreadPoolExecutor(1) as other:
        inferring = other.submit(shared.infer, _features())
        threading.Event().wait(0.8)
        assert not inferring.done(), "a stopped worker answered"
        worker.resume()
        scores = inferring.result(60.0)
    assert np.array_equal(scores, _expected()), "the scores differ"
    assert _workers(shared)[0] == worker and not shared.lost, f"it was replaced: {_workers(shared)}"


def test_a_worker_that_gives_no_sign_of_life_is_ended(start: Start) -> None:
    engine = start(heartbeat_s=3.0, infer_s=60.0)
    (worker,) = _workers(engine)
    worker.suspend()
    with pytest.raises(WorkerLost, match="hung: no sign of life for 3 s") as caught:
        engine.infer(_features())
    assert caught.value.cause == "hung" and _gone(worker), f"{caught.value.cause}; {worker}"
    assert _is_right(engine), "the scores of the next worker differ"


def test_whoever_waits_can_be_told_to_stop_from_another_thread(start: Start, bounded: Cpu) -> None:
    engine = start(infer_s=100.0)
    with bounded.arm(FaultPlan(Site.RUNTIME_HANG)) as fault, ThreadPoolExecutor(1) as other:
        inferring = other.submit(engine.infer, _features())
        until(lambda: fault.record().faults_fired == 1, "the runtime hangs")
        engine.cancel()
        with pytest.raises(WorkerLost):
            inferring.result(60.0)
    assert engine.lost and not _workers(engine), f"lost {engine.lost}, workers {_workers(engine)}"


def test_an_interrupt_of_the_wait_does_not_spoil_the_next_answer(start: Start, bounded: Cpu) -> None:
    engine = start(infer_s=100.0)
    with bounded.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:

        def interrupt() -> None:
            until(lambda: fault.record().faults_fired == 1, "the runtime hangs")
            os.kill(os.getpid(), signal.SIGINT)

        other = threading.Thread(target=interrupt)
        other.start()
        with pytest.raises(KeyboardInterrupt):
            engine.infer(_features())
        other.join()
    assert _is_right(engine), "the next scores differ"


def test_what_a_host_without_memory_did_not_read_does_not_spoil_the_next_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    receive = Channel._exactly
    refused: list[int] = []

    def without_memory(self: Channel, size: int, *rest: Any, **named: Any) -> bytearray:
        # The scores: what comes before them is smaller.
        if size > 10_000 and not refused:
            refused.append(size)
            raise MemoryError
        return receive(self, size, *rest, **named)

    monkeypatch.setattr(Channel, "_exactly", without_memory)
    with pytest.raises(MemoryError):
        engine.infer(_features())
    assert refused and _is_right(engine), f"refused: {refused}; the next scores differ"


# A worker that is broken.


#: What is broken, the cause that is told, and what the error says.
BROKEN = [
    ("AnswersAnother", "broke the protocol", "an answer to request 1003 came, 3 was asked"),
    ("AnswersInPart", "broke the protocol", "scores of shape [3, 50, 32] came for 4 chunks"),
    ("AnswersWithoutShape", "broke the protocol", "scores without their shape came"),
    ("AnswersWithARequest", "broke the protocol", "a REQUEST came for an answer"),
    ("FailsWithoutReason", "broke the protocol", "a failure without its reason came"),
    ("SpeaksGarbage", "broke the protocol", "a message begins with"),
    ("FlipsABit", "broke the protocol", "does not match its checksum"),
    ("HangsUp", "broke the protocol", "it closed its connection and lived on"),
    ("EndsInTheMiddle", "died", "ended with status 3"),
    ("HangsInTheMiddle", "hung", "no sign of life for 3 s"),
]


def test_a_broken_worker_is_told_by_what_it_did_and_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _, _ in BROKEN]
    # One after the other, and then a sound one.
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot(*names))
    engine = start(heartbeat_s=3.0)
    for name, cause, text in BROKEN:
        (worker,) = _workers(engine)
        with pytest.raises(WorkerLost) as caught:
            engine.infer(_features())
        found = caught.value
        assert found.cause == cause and text in str(found), f"{name}: {found.cause}: {found}"
        assert _is_lost(engine) and _gone(worker), f"{name}: lost {engine.lost}; {worker}"
        engine.restart()
    assert _is_right(engine), "the scores of the sound one differ"


def test_a_worker_that_answers_twice_is_not_believed_a_second_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("AnswersTwice"))
    engine = start()
    assert np.array_equal(engine.infer(_features(2)), _expected(2)), "the first answer is wrong"
    with pytest.raises(WorkerLost, match="it answered twice") as caught:
        engine.infer(_features())
    assert caught.value.cause == "broke the protocol", f"the cause is {caught.value.cause}"


def test_a_worker_that_garbles_its_readings_is_replaced_at_the_next_inference(
    start: Start, bounded: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("GarblesTheDevice"))
    engine = start()
    bounded.memory()
    engine.infer(_features())
    with pytest.raises(ConnectionError, match="a message begins with"):
        bounded.memory()
    with pytest.raises(WorkerLost, match="a message begins with") as caught:
        engine.infer(_features())
    assert caught.value.cause == "broke the protocol", f"the cause is {caught.value.cause}"
    assert _is_right(engine) and bounded.memory().used_bytes > 0, "the next worker is not right"


def test_an_error_after_which_nothing_works_costs_the_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("LosesTheDevice"))
    engine = start()
    (worker,) = _workers(engine)
    with pytest.raises(RuntimeFailure, match="an illegal memory access was encountered") as caught:
        engine.infer(_features())
    assert caught.value.kind is ErrorKind.DEVICE_STICKY, f"it is {caught.value.kind}"
    assert engine.lost and _gone(worker), f"lost {engine.lost}; {worker}"


def test_a_worker_that_cannot_be_asked_any_more_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot("StopsListening"))
    engine = start()
    engine.infer(_features())
    (worker,) = _workers(engine)
    until(lambda: _gone(worker), "a worker that lost one of its threads ends")
    with pytest.raises(WorkerLost, match=r"ended with status 70; it said: .*MemoryError") as caught:
        engine.infer(_features())
    assert caught.value.cause == "died", f"the cause is {caught.value.cause}"


# Errors that are none of the process's.


def test_an_error_of_the_runtime_costs_no_process(shared: WorkerEngine, handle: Cpu) -> None:
    before = shared.process_ids()
    with handle.arm(FaultPlan(Site.LIBRARY_MISSING)) as fault:
        with pytest.raises(RuntimeFailure, match="libplimsoll-that-is-missing") as caught:
            shared.infer(_features())
        record = fault.record()
    assert caught.value.kind is ErrorKind.OTHER and not shared.lost, f"{caught.value.kind}, lost {shared.lost}"
    assert record.faults_fired == 1, f"the record is {record}"
    assert _is_right(shared) and shared.process_ids() == before, "the worker was replaced"


def test_a_full_device_is_told_as_the_runtime_tells_it(shared: WorkerEngine, handle: Cpu) -> None:
    before = shared.process_ids()
    with handle.arm(FaultPlan(Site.DEVICE_MEMORY)) as fault:
        with pytest.raises(RuntimeFailure, match="Available memory of") as caught:
            shared.infer(_features(16))
        record = fault.record()
    assert caught.value.kind is ErrorKind.DEVICE_OOM and not shared.lost, f"{caught.value.kind}, lost {shared.lost}"
    assert caught.value.shortage is Shortage.CAPPED, f"why it was refused: {caught.value.shortage}"
    assert (record.points_seen, record.faults_fired) == (1, 1), f"the record is {record}"
    shared.release_cached()
    assert _is_right(shared, 16) and shared.process_ids() == before, "the worker was replaced"


def test_garbage_is_collected_where_the_model_runs(shared: WorkerEngine, handle: Cpu) -> None:
    with handle.arm(FaultPlan(Site.DEVICE_GARBAGE)):
        with pytest.raises(RuntimeFailure, match="Available memory of"):
            shared.infer(_features(16))
        held = handle.memory().used_bytes
        shared.collect()
        left = handle.memory().used_bytes
    assert held > 64 * MIB > left, f"{held} bytes in use before collecting, {left} after"


# The fallback, and back.


def test_falling_back_leaves_the_device_empty(shared: WorkerEngine, handle: Cpu) -> None:
    shared.infer(_features(16))
    during = shared.device_memory().used_bytes
    shared.fall_back()
    after = shared.device_memory().used_bytes
    handle.allocate(95 * MIB).free()
    assert during > 30 * MIB and after == 0, f"in use on the device: {during} bytes before, {after} after"


def test_falling_back_twice_is_one_fallback(shared: WorkerEngine) -> None:
    shared.fall_back()
    before = shared.process_ids()
    shared.fall_back()
    assert shared.process_ids() == before and _is_right(shared), f"workers {before}, then {shared.process_ids()}"


def test_it_returns_to_a_healthy_device_only(shared: WorkerEngine, handle: Cpu) -> None:
    assert not shared.return_to_device(), "it returned without having left"
    shared.fall_back()
    held = ballast.fill(handle.allocate)
    assert not shared.return_to_device(), "it returned to a full device"
    assert shared.device == "cpu" and _is_right(shared), f"after a return that failed it is on {shared.device}"
    ballast.free(held)
    assert shared.return_to_device(), "it did not return to a device that is healthy again"
    assert (shared.device, shared.degraded) == ("cpu:arena", False), f"{shared.device}, degraded {shared.degraded}"
    assert _is_right(shared), "the scores differ"


def test_a_return_without_room_for_the_model_leaves_the_fallback_in_use(shared: WorkerEngine, handle: Cpu) -> None:
    shared.fall_back()
    # Enough for the health probe, too little for the weights.
    held = ballast.leave(ballast.fill(handle.allocate, (MIB, 64 << 10)), 2 * MIB + 1)
    assert handle.healthy().ok, "the probe does not fit"
    with pytest.raises(RuntimeFailure, match="Available memory of") as caught:
        shared.return_to_device()
    ballast.free(held)
    assert caught.value.kind.is_oom and shared.degraded and _is_right(shared), f"{caught.value.kind}: {shared.device}"


def test_a_return_that_kills_the_worker_leaves_the_fallback_in_use(start: Start, bounded: Cpu) -> None:
    engine = start()
    engine.fall_back()
    with bounded.arm(FaultPlan(Site.RUNTIME_CRASH)), pytest.raises(WorkerLost, match="SIGFPE"):
        engine.return_to_device()
    assert engine.degraded and not engine.lost and _is_right(engine), f"{engine.device}, lost {engine.lost}"
    assert engine.return_to_device() and _is_right(engine), "it did not return when it could"


def test_a_return_that_fails_for_no_want_of_memory_is_tried_again_in_another_process(
    start: Start, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(DEFAULT_MODEL, model)
    engine = start(model=model)
    before = _workers(engine)[0]
    engine.fall_back()
    # What is wrong may be of the process or, as here, not: nobody can tell.
    model.write_bytes(b"no model")
    with pytest.raises(Exception, match=str(model)) as caught:
        engine.return_to_device()
    assert not classify(caught.value).is_oom and engine.degraded, f"{caught.value!r}, degraded {engine.degraded}"
    assert _gone(before), f"worker {before.pid}, in which it failed, is kept"
    shutil.copy(DEFAULT_MODEL, model)
    assert engine.return_to_device() and _is_right(engine), "it did not return when it could"


def test_a_probe_that_fails_for_no_want_of_memory_has_the_next_try_in_another_process(start: Start) -> None:
    engine = start()
    before = _workers(engine)[0]
    engine.fall_back()
    # Nothing can be opened there any more: the probe's model is not to be had.
    resource.prlimit(before.pid, resource.RLIMIT_NOFILE, (0, 0))
    assert not engine.return_to_device(), "it returned to a device whose probe cannot run"
    assert _gone(before), f"worker {before.pid}, in which it failed, is kept"
    assert engine.return_to_device() and _is_right(engine), "it did not return when it could"


def test_a_fallback_that_cannot_start_is_not_kept_and_tried_anew(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    with monkeypatch.context() as patched:
        patched.setattr(protection.worker_process, "boot", lambda *_: ["-c", "raise SystemExit(9)"])
        for _ in range(2):
            with pytest.raises(WorkerLost, match="ended with status 9"):
                engine.fall_back()
    assert engine.device == "cpu:arena", f"it says that it is on {engine.device}"
    engine.fall_back()
    assert engine.degraded and _is_right(engine), f"it is on {engine.device}, or the scores differ"
    _workers(engine)[1].kill()
    with pytest.raises(WorkerLost):
        engine.infer(_features())
    monkeypatch.setattr(protection.worker_process, "boot", broken_workers.boot(*["StartsWithoutMemory"] * 2))
    for call in (engine.restart, lambda: engine.infer(_features())):
        with pytest.raises(RuntimeFailure) as caught:
            call()
        assert caught.value.kind is ErrorKind.HOST_OOM, f"{caught.value!r}"
    assert _is_right(engine), "the scores differ"


def test_a_fallback_without_memory_for_its_model_is_asked_again_in_the_same_process(start: Start, bounded: Cpu) -> None:
    engine = start()
    tried = []
    with bounded.arm(FaultPlan(Site.HOST_MEMORY, times=3, min_bytes=1 << 20)) as fault:
        for _ in range(3):
            with pytest.raises(RuntimeFailure) as caught:
                engine.fall_back()
            tried.append((caught.value.kind, [worker.pid for worker in _workers(engine)]))
        assert engine.device == "cpu:arena", f"it says that it is on {engine.device}"
        engine.fall_back()
        record = fault.record()
    found = [worker.pid for worker in _workers(engine)]
    assert tried == [(ErrorKind.HOST_OOM, found)] * 3 and len(found) == 2, f"tried {tried}, and then in {found}"
    assert record.faults_fired == 3 and engine.degraded and _is_right(engine), f"{record}; on {engine.device}"


# A fallback that lingers.


def test_a_fallback_lingers_without_its_model_and_is_used_again(start: Start) -> None:
    engine = start()
    engine.fall_back()
    device, fallback = _workers(engine)
    for _ in range(2):
        for batch in (16, 4):
            assert _is_right(engine, batch), f"of {batch} chunks on {engine.device} the scores differ"
        loaded_bytes = fallback.memory_info().rss
        assert engine.return_to_device() and _is_right(engine), "it did not return, or the scores differ"
        unloaded_bytes = fallback.memory_info().rss
        assert _workers(engine) == [device, fallback], f"workers {_workers(engine)}, before {device} and {fallback}"
        assert loaded_bytes - unloaded_bytes > 4 * MIB, f"with its model {loaded_bytes} bytes, without {unloaded_bytes}"
        engine.fall_back()
        assert _workers(engine) == [device, fallback] and engine.degraded, f"workers {_workers(engine)}"


def test_a_fallback_that_was_not_needed_for_long_goes_with_the_next_inference(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    engine.fall_back()
    device, fallback = _workers(engine)
    assert engine.return_to_device() and _is_right(engine), "it did not return, or the scores differ"
    assert _workers(engine) == [device, fallback], f"workers {_workers(engine)}: not before its time"
    engine.fall_back()
    monkeypatch.setattr(protection.worker_engine, "_LINGER_S", 0.3)
    assert engine.return_to_device(), "it did not return"
    threading.Event().wait(0.5)
    assert _is_right(engine) and _workers(engine) == [device] and _gone(fallback), f"workers {_workers(engine)}"
    engine.fall_back()
    # One that is in use has no time to keep.
    threading.Event().wait(0.5)
    assert _is_right(engine) and len(_workers(engine)) == 2, f"workers {_workers(engine)}"


@pytest.mark.parametrize("how", ["unload", "close"])
def test_a_fallback_that_lingers_goes_with_the_model(start: Start, how: str) -> None:
    engine = start()
    engine.fall_back()
    assert engine.return_to_device() and len(_workers(engine)) == 2, f"workers {_workers(engine)}"
    workers = _workers(engine)
    getattr(engine, how)()
    assert all(map(_gone, workers)) and not _workers(engine), f"after {how}: {workers}"


def test_a_fallback_that_dies_while_it_lingers_is_replaced_when_it_is_needed(start: Start) -> None:
    engine = start()
    engine.fall_back()
    device, fallback = _workers(engine)
    assert engine.return_to_device(), "it did not return"
    fallback.kill()
    until(lambda: _workers(engine) == [device], "it is gone")
    assert _is_right(engine) and not engine.lost, "the device's answers are lost with it"
    engine.fall_back()
    found = _workers(engine)
    assert engine.degraded and found[0] == device and fallback not in found, f"workers {found}"
    assert _is_right(engine), "the scores differ"


def test_a_fallback_that_does_not_unload_does_not_linger(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(heartbeat_s=3.0)
    engine.fall_back()
    device, fallback = _workers(engine)
    fallback.suspend()
    assert engine.return_to_device(), "a fallback that hangs kept it from the device"
    assert _workers(engine) == [device] and _gone(fallback) and _is_right(engine), f"workers {_workers(engine)}"


# A warm standby.


def test_a_standby_is_there_before_it_is_needed_and_stays(shared: WorkerEngine) -> None:
    device, standby = _workers(shared)
    assert not shared.degraded and _is_right(shared), f"on {shared.device}"
    shared.fall_back()
    assert _workers(shared) == [device, standby] and _is_right(shared), f"workers: {_workers(shared)}"
    assert shared.return_to_device() and _is_right(shared), "it did not return"
    assert _workers(shared) == [device, standby], f"workers after the return: {_workers(shared)}"


def test_a_standby_that_is_gone_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection.worker_engine, "_STANDBY_EVERY_S", 1000.0)
    engine = start(standby=True)
    device, standby = _workers(engine)
    standby.kill()
    until(lambda: len(_workers(engine)) == 1, "it is gone")
    assert _is_right(engine), "the device's scores differ"
    found = _workers(engine)
    assert len(found) == 2 and found[0] == device and standby not in found, f"workers: {found}"
    # One that does not stay is not started with every inference.
    found[1].kill()
    until(lambda: len(_workers(engine)) == 1, "it is gone again")
    assert _is_right(engine) and _workers(engine) == [device], f"workers: {_workers(engine)}"
    # Unloading is no death.
    engine.unload()
    assert _is_right(engine) and len(_workers(engine)) == 2, f"workers: {_workers(engine)}"


# Unloading and closing.


def test_unloading_ends_the_workers_and_the_next_inference_starts_one(start: Start, bounded: Cpu) -> None:
    engine = start()
    for move in (None, engine.fall_back):
        if move is not None:
            move()
        engine.infer(_features(16))
        where, workers = engine.device, _workers(engine)
        engine.unload()
        assert workers and all(not worker.is_running() for worker in workers), f"of {workers} some are left"
        reading = engine.device_memory()
        assert (reading.used_bytes, reading.limit_bytes) == (0, 96 * MIB), f"without a worker the reading is {reading}"
        with pytest.raises(BackendError, match="no process has the device now"):
            bounded.allocate(MIB)
        assert not bounded.healthy().ok, "a device that no process has is healthy"
        engine.release_cached()
        assert _is_right(engine) and engine.device == where, f"on {engine.device}, before on {where}"


def test_closing_twice_is_closing_once_and_nothing_works_afterwards(start: Start, bounded: Cpu) -> None:
    engine = start()
    engine.close()
    engine.close()
    for call in (lambda: engine.infer(_features()), engine.restart, engine.fall_back):
        with pytest.raises(EngineError, match="the engine was closed"):
            call()
    assert not engine.return_to_device(), "a closed engine returned"
    engine.cancel()
    engine.unload()
    engine.release_cached()
    assert list(engine.process_ids()) == [os.getpid()], f"processes {engine.process_ids()}"
    assert bounded.load(DEFAULT_MODEL).run(_features()).shape == (4, 50, 32), "the device is not in this process again"


def test_nothing_is_left_after_many_workers(bounded: Cpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    bounded.memory()
    before, threads = open_descriptors(), set(threading.enumerate())
    for kills, restart in ((0, True), (1, True), (2, False)):
        engine = WorkerEngine(bounded, DEFAULT_MODEL, standby=kills == 2)
        engine.infer(_features())
        for worker in _workers(engine)[:kills]:
            worker.kill()
        with contextlib.suppress(WorkerLost):
            engine.infer(_features())
        if restart:
            engine.restart()
        engine.close()
    left = set(threading.enumerate()) - threads
    assert not left, f"threads left behind: {left}"
    assert not (changes := changes_since(before)), changes
    files = [str(path) for path in tmp_path.rglob("*")]
    assert not files, f"files left behind: {files}"


@pytest.fixture
def templates() -> Iterator[None]:
    """Have the processes that workers are forked from end with the test."""
    before = set(psutil.Process().children(recursive=True))
    yield
    protection.template.end_all()
    protection.template._templates.clear()
    until(lambda: set(psutil.Process().children(recursive=True)) <= before, "the templates end")


@pytest.mark.usefixtures("templates")
def test_a_worker_is_forked_where_that_is_asked_for(start: Start) -> None:
    engine = start(fork_workers=True)
    template = engine._device._template if engine._device else None
    assert template is not None, "it was started, and not forked"
    parent = _workers(engine)[0].ppid()
    assert parent == template.process_id != os.getpid(), f"its parent is {parent}, expected the template"
    assert _is_right(engine), "the scores of a forked worker differ"
    engine.restart()
    again = _workers(engine)[0].ppid()
    assert again == parent, f"the next worker's parent is {again}, expected {parent}"
    engine.fall_back()
    assert engine._fallback is not None and engine._fallback._template is not None, "the fallback was not forked"
    assert _is_right(engine), "the scores of a forked fallback differ"


@pytest.mark.usefixtures("templates")
@pytest.mark.parametrize(
    ("is_slow", "fork_workers", "forked"),
    [(False, None, False), (True, None, True), (True, False, False), (False, False, False)],
)
def test_a_worker_is_forked_by_itself_only_where_the_runtime_is_slow_to_import(
    start: Start, monkeypatch: pytest.MonkeyPatch, is_slow: bool, fork_workers: bool | None, forked: bool
) -> None:
    assert Cpu.is_slow_to_import is False, "ONNX Runtime is said to be slow to import"
    monkeypatch.setattr(Cpu, "is_slow_to_import", is_slow)
    engine = start(fork_workers=fork_workers)
    is_child = _workers(engine)[0].ppid() == os.getpid()
    assert is_child is not forked, f"slow {is_slow}, fork_workers {fork_workers}: forked is {not is_child}"


# What ends in the middle.


def test_an_engine_whose_close_fails_halfway_ends_the_other_worker_and_is_closed_by_the_next_call(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    engine = start(standby=True)
    device, fallback = _workers(engine)
    drop, failed = WorkerEngine._drop, list[Any]()

    def fail_once(self: WorkerEngine, worker: Any) -> None:
        if worker is self._fallback and not failed:
            failed.append(worker)
            raise MemoryError("there was none")
        drop(self, worker)

    monkeypatch.setattr(WorkerEngine, "_drop", fail_once)
    with pytest.raises(MemoryError, match="there was none"):
        engine.close()
    until(lambda: _gone(device), "the device's worker ends though the fallback's could not be ended")
    threads = set(threading.enumerate()) - before
    engine.close()
    until(lambda: _gone(fallback), "the second call ends the fallback's worker")
    assert not threads, f"threads left after the first call: {threads}"


def test_a_close_that_fails_once_for_the_devices_worker_can_be_repeated(
    start: Start, bounded: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    (device,) = _workers(engine)
    drop, failed = WorkerEngine._drop, list[Any]()

    def fail_once(self: WorkerEngine, worker: Any) -> None:
        if worker is not None and not failed:
            failed.append(worker)
            raise MemoryError("there was none")
        drop(self, worker)

    monkeypatch.setattr(WorkerEngine, "_drop", fail_once)
    with pytest.raises(MemoryError, match="there was none"):
        engine.close()
    engine.close()
    until(lambda: _gone(device), "the second call ends the worker")
    assert bounded.load(DEFAULT_MODEL).run(_features()).shape == (4, 50, 32), "the device is not in this process again"


# The handle of the device, in the host.


def test_what_is_allocated_through_the_handle_is_held_by_the_worker(shared: WorkerEngine, handle: Cpu) -> None:
    worker = _workers(shared)[0]
    used, resident, own = handle.memory().used_bytes, worker.memory_info().rss, psutil.Process().memory_info().rss
    held = handle.allocate(48 * MIB)
    grown, own_grown = worker.memory_info().rss - resident, psutil.Process().memory_info().rss - own
    during = handle.memory().used_bytes - used
    held.free()
    handle.release_cached()
    after = handle.memory().used_bytes
    left = worker.memory_info().rss - resident
    assert (held.size_bytes, during, after) == (48 * MIB, 48 * MIB, used), f"used: {during} more, then {after}"
    assert grown >= 47 * MIB > 24 * MIB > own_grown, f"the worker grew by {grown} bytes, the host by {own_grown}"
    assert left < 24 * MIB, f"{left} bytes stayed with the worker"
    assert handle.healthy().ok, f"the device's health is {handle.healthy()}"


def test_a_device_that_is_full_refuses_through_the_handle_too(shared: WorkerEngine, handle: Cpu) -> None:
    with pytest.raises(RuntimeFailure, match="Available memory of") as caught:
        handle.allocate(97 * MIB)
    assert caught.value.kind is ErrorKind.DEVICE_OOM, f"it is {caught.value.kind}"


def test_what_nobody_refers_to_any_more_is_given_back(shared: WorkerEngine, handle: Cpu) -> None:
    before = handle.memory().used_bytes
    held = handle.allocate(8 * MIB)
    during = handle.memory().used_bytes
    del held
    gc.collect()
    assert (during - before, handle.memory().used_bytes) == (8 * MIB, before), f"used {before}, then {during}"


def test_what_is_collected_in_the_middle_of_a_question_waits_for_its_end(shared: WorkerEngine, handle: Cpu) -> None:
    worker = shared._device
    assert worker is not None, "there is no worker"
    before = handle.memory().used_bytes
    held = [handle.allocate(8 * MIB)]
    with ThreadPoolExecutor(1) as other, worker._side_lock:
        # The collector may run anywhere, even in the thread that has just asked.
        other.submit(held.clear).result(60.0)
    assert handle.memory().used_bytes == before, f"used {before} bytes, now {handle.memory().used_bytes}"


def test_a_question_that_was_given_up_leaves_nothing_behind(
    shared: WorkerEngine, handle: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protection.worker_engine, "_BLOCKING_SIDE_S", 0.2)
    before = handle.memory().used_bytes
    worker = _workers(shared)[0]
    worker.suspend()
    with pytest.raises(TimeoutError, match="no answer to 'allocate'"):
        handle.allocate(8 * MIB)
    worker.resume()
    monkeypatch.undo()
    # It is answered late, and to nobody.
    after = handle.memory().used_bytes
    assert after == before, f"{before} bytes in use before, {after} after"
    assert _is_right(shared), "the scores differ"


def test_what_was_taken_is_given_back_when_the_answer_cannot_be_kept(
    shared: WorkerEngine, handle: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError("there was none")

    before = handle.memory().used_bytes
    monkeypatch.setattr(protection.worker_engine, "_Remote", no_memory)
    with pytest.raises(MemoryError, match="there was none"):
        handle.allocate(8 * MIB)
    monkeypatch.undo()
    # It goes with the next question.
    handle.memory()
    after = handle.memory().used_bytes
    assert after == before, f"{before} bytes in use before, {after} after"
    held = handle.allocate(8 * MIB)
    held.free()
    assert _is_right(shared), "the scores differ"


def test_what_was_held_is_held_again_wherever_the_device_goes(start: Start, bounded: Cpu) -> None:
    held = bounded.allocate(40 * MIB)
    alone = bounded.memory().used_bytes
    engine = start()
    found = []
    for end in ("nothing", "kill", "unload"):
        if end == "kill":
            _workers(engine)[0].kill()
        if end == "unload":
            engine.unload()
        with contextlib.suppress(WorkerLost):
            engine.infer(_features())
        engine.infer(_features())
        found.append(bounded.memory().used_bytes >= alone)
        # It is held in the worker's arena: no more than the rest can be had.
        with pytest.raises(RuntimeFailure, match="Available memory of"):
            bounded.allocate(60 * MIB)
    engine.close()
    with pytest.raises(RuntimeError, match="Available memory of"):
        bounded.allocate(60 * MIB)
    assert found == [True] * 3, f"held by the first, second and third worker: {found}"
    assert bounded.memory().used_bytes == alone, f"{bounded.memory().used_bytes} bytes are held here again, not {alone}"
    held.free()
    assert bounded.memory().used_bytes == 0, f"{bounded.memory().used_bytes} bytes are still held"


def test_plans_strike_in_the_worker_and_their_counts_survive_it(start: Start, bounded: Cpu) -> None:
    with bounded.arm(FaultPlan(Site.DEVICE_CACHE, nth=4)) as before:
        engine = start()
        with bounded.arm(FaultPlan(Site.DEVICE_CACHE, nth=3)) as after:
            for _ in range(2):
                engine.infer(_features())
            _workers(engine)[0].kill()
            with pytest.raises(WorkerLost):
                engine.infer(_features())
            kinds = []
            for _ in range(3):
                try:
                    engine.infer(_features(16))
                    kinds.append("right")
                except RuntimeFailure as error:
                    kinds.append(error.kind.value)
                    engine.release_cached()
            records = [before.record(), after.record()]
    assert kinds == ["device_oom", "device_oom", "right"], f"third, fourth and fifth run: {kinds}"
    assert [_counts(record) for record in records] == [(5, 1, 0), (5, 1, 0)], f"the records are {records}"


def _counts(record: FaultRecord) -> tuple[int, int, int]:
    return record.points_seen, record.faults_fired, record.absorbed


def test_what_a_plan_holds_in_the_worker_is_lifted_there(shared: WorkerEngine, handle: Cpu) -> None:
    with handle.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)):
        with pytest.raises(RuntimeFailure, match="Available memory of"):
            shared.infer(_features(16))
        during = handle.memory().used_bytes
    after = handle.memory().used_bytes
    shared.release_cached()
    assert during > 90 * MIB > 48 * MIB > after, f"{during} bytes in use while it was armed, {after} afterwards"
    assert _is_right(shared, 16), "the scores differ"


# The worker ends with its host.

HOST = """
import json, os, signal, sys, threading, time
import numpy as np
from backends.contract import FaultPlan, Site
from backends.cpu import Cpu
from backends.model import DEFAULT_MODEL
import protection.worker_engine
import protection.worker_process
from protection.worker_engine import WorkerEngine
from protection.worker_process import Deadlines, WorkerLost

def say(*what):
    print(json.dumps(what), flush=True)

features = np.random.RandomState(3).standard_normal((4, 150, 80)).astype(np.float32)
device = Cpu()
device.limit_memory(96 << 20)
# Ignored where the tests run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


class Host:
    """A program of ours in a process of its own."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST + program],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def hear(self) -> list[Any]:
        """Wait for the next thing that it says."""
        assert self.process.stdout is not None and self.process.stderr is not None
        too_late = threading.Timer(100.0, self.process.kill)
        too_late.start()
        line = self.process.stdout.readline()
        too_late.cancel()
        assert line, f"the host said nothing more: {self.process.stderr.read()[-2000:]}"
        found: list[Any] = json.loads(line)
        return found

    def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@pytest.fixture
def host() -> Iterator[Callable[[str], Host]]:
    hosts: list[Host] = []

    def make(program: str) -> Host:
        hosts.append(Host(program))
        return hosts[-1]

    yield make
    for each in hosts:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("state", ["stopped", "hung"])
def test_a_host_that_is_killed_takes_its_workers_along(host: Callable[[str], Host], state: str) -> None:
    parent = host("""
engine = WorkerEngine(device, DEFAULT_MODEL, deadlines=Deadlines(infer_s=300.0))
hang = device.arm(FaultPlan(Site.RUNTIME_HANG))
say(*engine.process_ids())
if input() == "hung":
    threading.Thread(target=engine.infer, args=(features,), daemon=True).start()
    while not hang.record().faults_fired:
        time.sleep(0.01)
    say("hung")
input()
""")
    workers = [psutil.Process(process_id) for process_id in parent.hear()[1:]]
    parent.tell(state)
    if state == "hung":
        parent.hear()
    if state == "stopped":
        for worker in workers:
            worker.suspend()
    parent.process.kill()
    until(lambda: all(map(_gone, workers)), f"of {workers}, {state}, none outlives its host")
    assert len(workers) == 1, f"workers: {workers}"


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("os._exit(7)", 7),
        ("os.execv('/bin/sh', ['sh', '-c', 'read line; exit 3'])", 3),
    ],
    ids=["returns", "leaves", "becomes-another-program"],
)
def test_a_host_that_ends_without_closing_takes_its_workers_along(
    host: Callable[[str], Host], end: str, status: int
) -> None:
    parent = host(f"engine = WorkerEngine(device, DEFAULT_MODEL)\nsay(*engine.process_ids())\ninput()\n{end}")
    workers = [psutil.Process(process_id) for process_id in parent.hear()[1:]]
    parent.tell()
    until(lambda: all(map(_gone, workers)), f"{workers} outlive a host that ends with {end!r}")
    if end.startswith("os.execv"):
        parent.tell()
    found = parent.process.wait(60.0)
    assert (len(workers), found) == (1, status), f"{len(workers)} workers; the host's status is {found}, not {status}"


def test_an_interrupt_from_the_keyboard_is_the_hosts_to_handle(host: Callable[[str], Host]) -> None:
    parent = host("""
engine = WorkerEngine(device, DEFAULT_MODEL, standby=True)
engine.infer(features)
before = engine.process_ids()
interrupted = 0
try:
    say(*before)
    threading.Event().wait(60.0)
except KeyboardInterrupt:
    interrupted += 1
engine.infer(features)
engine.fall_back()
engine.infer(features)
say(interrupted, before == engine.process_ids(), engine.lost)
engine.close()
""")
    parent.hear()
    os.killpg(parent.process.pid, signal.SIGINT)
    found = parent.hear()
    assert found == [1, True, False], f"interrupted, the same workers, lost: {found}"
    assert parent.process.wait(60.0) == 0, f"the host ended with {parent.process.returncode}"


def test_a_host_that_was_stopped_does_not_blame_its_worker(host: Callable[[str], Host]) -> None:
    parent = host("""
engine = WorkerEngine(device, DEFAULT_MODEL, deadlines=Deadlines(infer_s=5.0, heartbeat_s=5.0))
engine.infer(features)
worker = engine._device
receive = worker._receive
def stop_before_reading(number, patience):
    os.kill(os.getpid(), signal.SIGSTOP)
    return receive(number, patience)
worker._receive = stop_before_reading
say(worker.process_id)
found = engine.infer(features)
say(list(found.shape), engine.process_ids()[1], engine.lost)
engine.close()
""")
    (worker_id,) = parent.hear()
    stopped = psutil.Process(parent.process.pid)
    until(lambda: stopped.status() == psutil.STATUS_STOPPED, "the host has asked, and stops")
    threading.Event().wait(7.0)
    stopped.resume()
    found = parent.hear()
    assert found == [[4, 50, 32], worker_id, False], f"scores, worker {worker_id} and whether it was lost: {found}"


def test_a_host_that_stops_reading_loses_its_worker_and_nothing_else(host: Callable[[str], Host]) -> None:
    # The worker's buffers are made small: what they take of an answer is the machine's choice.
    parent = host("""
sound = protection.worker_process.boot
def small(*numbers):
    arguments = sound(*numbers)
    program = arguments.index("-c") + 1
    begin = "from protection.worker import main"
    shrink = "from protection import channel; channel._BUFFER_BYTES = 4096; "
    arguments[program] = arguments[program].replace(begin, shrink + begin)
    return arguments
protection.worker_process.boot = small
engine = WorkerEngine(Cpu(), DEFAULT_MODEL, deadlines=Deadlines(infer_s=300.0, host_patience_s=0.7))
expected = engine.infer(features)
worker = engine._device
receive = worker._receive
def stop_before_reading(number, patience):
    os.kill(os.getpid(), signal.SIGSTOP)
    return receive(number, patience)
worker._receive = stop_before_reading
say(worker.process_id)
try:
    engine.infer(features)
    lost = ["answered", ""]
except WorkerLost as error:
    lost = [error.cause, str(error)]
protection.worker_process.boot = sound
again = engine.infer(features)
say(lost, bool(np.array_equal(again, expected)), engine.process_ids()[1])
engine.close()
""")
    (worker_id,) = parent.hear()
    worker, stopped = psutil.Process(worker_id), psutil.Process(parent.process.pid)
    until(lambda: stopped.status() == psutil.STATUS_STOPPED, "the host has asked, and stops")
    until(lambda: _gone(worker), "the worker ends by itself")
    assert stopped.status() == psutil.STATUS_STOPPED, f"the host is {stopped.status()}"
    stopped.resume()
    (cause, text), right, after = parent.hear()
    assert cause == "died", f"the cause is {cause}: {text}"
    assert "ended with status 76 (it could not write: its host did not read)" in text, f"it is {text}"
    assert right and after != worker_id, f"right {right}, worker {worker_id}, then {after}"
