"""The contract is stated in full, and each claim is proved on every backend that can run here.

A claimed yes is proved live. A no is a strict expected failure: its proof must fail, so that a stale no turns red.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backends
from backends.contract import (
    YES,
    Allocation,
    Backend,
    BackendError,
    Capability,
    FaultPlan,
    FaultRecord,
    MemoryReading,
    Model,
    Provenance,
    Site,
    Support,
    Unsupported,
    no,
)
from backends.errors import ErrorKind, classify
from backends.faults import ballast, interposer
from backends.faults.ballast import HostBallast, Neighbour
from backends.faults.cuda_ballast import DeviceBallast
from backends.faults.interposer import Control
from backends.model import DEFAULT_MODEL

ROOT = Path(__file__).resolve().parents[2]

MIB = 1 << 20
LIMIT_BYTES = 96 * MIB
BATCH = 16
DECLARED = [found.name for found in backends.declared()]
AVAILABLE = [found.name for found, availability in backends.available() if availability.available]
PAGE_BYTES = 4096
#: What a site of the device needs, and what a plan there leaves the device without.
OOM_SITES = {
    Site.DEVICE_MEMORY: Capability.DEVICE_OOM,
    Site.DEVICE_CACHE: Capability.CACHE_OOM,
    Site.DEVICE_GARBAGE: Capability.DEVICE_OOM,
}
STICKY_SITES = (Site.DEVICE_ERROR, Site.DEVICE_ASSERT, Site.DEVICE_ADDRESS)
InChild = Callable[[str], Any]


@pytest.fixture(scope="module", params=AVAILABLE)
def made(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Give each available backend in turn, bounded where it says that it can be."""
    made = backends.create(request.param)()
    if made.capabilities[Capability.MEMORY_LIMIT].yes:
        made.limit_memory(LIMIT_BYTES)
    yield made
    made.close()


@pytest.fixture
def device(made: Backend) -> Backend:
    """Give the same, without what the test before has left there."""
    made.collect()
    made.release_cached()
    return made


def _features(model: Model, batch: int = BATCH) -> Any:
    return np.random.RandomState(3).standard_normal((batch, model.window_frames, 80)).astype(np.float32)


def _failure(act: Callable[[], object]) -> BaseException:
    """Give the error that the act raises; it has to raise one."""
    try:
        act()
    except Exception as error:
        return error
    raise AssertionError("there was no error")


def _kind(act: Callable[[], object]) -> ErrorKind:
    return classify(_failure(act))


def _fits(device: Backend, size_bytes: int) -> bool:
    try:
        device.allocate(size_bytes).free()
    except Exception as error:
        if not classify(error).is_oom:
            raise
        return False
    return True


# What is stated.


@pytest.mark.parametrize("name", DECLARED)
def test_every_declared_backend_states_every_capability(name: str) -> None:
    stated = set(backends.create(name).capabilities)
    assert stated == set(Capability), f"{name} leaves unstated: {sorted(c.value for c in set(Capability) - stated)}"


@pytest.mark.parametrize("name", DECLARED)
def test_a_no_says_why_and_where_that_is_documented(name: str) -> None:
    for capability, support in backends.create(name).capabilities.items():
        if not support.yes:
            assert len(support.reason) > 20, f"{name}, {capability.value}: the reason is {support.reason!r}"
            assert support.link.startswith("https://"), f"{name}, {capability.value}: the link is {support.link!r}"


def test_something_is_available_to_prove_claims_on() -> None:
    assert AVAILABLE, f"none of the declared backends {DECLARED} can run here: nothing below proves anything"


@pytest.mark.parametrize("missing", list(Capability), ids=lambda c: c.value)
def test_an_adapter_that_leaves_one_capability_unstated_cannot_be_made(missing: Capability) -> None:
    stated = {capability: YES for capability in Capability if capability is not missing}
    with pytest.raises(TypeError, match=f"Forgetful does not state these capabilities: {missing.value}$"):
        type("Forgetful", (Backend,), {"capabilities": stated})


