"""The child that has a device for a process that must not: asked, lost and replaced, and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import backends._keeper
from backends._keeper import Keeper
from backends.contract import FaultPlan, ModelError, Share, Site
from backends.cpu import Cpu
from backends.errors import ErrorKind, RuntimeFailure, Shortage
from backends.faults import ballast
from backends.model import DEFAULT_MODEL
from tests.unit.descriptors import changes_since, open_descriptors
from tests.unit.waiting import until

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LIMIT_BYTES = 96 * MIB


@pytest.fixture(scope="module")
def handle() -> Iterator[Cpu]:
    """Give a backend whose like a child can make; any would do, and this one is made quickly."""
    made = Cpu()
    made.limit_memory(LIMIT_BYTES)
    yield made
    made.close()


@pytest.fixture
def keeper(handle: Cpu) -> Iterator[Keeper]:
    made = Keeper(handle.share())
    yield made
    made.close()


def _features(batch: int) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


def _gone(process: psutil.Process) -> bool:
    # A killed orphan may stay as a zombie where nobody reaps it.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# What it is asked.


def test_a_model_gives_there_what_it_gives_here(keeper: Keeper, handle: Cpu) -> None:
    here, there = handle.load(DEFAULT_MODEL), keeper.load(DEFAULT_MODEL)
    for batch in (2, 16, 1):
        assert np.array_equal(there.run(_features(batch)), here.run(_features(batch))), f"a batch of {batch} differs"
    said = [(m.device, m.window_frames, m.chunk_frames, m.vocabulary) for m in (here, there)]
    assert said[0] == said[1], f"the model says of itself here and there: {said}"
    assert there.working_set_bytes(4) == here.working_set_bytes(4), "the working sets differ"
    here.close()


def test_its_memory_is_its_own(keeper: Keeper, handle: Cpu) -> None:
    held = keeper.allocate(24 * MIB)
    there, here = keeper.memory(), handle.memory()
    held.free()
    held.free()
    assert (there.used_bytes, there.limit_bytes) == (24 * MIB, LIMIT_BYTES), f"with 24 MiB held there: {there}"
    assert here.used_bytes == 0, f"what is held there counts here: {here}"
    assert keeper.memory().used_bytes == 0, f"after freeing twice: {keeper.memory()}"


def test_what_fails_there_is_raised_here(keeper: Keeper, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model file"):
        keeper.load(tmp_path / "none.onnx")
    with pytest.raises(RuntimeFailure, match="ValueError: size_bytes is 2: expected at least 4") as odd:
        keeper.allocate(2)
    held = ballast.fill(keeper.allocate)
    with pytest.raises(RuntimeFailure, match="Available memory of") as full:
        keeper.allocate(MIB)
    assert not keeper.healthy().ok, "a full device was found healthy"
    ballast.free(held)
    assert odd.value.kind is ErrorKind.OTHER, f"a size that makes no sense is {odd.value.kind}"
    found = full.value.kind, full.value.shortage
    assert found == (ErrorKind.DEVICE_OOM, Shortage.CAPPED), f"past the cap the error is {found}"
    assert keeper.healthy().ok and keeper.alive, "it did not get over its errors"


def test_what_is_dropped_is_given_back(keeper: Keeper) -> None:
    held = [keeper.allocate(8 * MIB)]
    model = [keeper.load(DEFAULT_MODEL)]
    model[0].run(_features(1))
    assert keeper.models == 1, f"{keeper.models} models are counted"
    held.clear()
    model.clear()
    used = keeper.memory().used_bytes
    assert (used, keeper.models) == (0, 0), f"{used} bytes are in use, {keeper.models} models counted"


def test_threads_that_ask_at_once_get_their_own_answers(keeper: Keeper) -> None:
    model = keeper.load(DEFAULT_MODEL)
    expected = {batch: model.run(_features(batch)) for batch in range(1, 9)}

    def ask(batch: int) -> bool:
        keeper.memory()
        return np.array_equal(model.run(_features(batch)), expected[batch])

    with ThreadPoolExecutor(8) as threads:
        same = list(threads.map(ask, [*expected] * 4))
    assert all(same), f"of {len(same)} answers {same.count(False)} are another's"


def test_it_ignores_the_interrupt_that_its_parent_gets(keeper: Keeper) -> None:
    assert os.getsid(keeper.process_id) != os.getsid(0), "Ctrl-C in the parent's terminal ends it too"


# How it ends.


def test_a_child_that_is_killed_is_lost_and_says_so(keeper: Keeper) -> None:
    held, model = keeper.allocate(MIB), keeper.load(DEFAULT_MODEL)
    os.kill(keeper.process_id, signal.SIGKILL)
    with pytest.raises(
        RuntimeFailure, match=rf"the process {keeper.process_id} that had the device ended .* -9"
    ) as one:
        model.run(_features(1))
    assert one.value.kind is ErrorKind.PROCESS_LOST, f"the error is {one.value.kind}"
    assert not keeper.alive, "it passes for alive"
    health = keeper.healthy()
    assert not health.ok and "ended with status -9" in health.detail, f"a device without a process is {health}"
    # What it held went with it: giving it back is nothing, and no error.
    held.free()
    model.close()


def test_closing_leaves_neither_processes_nor_descriptors(handle: Cpu) -> None:
    before = open_descriptors()
    made = Keeper(handle.share())
    process = psutil.Process(made.process_id)
    made.load(DEFAULT_MODEL).run(_features(1))
    made.close()
    made.close()
    assert not process.is_running(), "its process runs on"
    assert not (changes := changes_since(before)), changes


def test_a_child_that_cannot_make_the_device_is_ended_and_says_why(handle: Cpu) -> None:
    before, children = open_descriptors(), len(psutil.Process().children())
    share = handle.share()
    with pytest.raises(RuntimeFailure, match="ValueError: limit_bytes is 5: expected at least 1048576"):
        Keeper(Share(dict(share.data) | {"limit_bytes": 5}, share.descriptors))
    assert len(psutil.Process().children()) == children, "its process runs on"
    assert not (changes := changes_since(before)), changes


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    program = """
from backends._keeper import Keeper
from backends.cpu import Cpu
device = Cpu()
device.limit_memory(96 << 20)
keeper = Keeper(device.share())
held = keeper.allocate(32 << 20)
print(keeper.process_id, flush=True)
input()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.memory_info().rss >= 32 * MIB, f"the child holds {child.memory_info().rss} bytes"
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    until(lambda: _gone(child), "the child ended with its parent")


