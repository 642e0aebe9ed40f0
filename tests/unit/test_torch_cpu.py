"""What only torch-cpu promises: a process that is a device, capped to the page, and none the worse for its errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import backends
from backends.contract import Allocation, BackendError, FaultPlan, Model, ModelError, Provenance, Site
from backends.errors import ErrorKind, RuntimeFailure, Shortage, classify
from backends.faults import ballast
from backends.model import DEFAULT_MODEL, ModelSpec, to_onnx
from backends.torch_cpu import TorchCpu
from protection.worker_engine import WorkerEngine
from protection.worker_process import Deadlines, WorkerLost

pytestmark = pytest.mark.skipif(not TorchCpu.probe().available, reason=TorchCpu.probe().reason)

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LIMIT_BYTES = 96 * MIB
PAGE_BYTES = 4096
#: The start of a program in which the device is, bounded at 96 MiB.
IN_THE_DEVICE = """
import gc, json, os
import numpy as np
import backends
from backends.errors import diagnose
from backends.faults import ballast
from backends.host import data_bytes
from backends.model import DEFAULT_MODEL
from backends.torch_cpu import TorchCpu
handle = TorchCpu()
handle.limit_memory(96 << 20)
device = backends.rebuild(dict(handle.share().data) | {"board": os.dup(handle.share().data["board"])})
# Made while there is memory for it: here the caller's memory is the device's.
FEATURES = {n: np.random.RandomState(3).standard_normal((n, 150, 80)).astype(np.float32) for n in (1, 2, 4, 8, 16)}
def outcome(act):
    try:
        act()
    except Exception as error:
        found = diagnose(error)
        return [found.kind.value, found.shortage and found.shortage.value, str(error)]
"""
InChild = Callable[[str], Any]


@pytest.fixture(scope="module")
def handle() -> Iterator[TorchCpu]:
    """Give a handle on a device of 96 MiB."""
    made = TorchCpu()
    made.limit_memory(LIMIT_BYTES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def engine(handle: TorchCpu) -> Iterator[WorkerEngine]:
    """Give an engine on the handle's device; the last tests of this file use it."""
    made = WorkerEngine(handle, DEFAULT_MODEL, deadlines=Deadlines(infer_s=4.0))
    yield made
    made.close()


def _features(batch: int) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


def _failure(act: Callable[[], object]) -> RuntimeFailure:
    with pytest.raises(RuntimeFailure) as caught:
        act()
    return caught.value


def _is_its_cap(error: RuntimeFailure) -> bool:
    return (error.kind, error.shortage) == (ErrorKind.DEVICE_OOM, Shortage.CAPPED) and "DefaultCPUAlloc" in str(error)


# In the process that is the device.


def test_the_cap_is_exact_and_can_be_changed(in_child: InChild) -> None:
    found = in_child(f"""{IN_THE_DEVICE}
import resource
found = []
for mib in (4, 160, 32, 96):
    device.limit_memory(mib << 20)
    begun = data_bytes()
    held = ballast.fill(device.allocate)
    taken, room = data_bytes() - begun, resource.getrlimit(resource.RLIMIT_DATA)[0] - begun
    refused = outcome(lambda: device.allocate(64 << 10))
    found.append([mib, sum(piece.size_bytes for piece in held), taken, room, device.memory().limit_bytes, refused[:2]])
    ballast.free(held)
print(json.dumps(found))
""")
    for mib, held, taken, room, limit, refused in found:
        cap = mib * MIB
        # The kernel counts pages; of the free memory of its heap a process may serve a block or two.
        assert room - 256 * 1024 <= taken <= room <= cap and room - 0.05 * cap <= held <= room + 128 * 1024, (
            f"under {mib} MiB, {held} bytes were allocated, VmData grew by {taken}, RLIMIT_DATA left {room}"
        )
        assert limit == cap and refused == ["device_oom", "capped"], f"{mib} MiB: limit {limit}, {refused}"