def test_every_capability_has_a_definition() -> None:
    short = [c.value for c in Capability if len(c.__doc__ or "") < 20]
    assert not short, f"capabilities without a definition: {short}"


@pytest.mark.parametrize(("reason", "link"), [("", "https://example.org"), ("it cannot", ""), ("", "")])
def test_a_no_needs_a_reason_and_a_link(reason: str, link: str) -> None:
    with pytest.raises(ValueError, match="needs a reason and a link"):
        no(reason, link)
    with pytest.raises(ValueError, match="needs a reason and a link"):
        Support(False, reason, link)


# Data that travel.

PLANS = st.builds(
    FaultPlan,
    site=st.sampled_from(Site),
    nth=st.integers(1, 1 << 40),
    times=st.none() | st.integers(1, 1 << 40),
    min_bytes=st.integers(1, 1 << 50),
    process=st.none() | st.text(),
    thread=st.none() | st.text(),
    disarm_after_s=st.floats(1e-6, 1e9),
)
RECORDS = st.builds(
    FaultRecord,
    points_seen=st.integers(0, 1 << 40),
    faults_fired=st.integers(0, 1 << 40),
    absorbed=st.integers(0, 1 << 40),
    provenance=st.none() | st.sampled_from(Provenance),
    detail=st.text(),
)


@given(PLANS)
@settings(max_examples=50, deadline=None)
def test_a_plan_survives_a_trip_through_json(plan: FaultPlan) -> None:
    assert FaultPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(RECORDS)