# What does not answer.


def test_a_child_that_hangs_is_killed_and_the_call_fails(
    keeper: Keeper, handle: Cpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = keeper.load(DEFAULT_MODEL)
    monkeypatch.setattr(backends._keeper, "_PATIENCE_S", 5.0)
    with handle.arm(FaultPlan(Site.RUNTIME_HANG)) as fault:
        with pytest.raises(RuntimeFailure) as caught:
            model.run(_features(1))
        fired = fault.record().faults_fired
    assert caught.value.kind is ErrorKind.PROCESS_LOST and fired == 1, f"{caught.value.kind}, {fired} fired"
    assert not keeper.alive, "it lives on"


def test_an_answer_that_nobody_waited_for_is_never_taken_for_another(keeper: Keeper, handle: Cpu) -> None:
    model = keeper.load(DEFAULT_MODEL)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with handle.arm(FaultPlan(Site.RUNTIME_HANG)):
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                model.run(_features(1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RuntimeFailure, match="had the device ended"):
        keeper.memory()


def test_a_child_for_a_fallback_sees_no_accelerator(handle: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for made, expected in ((handle, "0"), (handle.fallback(), "")):
        child = Keeper(made.share())
        seen = psutil.Process(child.process_id).environ().get("CUDA_VISIBLE_DEVICES")
        child.close()
        assert seen == expected, f"the child of {made.device} sees {seen!r}"