def test_a_cap_that_does_not_hold_is_found_out(in_child: InChild) -> None:
    found = in_child(f"""{IN_THE_DEVICE}
device.limit_memory(32 << 20)
# A system that takes a limit and does not enforce it.
limits.cap_host_memory = lambda headroom_bytes: 1 << 60
refused = outcome(lambda: device.limit_memory(64 << 20))
print(json.dumps([refused[2], device.memory().limit_bytes]))
""")
    assert "took a limit of 67108864 bytes and then allocated 68157440" in found[0], f"it says {found[0]!r}"
    assert found[1] == 32 * MIB, f"the limit that it reports is {found[1]}, expected the one before"


def test_after_out_of_memory_the_memory_is_back_without_a_collection(in_child: InChild) -> None:
    found = in_child(f"""{IN_THE_DEVICE}
gc.disable()
model = device.load(DEFAULT_MODEL)
model.run(FEATURES[16])
used, failures = [], []
for _ in range(3):
    held = device._fill([], 16 << 20)
    failures.append(outcome(lambda: model.run(FEATURES[16]))[:2])
    ballast.free(held)
    used.append(data_bytes())
del model
device.release_cached()
print(json.dumps([failures, used, data_bytes() - used[-1]]))
""")
    failures, used, unloaded = found
    assert failures == [["device_oom", "capped"]] * 3, f"the runs failed with {failures}"
    grown = max(used) - used[0]
    assert grown <= 64 * 1024, f"after each error {grown} bytes more are held: {used}"
    assert unloaded < -2 * MIB, f"dropping the model changed what is held by {unloaded} bytes"


def test_having_had_no_memory_for_a_kernel_spoils_nothing(in_child: InChild) -> None:
    # oneDNN makes code for each batch, and makes none any more in a thread that once had no memory for it.
    found = in_child(f"""{IN_THE_DEVICE}
model = device.load(DEFAULT_MODEL)
expected = {{n: model.run(FEATURES[n]) for n in FEATURES}}
errors, differ, used, kernels = [], [], [], []
for _ in range(6):
    before = len(errors)
    for free_kib in range(1200, 4000, 280):
        held = device._fill([], free_kib << 10)
        errors += [error for n in FEATURES if (error := outcome(lambda: model.run(FEATURES[n])))]
        ballast.free(held)
        differ += [[free_kib, n] for n in FEATURES if not np.array_equal(model.run(FEATURES[n]), expected[n])]
    used.append(data_bytes())
    kernels.append(sum("could not create a primitive" in error[2] for error in errors[before:]))
kinds = sorted({{tuple(error[:2]) for error in errors}})
print(json.dumps([kinds, kernels, differ, used]))
""")
    kinds, kernels, differ, used = found
    assert sum(kernels[1:]), f"the code of a kernel found no memory {kernels} times: this test shows nothing"
    assert kinds == [["device_oom", "capped"]], f"the errors are {kinds}"
    assert not differ, f"runs that gave other scores afterwards (free KiB, batch): {differ}"
    # A thread's stack, or what MKL keeps for a thread, would be more, and each such error would add it.
    grown = max(used) - used[0]
    assert grown <= 2 * MIB, f"{kernels} such errors a round, and after each round {grown} bytes more are held: {used}"


def test_a_device_that_refused_often_is_as_large_as_before(in_child: InChild) -> None:
    # Where the thread that computes has a heap of its own, blocks are carved out of that one, which never shrinks.
    found = in_child(f"""{IN_THE_DEVICE}
errors, refused, used = [], [], []
for _ in range(20):
    model = device.load(DEFAULT_MODEL)
    fits = (model.working_set_bytes(2) + model.working_set_bytes(4)) // 2
    held = device._fill([], 0)
    errors.append(outcome(lambda: model.run(FEATURES[16])))
    ballast.free(held)
    model.run(FEATURES[16])
    held = device._fill([], fits)
    errors += [outcome(lambda: model.run(FEATURES[4])) for _ in range(2)]
    refused.append(outcome(lambda: model.run(FEATURES[2])))
    ballast.free(held)
    model.close()
    device.collect()
    device.release_cached()
    used.append(data_bytes())
print(json.dumps([sorted({{tuple(error[:2]) for error in errors}}), [error for error in refused if error], used]))
""")
    kinds, refused, used = found
    grown = max(used[1:]) - used[0]
    assert kinds == [["device_oom", "capped"]], f"what was too large failed with {kinds}"
    assert not refused, f"a batch of 2 was refused in {len(refused)} of 20 rounds: {refused[:3]}"
    assert grown <= MIB, f"over 20 rounds with three refusals each the process grew by {grown} bytes: {used}"