@settings(max_examples=50, deadline=None)
def test_a_record_survives_a_trip_through_json(record: FaultRecord) -> None:
    assert FaultRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    "change",
    [
        {"nth": 0},
        {"nth": -1},
        {"times": 0},
        {"min_bytes": 0},
        {"disarm_after_s": 0.0},
        {"disarm_after_s": float("nan")},
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        FaultPlan(Site.DEVICE_MEMORY, **change)


def test_what_is_not_a_plan_is_refused() -> None:
    data = FaultPlan(Site.DEVICE_CACHE).to_json()
    with pytest.raises(ValueError, match="nowhere"):
        FaultPlan.from_json(data | {"site": "nowhere"})
    with pytest.raises(TypeError, match="colour"):
        FaultPlan.from_json(data | {"colour": "red"})


@pytest.mark.parametrize(
    ("limit", "fraction"), [(None, 0.25), (50, 0.5), (400, 0.25), (10, 2.5)], ids=["none", "lower", "higher", "over"]
)
def test_pressure_is_a_share_of_the_smaller_of_limit_and_total(limit: int | None, fraction: float) -> None:
    found = MemoryReading(25, 25, limit, 100, "process", True, "a test").fraction
    assert found == fraction, f"25 of total 100 under limit {limit} is {found}, expected {fraction}"


# What is claimed, proved. Each proof raises (an assertion, or Unsupported) where the claim is not true.


def _prove_memory_limit(device: Backend, in_child: InChild) -> None:
    device.limit_memory(LIMIT_BYTES)
    held = ballast.fill(device.allocate)
    total = sum(piece.size_bytes for piece in held)
    kind = _kind(lambda: device.allocate(64 << 10))
    ballast.free(held)
    assert LIMIT_BYTES * 0.95 <= total <= LIMIT_BYTES, f"{total} bytes could be had under a limit of {LIMIT_BYTES}"
    assert kind is ErrorKind.DEVICE_OOM, f"past the limit the error is {kind}"
    assert device.memory().limit_bytes == LIMIT_BYTES, f"the reading's limit is {device.memory().limit_bytes}"


def _reserved_bytes(device: Backend) -> int:
    """Measure what the device's process keeps: by the device's own reading, or of the resident memory here."""
    reading = device.memory()
    return reading.reserved_bytes if reading.exact else psutil.Process().memory_info().rss


def _prove_release_cached(device: Backend, in_child: InChild) -> None:
    held = [device.allocate(16 * MIB) for _ in range(4)]
    ballast.free(held)
    before = _reserved_bytes(device)
    released = device.release_cached()
    fell = before - _reserved_bytes(device)
    assert fell > 48 * MIB, f"what is kept fell by {fell} bytes where 64 MiB were cached"
    assert abs(released - fell) < 4 * MIB, f"it says that {released} bytes were released, measured {fell}"


def _prove_exact_memory_reading(device: Backend, in_child: InChild) -> None:
    # The process that has the device is there from now on, and did all this before.
    device.allocate(8 * MIB).free()
    before = device.memory()
    held = device.allocate(8 * MIB)
    after = device.memory()
    held.free()
    freed = device.memory()
    assert after.exact, f"the reading is not exact ({after.source})"
    # A page or two: what an allocator writes beside a block.
    rose, fell = after.used_bytes - before.used_bytes, after.used_bytes - freed.used_bytes
    assert 0 <= rose - 8 * MIB <= 2 * PAGE_BYTES, f"8 MiB changed it by {rose}"
    assert 0 <= fell - 8 * MIB <= 2 * PAGE_BYTES, f"giving 8 MiB back changed it by {fell}"


def _prove_cache_oom(device: Backend, in_child: InChild) -> None:
    model = device.load(DEFAULT_MODEL)
    features = _features(model)
    # As it comes about by itself: many small requests, all given back, and then large ones.
    ballast.free(ballast.fill(device.allocate, (256 << 10,)))
    kind = _kind(lambda: model.run(features))
    device.release_cached()
    model.run(features)
    assert kind is ErrorKind.DEVICE_OOM, f"with a full cache the error is {kind}"
    # As a fault brings it about.
    with device.arm(FaultPlan(Site.DEVICE_CACHE)) as fault:
        kinds = [_kind(lambda: model.run(features)) for _ in range(2)]
        device.release_cached()
        model.run(features)
        record = fault.record()
    assert kinds == [ErrorKind.DEVICE_OOM] * 2, f"before the release the errors are {kinds}"
    assert (record.points_seen, record.faults_fired, record.provenance) == (3, 1, Provenance.CAPPED), f"{record}"


def _prove_device_oom(device: Backend, in_child: InChild) -> None:
    model = device.load(DEFAULT_MODEL)
    features = _features(model)
    for site in (Site.DEVICE_MEMORY, Site.DEVICE_GARBAGE):
        with device.arm(FaultPlan(site)) as fault:
            kind = _kind(lambda: model.run(features))
            record = fault.record()
        assert kind is ErrorKind.DEVICE_OOM, f"{site.value}: the error is {kind}"
        assert record.faults_fired == 1, f"{site.value}: {record}"
        assert record.provenance in (Provenance.CAPPED, Provenance.EXHAUSTED), f"{site.value}: {record}"


def _prove_host_oom(device: Backend, in_child: InChild) -> None:
    found = in_child(f"""
import json, backends
from backends.contract import FaultPlan, Site
from backends.errors import classify
from backends.model import DEFAULT_MODEL
device = backends.create({device.name!r})()
fault = device.arm(FaultPlan(Site.HOST_MEMORY, min_bytes=1 << 20))
kind, text = "none", ""
try:
    device.load(DEFAULT_MODEL)
except Exception as error:
    kind, text = classify(error).value, repr(error)
print(json.dumps([kind, text, fault.record().to_json()]))
""")
    kind, text, record = found[0], found[1], FaultRecord.from_json(found[2])
    assert kind == ErrorKind.HOST_OOM.value, f"a load without host memory is {kind}: {text}"
    assert record.faults_fired == 1 and record.provenance is Provenance.CAPPED, f"the record is {record}"


def _prove_fallback(device: Backend, in_child: InChild) -> None:
    model = device.load(DEFAULT_MODEL)
    features = _features(model)
    expected = model.run(features)
    model.close()
    device.release_cached()
    held = ballast.fill(device.allocate)
    assert _kind(lambda: device.allocate(MIB)) is ErrorKind.DEVICE_OOM, "the device is not full"
    fallback = device.fallback()
    scores = fallback.load(DEFAULT_MODEL).run(features)
    still_full = not _fits(device, MIB)
    ballast.free(held)
    fallback.close()
    worst = float(np.max(np.abs(scores - expected)))
    assert fallback.device != device.device, f"the fallback is on {fallback.device} too"
    assert worst <= 1e-3, f"the fallback's scores differ by {worst:.1e}, expected at most 1e-3"
    assert still_full, "the fallback took its memory from the device"


def _load_and_run(device: Backend) -> None:
    model = device.load(DEFAULT_MODEL)
    model.run(_features(model))


def _prove_device_error(device: Backend, in_child: InChild) -> None:
    for site in STICKY_SITES:
        with device.arm(FaultPlan(site)) as fault:
            # Loaded anew each time: after such an error the process that had the device is replaced.
            kind = _kind(lambda: _load_and_run(device))
            record = fault.record()
        assert kind.is_device_error, f"{site.value}: the error is {kind}"
        assert (record.faults_fired, record.provenance) == (1, Provenance.DEVICE), f"{site.value}: {record}"
        assert device.healthy().ok, f"{site.value}: the device is not healthy afterwards: {device.healthy()}"


def _neighbour(device: Backend) -> Neighbour:
    """Hold memory in another process: all but 32 MiB of the card that the device is, or else 64 MiB of the host's."""
    kind, _, number = device.device.partition(":")
    return DeviceBallast(int(number), 32 * MIB, 300.0) if kind == "cuda" else HostBallast(64 * MIB, 300.0)


def _prove_device_memory_of_others(device: Backend, in_child: InChild) -> None:
    def room() -> int:
        held = ballast.fill(device.allocate, (4 * MIB,))
        total = sum(piece.size_bytes for piece in held)
        ballast.free(held)
        device.release_cached()
        return total

    alone = room()
    with _neighbour(device):
        shared = room()
    # More than the one piece by which two fillings may differ.
    assert shared < alone - 4 * MIB, f"with memory held by another process {shared} bytes can be had, without {alone}"


def _prove_runtime_crash(device: Backend, in_child: InChild) -> None:
    for site, status in ((Site.RUNTIME_CRASH, -signal.SIGFPE), (Site.RUNTIME_HANG, None)):
        with device.arm(FaultPlan(site)) as fault:
            child = _run_shared(device)
            deadline_s = time.monotonic() + 60.0
            while not fault.record().faults_fired and child.poll() is None and time.monotonic() < deadline_s:
                time.sleep(0.02)
            try:
                ended = child.wait(1.5 if status is None else 60.0)
            except subprocess.TimeoutExpired:
                ended = None
                child.kill()
                child.wait()
            record = fault.record()
        assert ended == status, f"{site.value}: the process that ran the model ended with {ended}, expected {status}"
        assert (record.faults_fired, record.provenance) == (1, Provenance.KILLED), f"{site.value}: {record}"
    with device.arm(FaultPlan(Site.LIBRARY_MISSING)) as fault:
        assert _run_shared(device).wait(60.0) == 3, "a missing library is no error"
        record = fault.record()
    assert (record.faults_fired, record.provenance) == (1, Provenance.MISSING), f"{record}"


def _run_shared(device: Backend) -> subprocess.Popen[bytes]:
    """Run the model once in a process of its own; it ends with 3 when the runtime raises an error that is not OOM."""
    share = device.share()
    program = f"""
import numpy as np, backends
from backends.errors import ErrorKind, classify
from backends.faults.limits import declare_expendable
from backends.model import DEFAULT_MODEL
declare_expendable()
model = backends.rebuild({dict(share.data)!r}).load(DEFAULT_MODEL)
try:
    model.run(np.zeros((1, model.window_frames, 80), np.float32))
except Exception as error:
    raise SystemExit(3 if classify(error) is ErrorKind.OTHER else 4)
"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, pass_fds=share.descriptors)


def _refused(device: Backend, in_child: InChild, site: Site, min_bytes: int) -> tuple[str, FaultRecord, bool, bool]:
    """Refuse one request of a run, in a process that has the device and is under the interposer.

    Gives the error, the record, whether it struck in that process, and whether the next run is right.
    """
    if (reason := interposer.refusal()) is not None:
        pytest.skip(f"not run: {reason}")
    limit = f"host.limit_memory({LIMIT_BYTES})" if device.capabilities[Capability.MEMORY_LIMIT].yes else ""
    program = f"""
import json, os
import numpy as np, backends
from backends.contract import FaultPlan, Site
from backends.errors import classify
from backends.faults.interposer import Control
from backends.model import DEFAULT_MODEL
host = backends.create({device.name!r})({device.device!r})
{limit}
share = dict(host.share().data)
# As a worker has it: the model runs in this process.
device = backends.rebuild({{**share, "board": os.dup(share["board"])}})
model = device.load(DEFAULT_MODEL)
features = np.random.RandomState(3).standard_normal(({BATCH}, model.window_frames, 80)).astype(np.float32)
expected = model.run(features)
device.release_cached()
kind = "none"
with device.arm(FaultPlan(Site({site.value!r}), min_bytes={min_bytes})) as fault:
    try:
        model.run(features)
    except Exception as error:
        kind = classify(error).value
    record = fault.record()
here = Control.attached().fired_process() == os.getpid()
same = bool(np.array_equal(model.run(features), expected))
print(json.dumps([kind, record.to_json(), here, same]))
"""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        for name, value in Control.create(Path(folder) / "control").environment(os.environ).items():
            patched.setenv(name, value)
        kind, record, here, same = in_child(program)
    return kind, FaultRecord.from_json(record), here, same


def _prove_allocation_faults(device: Backend, in_child: InChild) -> None:
    # What the model computes in, and nothing of Python's.
    kind, record, here, same = _refused(device, in_child, Site.HOST_ALLOCATION, MIB)
    assert ErrorKind(kind).is_oom, f"a run with a request refused is {kind}"
    assert (record.faults_fired, record.provenance) == (1, Provenance.INTERPOSED), f"the record is {record}"
    assert here, f"it struck in another process than the one that runs the model: {record}"
    assert same, "the next run has other scores"


def _prove_device_allocation_faults(device: Backend, in_child: InChild) -> None:
    for site, expected in ((Site.DEVICE_ALLOCATION, {ErrorKind.DEVICE_OOM.value}), (Site.DEVICE_LAUNCH, None)):
        kind, record, here, _ = _refused(device, in_child, site, 1)
        assert kind in expected if expected else kind != "none", f"{site.value}: the error is {kind}"
        assert (record.faults_fired, record.provenance) == (1, Provenance.INTERPOSED), f"{site.value}: {record}"
        assert here, f"{site.value}: it struck in another process than the one that runs the model: {record}"


PROOFS: dict[Capability, Callable[[Backend, InChild], None]] = {
    Capability.MEMORY_LIMIT: _prove_memory_limit,
    Capability.RELEASE_CACHED: _prove_release_cached,
    Capability.EXACT_MEMORY_READING: _prove_exact_memory_reading,
    Capability.CACHE_OOM: _prove_cache_oom,
    Capability.DEVICE_OOM: _prove_device_oom,
    Capability.HOST_OOM: _prove_host_oom,
    Capability.FALLBACK: _prove_fallback,
    Capability.DEVICE_ERROR: _prove_device_error,
    Capability.RUNTIME_CRASH: _prove_runtime_crash,
    Capability.DEVICE_MEMORY_OF_OTHERS: _prove_device_memory_of_others,
    Capability.ALLOCATION_FAULTS: _prove_allocation_faults,
    Capability.DEVICE_ALLOCATION_FAULTS: _prove_device_allocation_faults,
}


@pytest.mark.parametrize("capability", list(Capability), ids=lambda c: c.value)
def test_a_claim_is_true(capability: Capability, device: Backend, in_child: InChild) -> None:
    support = device.capabilities[capability]
    if support.yes:
        PROOFS[capability](device, in_child)
    else:
        with pytest.raises((AssertionError, Unsupported)):
            PROOFS[capability](device, in_child)


def test_what_is_not_supported_is_refused_with_reason_and_link(device: Backend) -> None:
    for capability, support in device.capabilities.items():
        if support.yes:
            device.require(capability)
        else:
            with pytest.raises(Unsupported) as caught:
                device.require(capability)
            assert support.reason in str(caught.value), f"the reason is missing: {caught.value}"
            assert support.link in str(caught.value), f"the link is missing: {caught.value}"


def test_arming_a_fault_that_is_not_supported_is_refused(device: Backend) -> None:
    needs = OOM_SITES | dict.fromkeys(STICKY_SITES, Capability.DEVICE_ERROR)
    for site, capability in needs.items():
        if device.capabilities[capability].yes:
            device.arm(FaultPlan(site)).disarm()
        else:
            with pytest.raises(Unsupported, match=capability.value):
                device.arm(FaultPlan(site))


def test_single_allocations_are_refused_only_under_the_interposer(device: Backend) -> None:
    _needs(device, Capability.ALLOCATION_FAULTS)
    with pytest.raises(BackendError, match="host_allocation needs a process that was started under the interposer"):
        device.arm(FaultPlan(Site.HOST_ALLOCATION))


@pytest.mark.parametrize("name", DECLARED)
def test_allocations_of_the_device_can_be_refused_where_it_has_memory_of_its_own(name: str) -> None:
    made = backends.create(name)
    assert made.capabilities[Capability.ALLOCATION_FAULTS].yes, f"{name} says no to allocation_faults"
    claimed, has_card = made.capabilities[Capability.DEVICE_ALLOCATION_FAULTS].yes, name.endswith("-cuda")
    assert claimed is has_card, f"{name}: device_allocation_faults is {claimed}, expected {has_card}"


@pytest.mark.parametrize("site", [Site.DEVICE_ALLOCATION, Site.DEVICE_LAUNCH], ids=lambda s: s.value)
def test_a_device_without_memory_of_its_own_has_none_to_refuse(device: Backend, site: Site) -> None:
    if device.capabilities[Capability.DEVICE_ALLOCATION_FAULTS].yes:
        pytest.skip(f"{device.name} has a device with memory of its own")
    with pytest.raises(Unsupported, match="device_allocation_faults"):
        device.arm(FaultPlan(site))


# What each fault is, shown by what cures it and what does not.


def _needs(device: Backend, capability: Capability) -> None:
    if not device.capabilities[capability].yes:
        pytest.skip(f"{device.name} states: {device.capabilities[capability].reason}")


@pytest.mark.parametrize("site", OOM_SITES, ids=lambda s: s.value)
def test_an_injected_device_oom_is_genuine_and_lifting_it_cures(device: Backend, site: Site) -> None:
    _needs(device, OOM_SITES[site])
    model = device.load(DEFAULT_MODEL)
    features = _features(model)
    expected = model.run(features)
    with device.arm(FaultPlan(site, times=None)) as fault:
        kinds = [_kind(lambda: model.run(features)) for _ in range(2)]
        record = fault.record()
    device.collect()
    device.release_cached()
    assert kinds == [ErrorKind.DEVICE_OOM] * 2, f"the errors are {kinds}"
    assert record.provenance in (Provenance.CAPPED, Provenance.EXHAUSTED), f"the record is {record}"
    assert (record.points_seen, record.faults_fired, record.absorbed) == (2, 2, 0), f"the record is {record}"
    assert np.array_equal(model.run(features), expected), "the scores differ after the fault was lifted"


def test_device_garbage_is_cured_by_collecting_and_not_by_releasing(device: Backend) -> None:
    _needs(device, Capability.DEVICE_OOM)
    model = device.load(DEFAULT_MODEL)
    features = _features(model)
    with device.arm(FaultPlan(Site.DEVICE_GARBAGE)):
        kinds = [_kind(lambda: model.run(features))]
        device.release_cached()
        kinds.append(_kind(lambda: model.run(features)))
        device.collect()
        device.release_cached()
        model.run(features)
    assert kinds == [ErrorKind.DEVICE_OOM] * 2, f"before the collection the errors are {kinds}"


def test_a_device_held_by_others_is_cured_by_a_smaller_batch_only(device: Backend) -> None:
    _needs(device, Capability.DEVICE_OOM)
    model = device.load(DEFAULT_MODEL)
    # Halfway: on torch-cpu a batch of 2 needs 0.9 MiB beyond its tensors, for the code of its kernels.
    fits = (model.working_set_bytes(2) + model.working_set_bytes(4)) // 2
    with device.arm(FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=fits)):
        kinds = [_kind(lambda: model.run(_features(model, 4)))]
        device.collect()
        device.release_cached()
        kinds.append(_kind(lambda: model.run(_features(model, 4))))
        device.release_cached()
        model.run(_features(model, 2))
    assert kinds == [ErrorKind.DEVICE_OOM] * 2, f"with {fits} bytes free the errors of a batch of 4 are {kinds}"


# The rest of the contract.


def test_a_healthy_device_is_found_healthy_and_a_full_one_is_not(device: Backend) -> None:
    _needs(device, Capability.MEMORY_LIMIT)
    before = device.healthy()
    held = ballast.fill(device.allocate)
    full = device.healthy()
    ballast.free(held)
    after = device.healthy()
    assert before.ok and 0 < before.max_abs_error < 1e-3 and before.latency_s > 0, f"healthy: {before}"
    assert not full.ok, f"a full device was found healthy: {full}"
    assert classify(RuntimeError(full.detail)).is_oom, f"the detail does not say why: {full}"
    assert after.ok, f"with the memory back: {after}"


def test_freeing_twice_counts_once(device: Backend) -> None:
    device.allocate(MIB).free()
    before = device.memory().used_bytes
    piece: Allocation = device.allocate(MIB)
    piece.free()
    piece.free()
    after = device.memory().used_bytes
    assert abs(after - before) <= 2 * PAGE_BYTES, f"{before} bytes in use before, {after} after"


def test_what_is_dropped_is_given_back(device: Backend) -> None:
    device.allocate(MIB).free()
    before = device.memory().used_bytes
    held = [device.allocate(16 * MIB)]
    held.clear()
    after = device.memory().used_bytes
    assert abs(after - before) <= 2 * PAGE_BYTES, f"{before} bytes in use before, {after} after the only reference went"


def test_collecting_reaches_this_process(device: Backend) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    gone = weakref.ref(Cycle())
    assert gone() is not None, "the cycle was collected before it was to be"
    found = device.collect()
    assert found >= 1 and gone() is None, f"{found} objects were collected, and the cycle is {gone()}"


def test_a_device_is_made_by_its_name_and_by_no_other(device: Backend) -> None:
    again = type(device)(device.device)
    assert again.device == device.device, f"made by the name {device.device!r}, it is {again.device!r}"
    again.close()
    for name in ("abacus:0", f"{device.device}9x"):
        with pytest.raises(BackendError, match=f"{device.name} has no device '{name}': expected"):
            type(device)(name)


def test_probing_an_available_backend_names_its_runtime(device: Backend) -> None:
    found = type(device).probe()
    assert found.available and found.runtime and not found.reason, f"the probe says {found}"