def test_what_the_health_probe_is_compared_with_is_there_before_memory_is_short(in_child: InChild) -> None:
    found = in_child("""
import json, os
import backends
from backends._device import health_probe
from backends.torch_cpu import TorchCpu
handle = TorchCpu(bounded=False)
data = dict(handle.share().data)
before = health_probe.cache_info().currsize
device = backends.rebuild(data | {"board": os.dup(data["board"])})
print(json.dumps([before, health_probe.cache_info().currsize]))
""")
    assert found == [0, 1], f"computed before the process had the device, and after: {found}"


def test_a_kernel_that_was_never_made_ends_the_use_of_the_process() -> None:
    device = TorchCpu(bounded=False)

    def fail() -> None:
        # As libstdc++ has it in torch's error, once oneDNN's cache holds a promise that nobody keeps.
        raise RuntimeError("std::future_error: Broken promise")

    with pytest.raises(RuntimeError) as caught:
        device.owned(fail)
    device.close()
    assert classify(caught.value) is ErrorKind.DEVICE_STICKY, f"it is {classify(caught.value)}"


# In a process that only has a handle.


def test_a_handle_costs_no_torch() -> None:
    program = """
import sys
from backends.model import DEFAULT_MODEL
from backends.torch_cpu import TorchCpu
device = TorchCpu()
device.limit_memory(96 << 20)
assert TorchCpu.probe().available and device.memory().used_bytes == 0 and device._keeper is None
device.load(DEFAULT_MODEL)
device.close()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), f"status {done.returncode}: {done.stdout} {done.stderr}"


def test_a_process_that_must_not_be_lost_does_not_become_the_device(handle: TorchCpu) -> None:
    share = handle.share()
    with pytest.raises(BackendError, match="only in a process started for it"):
        backends.rebuild(dict(share.data) | {"board": os.dup(share.descriptors[0])})


@pytest.mark.parametrize("limit", [-1, 0, MIB - 1, 1 << 60, True, 96.0 * MIB, None], ids=str)
def test_an_absurd_limit_is_refused_before_a_process_is_started(limit: Any) -> None:
    device = TorchCpu()
    with pytest.raises(ValueError, match=rf"limit_bytes is {re.escape(repr(limit))}: expected"):
        device.limit_memory(limit)
    assert device._keeper is None, "a process was started for it"


def test_a_full_device_answers_again_and_again(handle: TorchCpu) -> None:
    model = handle.load(DEFAULT_MODEL)
    expected = model.run(_features(16))
    held = ballast.fill(handle.allocate)
    for _ in range(10):
        reading, health = handle.memory(), handle.healthy()
        error = _failure(lambda: model.run(_features(16)))
        assert _is_its_cap(error), f"a full device's error is {error!r}, {error.shortage}"
        assert not health.ok and "DefaultCPUAllocator: can't allocate memory" in health.detail, f"its health: {health}"
        assert reading.fraction > 0.95, f"its reading is {reading}"
    ballast.free(held)
    assert handle.healthy().ok and np.array_equal(model.run(_features(16)), expected), "it did not get over it"
    model.close()


def test_the_next_smaller_batch_runs_where_a_larger_does_not(handle: TorchCpu) -> None:
    model = handle.load(DEFAULT_MODEL)
    expected = {batch: model.run(_features(batch)) for batch in (16, 8, 4, 2, 1)}
    for _ in range(3):
        for fits in (8, 4, 2, 1):
            # Less than what the next larger takes. Beside its tensors torch takes up to a MiB, now more and now less.
            free_bytes = model.working_set_bytes(fits) * 3 // 2
            with handle.arm(FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=free_bytes)) as fault:
                assert _is_its_cap(_failure(lambda: model.run(_features(16)))), "a batch of 16 is not refused"
                scores = model.run(_features(fits))
                record = fault.record()
            assert np.array_equal(scores, expected[fits]), f"the scores of a batch of {fits} differ"
            assert (record.faults_fired, record.absorbed) == (1, 1), f"16 and {fits}: {record}"
    assert np.array_equal(model.run(_features(16)), expected[16]), "the scores differ after the faults were lifted"
    model.close()


def test_the_hosts_refusals_are_the_hosts(handle: TorchCpu) -> None:
    for min_bytes in (MIB, 16 * MIB):
        with handle.arm(FaultPlan(Site.HOST_MEMORY, min_bytes=min_bytes)) as fault:
            error = _failure(lambda: handle.load(DEFAULT_MODEL))
            record = fault.record()
        assert error.kind is ErrorKind.HOST_OOM, f"requests of {min_bytes} bytes: {error!r}, {error.kind}"
        assert (record.faults_fired, record.provenance) == (1, Provenance.CAPPED), f"{record}"
        handle.load(DEFAULT_MODEL).run(_features(5))


def test_a_library_that_is_missing_is_no_memory_error(handle: TorchCpu) -> None:
    model = handle.load(DEFAULT_MODEL)
    with handle.arm(FaultPlan(Site.LIBRARY_MISSING)) as fault:
        error = _failure(lambda: model.run(_features(1)))
        record = fault.record()
    assert error.kind is ErrorKind.OTHER and "libplimsoll-that-is-missing" in str(error), f"the error is {error!r}"
    assert (record.faults_fired, record.provenance) == (1, Provenance.MISSING), f"{record}"
    model.run(_features(1))


def test_two_devices_at_once_do_not_disturb_each_other(handle: TorchCpu) -> None:
    with_room = TorchCpu()
    with_room.limit_memory(48 * MIB)
    models: list[Model] = [device.load(DEFAULT_MODEL) for device in (handle, with_room)]
    expected = models[0].run(_features(16))
    held = ballast.fill(handle.allocate)
    assert _is_its_cap(_failure(lambda: models[0].run(_features(16)))), "the full device is not full"
    scores, reading = models[1].run(_features(16)), with_room.memory()
    ballast.free(held)
    with_room.close()
    assert np.array_equal(scores, expected), "the other device's scores differ"
    assert reading.limit_bytes == 48 * MIB, f"the other device's reading: {reading}"


def test_the_fallback_is_a_process_without_a_cap_and_gives_the_same_scores(handle: TorchCpu) -> None:
    model = handle.load(DEFAULT_MODEL)
    expected = model.run(_features(16))
    fallback = handle.fallback()
    held: list[Allocation] = [fallback.allocate(2 * LIMIT_BYTES)]
    scores = fallback.load(DEFAULT_MODEL).run(_features(16))
    limit = fallback.memory().limit_bytes
    ballast.free(held)
    fallback.close()
    assert np.array_equal(scores, expected), "the fallback's scores differ"
    assert limit is None, f"the fallback has a limit of {limit} bytes"
    assert (handle.device, fallback.device) == ("torch-cpu:process", "torch-cpu"), "the names of the two devices"


def test_a_crash_is_that_processes_and_another_takes_its_place(handle: TorchCpu) -> None:
    model = handle.load(DEFAULT_MODEL)
    expected = model.run(_features(2))
    with handle.arm(FaultPlan(Site.RUNTIME_CRASH)) as fault:
        error = _failure(lambda: model.run(_features(2)))
        record = fault.record()
    assert error.kind is ErrorKind.PROCESS_LOST, f"the error is {error.kind}"
    assert f"ended with status {-signal.SIGFPE}" in str(error), f"it did not end by SIGFPE: {error}"
    assert (record.faults_fired, record.provenance) == (1, Provenance.KILLED), f"{record}"
    assert handle.healthy().ok, "no other process took its place"
    assert np.array_equal(handle.load(DEFAULT_MODEL).run(_features(2)), expected), "another process's scores differ"


# Programs of torch.


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a small model, in a process of its own."""
    path = tmp_path_factory.mktemp("exported") / "small.pt2"
    spec = "ModelSpec(context_frames=20, chunk_frames=40, layers=1, width=16, channels=4, vocabulary=7)"
    program = f"""
from pathlib import Path
from backends._torch_model import export
from backends.model import ModelSpec, weights
export({spec}, weights({spec}), Path({str(path)!r}))
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    return path


def test_an_exported_program_runs_as_the_same_model_does(handle: TorchCpu, exported: Path, tmp_path: Path) -> None:
    spec = ModelSpec(context_frames=20, chunk_frames=40, layers=1, width=16, channels=4, vocabulary=7)
    onnx.save(to_onnx(spec), tmp_path / "small.onnx")
    x = np.random.RandomState(3).standard_normal((3, 60, 80)).astype(np.float32)
    program, model = handle.load(exported), handle.load(tmp_path / "small.onnx")
    scores, expected = program.run(x), model.run(x)
    found = (program.window_frames, program.chunk_frames, program.vocabulary, scores.shape)
    assert found == (60, 40, 7, (3, 20, 7)), f"window, chunk, vocabulary, scores are {found}"
    assert np.max(np.abs(scores - expected)) < 1e-5, f"they differ by {np.max(np.abs(scores - expected))}"
    assert program.working_set_bytes(4) > program.working_set_bytes(1) > 0, "its working set does not grow"


def test_a_file_that_is_no_program_is_named(handle: TorchCpu, tmp_path: Path) -> None:
    path = tmp_path / "text.pt2"
    path.write_text("no program")
    with pytest.raises(ModelError, match=r"text\.pt2 is not a program that torch .* loads"):
        handle.load(path)
    assert handle.healthy().ok, "the device did not get over it"


# With a worker that has the device.


def test_what_is_held_moves_to_a_worker_and_back() -> None:
    device = TorchCpu()
    device.limit_memory(LIMIT_BYTES)
    held = device.allocate(16 * MIB)
    keeper = device._keeper
    assert keeper is not None, "no process has the device"
    moved = WorkerEngine(device, DEFAULT_MODEL)
    try:
        there, first_runs_on = device.memory(), keeper.alive
        assert moved.infer(_features(16)).shape == (16, 50, 32), "it does not infer"
    finally:
        moved.close()
    back = device.memory()
    held.free()
    after = device.memory()
    device.close()
    assert not first_runs_on, "the process that had the device before runs on beside the worker"
    assert there.used_bytes >= 16 * MIB and there.limit_bytes == LIMIT_BYTES, f"in the worker: {there}"
    fell = back.used_bytes - after.used_bytes
    assert 0 <= fell - 16 * MIB <= 2 * PAGE_BYTES, f"16 MiB held: {back}, given back: {after}"


def test_an_engine_gets_over_many_errors_in_a_row(engine: WorkerEngine, handle: TorchCpu) -> None:
    expected = {batch: engine.infer(_features(batch)) for batch in (16, 8)}
    processes = list(engine.process_ids())
    # Room for 8 windows, and not for 16.
    free_bytes = 20 * MIB
    with handle.arm(FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=free_bytes)) as fault:
        for _ in range(10):
            error = _failure(lambda: engine.infer(_features(16)))
            assert error.kind is ErrorKind.DEVICE_OOM, f"the error is {error.kind}: {error}"
            assert handle.memory().limit_bytes == LIMIT_BYTES, "the worker does not read its memory"
            assert np.array_equal(engine.infer(_features(8)), expected[8]), "the scores of the smaller batch differ"
        record = fault.record()
    assert (record.faults_fired, record.absorbed) == (10, 10), f"{record}"
    assert np.array_equal(engine.infer(_features(16)), expected[16]), "the scores differ after the fault was lifted"
    assert list(engine.process_ids()) == processes, "a worker was replaced"


def test_a_runtime_that_hangs_is_ended_at_the_deadline(engine: WorkerEngine, handle: TorchCpu) -> None:
    expected = engine.infer(_features(2))
    with handle.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:
        with pytest.raises(WorkerLost, match=r"hung: no (answer within 4|sign of life)"):
            engine.infer(_features(2))
        record = fault.record()
    assert (record.faults_fired, record.provenance) == (1, Provenance.KILLED), f"{record}"
    engine.restart()
    assert np.array_equal(engine.infer(_features(2)), expected), "another worker's scores differ"
