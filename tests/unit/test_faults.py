"""Faults strike where the plan says, are counted as they are, and are lifted without a trace."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from backends.contract import BackendError, FaultPlan, FaultRecord, Provenance, Site
from backends.cpu import Cpu
from backends.errors import ErrorKind, classify
from backends.faults import ballast, limits
from backends.faults.ballast import HostBallast
from backends.faults.plan import Board, CountingFault
from backends.model import DEFAULT_MODEL
from tests.unit.waiting import until

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


def _counting(**plan: Any) -> tuple[CountingFault, threading.Event]:
    lifted = threading.Event()
    return Board().arm(FaultPlan(Site.DEVICE_MEMORY, **plan), Provenance.CAPPED, lifted.set), lifted


def _features(batch: int = 16) -> Any:
    return np.random.RandomState(3).standard_normal((batch, 150, 80)).astype(np.float32)


# The board.


def test_a_board_that_could_not_be_mapped_leaves_no_descriptor(in_child: Callable[[str], Any]) -> None:
    found = in_child("""
import json, resource
from pathlib import Path
from backends.faults.plan import Board

def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))

kept = Board()
before, (soft, hard) = descriptors(), resource.getrlimit(resource.RLIMIT_AS)
errors = []
for _ in range(20):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, hard))
    try:
        Board()
        error = ""
    except OSError as failure:
        error = failure.strerror
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    errors.append(error)
print(json.dumps([errors, before, descriptors()]))
""")
    errors, before, after = found
    assert set(errors) == {"Cannot allocate memory"}, f"mapped without room: {errors}"
    assert after == before, f"{before} descriptors before, {after} after"


# Counting.


@pytest.mark.parametrize(
    ("nth", "times", "struck"),
    [(1, 1, [1]), (3, 1, [3]), (2, 2, [2, 3]), (4, None, [4, 5, 6]), (1, None, [1, 2, 3, 4, 5, 6]), (7, 1, [])],
)
def test_a_plan_strikes_from_the_nth_point_so_many_times(nth: int, times: int | None, struck: list[int]) -> None:
    fault, _ = _counting(nth=nth, times=times)
    found = [point for point in range(1, 7) if fault.strike()]
    assert found == struck, f"nth {nth}, times {times}: struck at {found}, expected {struck}"
    assert fault.record().points_seen == 6, f"6 points were run: {fault.record()}"
    fault.disarm()


def test_a_plan_for_one_thread_counts_all_and_strikes_only_there() -> None:
    fault, _ = _counting(thread="the one", times=None)
    found: dict[str, bool] = {}
    for name in ("the one", "another"):
        thread = threading.Thread(target=lambda name=name: found.update({name: fault.strike()}), name=name)
        thread.start()
        thread.join()
    fault.disarm()
    assert found == {"the one": True, "another": False}, f"struck by thread: {found}"
    assert fault.record().points_seen == 2, f"both points were seen: {fault.record()}"


def test_a_fault_that_never_fired_has_no_provenance() -> None:
    fault, _ = _counting()
    fault.strike()
    assert fault.record() == FaultRecord(1, 0, 0, None), f"struck, but nothing came of it yet: {fault.record()}"
    fault.fired("an error")
    assert fault.record() == FaultRecord(1, 1, 0, Provenance.CAPPED, "an error"), f"fired: {fault.record()}"
    fault.absorbed()
    assert fault.record().absorbed == 1, f"absorbed: {fault.record()}"
    fault.disarm()


def test_disarming_lifts_once() -> None:
    lifts: list[int] = []
    fault = Board().arm(FaultPlan(Site.DEVICE_MEMORY, times=None), Provenance.CAPPED, lambda: lifts.append(1))
    assert fault.strike(), "an armed plan did not strike"
    with fault:
        fault.disarm()
    fault.disarm()
    assert len(lifts) == 1, f"it was lifted {len(lifts)} times"
    assert not fault.strike() and not fault.armed, "it struck after disarming"


def test_a_plan_disarms_itself_at_its_deadline() -> None:
    began_s = time.monotonic()
    fault, lifted = _counting(times=None, disarm_after_s=0.1)
    assert fault.strike(), "it did not strike before its deadline"
    assert lifted.wait(60.0), "it was not lifted within 60 s of a deadline of 0.1 s"
    waited_s = time.monotonic() - began_s
    assert waited_s >= 0.1, f"it was lifted after {waited_s:.3f} s, before its deadline of 0.1 s"
    assert not fault.strike(), "it struck after its deadline"


# On a device.


def test_a_plan_fails_the_third_run_and_no_other(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    failed = []
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, nth=3)) as fault:
        for run in range(1, 6):
            try:
                model.run(_features())
            except Exception as error:
                failed.append((run, classify(error)))
                bounded.release_cached()
        record = fault.record()
    assert failed == [(3, ErrorKind.DEVICE_OOM)], f"runs that failed: {failed}"
    assert (record.points_seen, record.faults_fired, record.absorbed) == (5, 1, 0), f"the record is {record}"
    assert "Available memory of" in record.detail, f"the detail is not the runtime's own text: {record.detail!r}"


@pytest.mark.parametrize("site", [Site.DEVICE_MEMORY, Site.DEVICE_CACHE, Site.DEVICE_GARBAGE], ids=lambda s: s.value)
def test_disarming_gives_everything_back(bounded: Cpu, site: Site) -> None:
    model = bounded.load(DEFAULT_MODEL)
    model.run(_features())
    before = bounded.memory().used_bytes
    with bounded.arm(FaultPlan(site, times=None)), pytest.raises(Exception, match="Available memory of"):
        model.run(_features())
    gc.collect()
    bounded.release_cached()
    after = bounded.memory().used_bytes
    assert after == before, f"{before} bytes in use before, {after} after disarming"
    bounded.allocate(88 * MIB).free()


def test_the_deadline_gives_the_device_back_by_itself(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None, disarm_after_s=0.5))
    with pytest.raises(Exception, match="Available memory of"):
        model.run(_features())
    until(lambda: bounded.memory().used_bytes < 48 * MIB, "the ballast is given back")
    bounded.release_cached()
    model.run(_features())


def test_a_run_that_needs_less_than_is_left_absorbs_the_fault(bounded: Cpu) -> None:
    model = bounded.load(DEFAULT_MODEL)
    with bounded.arm(FaultPlan(Site.DEVICE_MEMORY, min_bytes=model.working_set_bytes(8))) as fault:
        model.run(_features(2))
        record = fault.record()
    assert (record.faults_fired, record.absorbed) == (0, 1), f"a run of 2 where 8 fit: {record}"


def test_a_plan_that_is_disarmed_between_striking_and_acting_takes_nothing(bounded: Cpu) -> None:
    fault = bounded.arm(FaultPlan(Site.DEVICE_MEMORY, times=None))
    assert isinstance(fault, CountingFault) and fault.strike(), "it did not strike"
    fault.disarm()
    bounded._impose(fault)
    assert bounded.memory().used_bytes == 0, f"{bounded.memory().used_bytes} bytes are held, and nobody frees them"


# Ballast.


def test_ballast_fills_the_device_and_leaves_what_is_asked(bounded: Cpu) -> None:
    held = ballast.fill(bounded.allocate)
    full = sum(piece.size_bytes for piece in held)
    held = ballast.leave(held, 10 * MIB)
    left = full - sum(piece.size_bytes for piece in held)
    bounded.release_cached()
    with pytest.raises(RuntimeError, match="Available memory of"):
        bounded.allocate(10 * MIB + 64 * 1024)
    ballast.free(held)
    assert full > 95 * MIB, f"{full} bytes of 96 MiB were taken"
    assert left < 10 * MIB, f"{left} bytes were given back, never more than 10 MiB"
    assert held == [], "pieces are still listed"
    assert bounded.memory().used_bytes == 0, f"after freeing {bounded.memory().used_bytes} bytes are in use"


def test_ballast_is_given_back_when_an_allocation_fails_for_another_reason(bounded: Cpu) -> None:
    # A piece of 2 bytes is refused as a bad argument: that is not a full device.
    with pytest.raises(ValueError, match="size_bytes is 2"):
        ballast.fill(bounded.allocate, (16 * MIB, 2))
    assert bounded.memory().used_bytes == 0, f"{bounded.memory().used_bytes} bytes are still held"


def test_host_ballast_is_real_and_volunteers_to_the_oom_killer() -> None:
    with HostBallast(64 * MIB, 60.0) as held:
        process = psutil.Process(held.process_id)
        resident = process.memory_info().rss
        score = int(Path(f"/proc/{held.process_id}/oom_score_adj").read_text())
    assert resident >= 64 * MIB, f"{resident} bytes are resident where 64 MiB are held"
    assert score == 1000, f"oom_score_adj is {score}"
    assert not process.is_running(), "the neighbour outlived its context"


def test_host_ballast_ends_at_its_time_limit() -> None:
    held = HostBallast(MIB, 0.3)
    process = psutil.Process(held.process_id)
    until(lambda: process.status() == psutil.STATUS_ZOMBIE, "the neighbour ended by itself")
    held.close()
    held.close()


def test_host_ballast_leaves_the_machine_its_share() -> None:
    with pytest.raises(RuntimeError, match="left to the other programs"):
        HostBallast(1 << 46, 10.0)


def test_host_ballast_dies_with_a_parent_that_is_killed() -> None:
    program = (
        "from backends.faults.ballast import HostBallast\n"
        "held = HostBallast(32 << 20, 600.0)\n"
        "print(held.process_id, flush=True)\n"
        "input()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    neighbour = psutil.Process(int(parent.stdout.readline()))
    assert neighbour.memory_info().rss >= 32 * MIB, f"the neighbour holds {neighbour.memory_info().rss} bytes"
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    # A killed orphan may stay as a zombie where nobody reaps it: its memory is gone.
    until(
        lambda: not neighbour.is_running() or neighbour.status() == psutil.STATUS_ZOMBIE,
        "the neighbour ended with its parent",
    )


# The host.


def test_host_memory_is_not_exhausted_in_a_process_that_is_not_expendable(bounded: Cpu) -> None:
    with pytest.raises(BackendError, match="only in a process started for it"), limits.no_host_memory(MIB):
        pass
    with pytest.raises(BackendError, match="only in a process started for it"):
        limits.cap_host_memory(MIB)
    with pytest.raises(BackendError, match="only in a process started for it"):
        bounded.arm(FaultPlan(Site.HOST_MEMORY))


def test_a_load_without_host_memory_fails_for_real_and_memory_works_afterwards(in_child: Callable[[str], Any]) -> None:
    found = in_child("""
import json, resource
import numpy as np
from backends.contract import FaultPlan, Site
from backends.cpu import Cpu
from backends.errors import classify
from backends.model import DEFAULT_MODEL
device = Cpu()
device.limit_memory(96 << 20)
before = resource.getrlimit(resource.RLIMIT_DATA)
kinds = []
with device.arm(FaultPlan(Site.HOST_MEMORY, nth=2, times=2, min_bytes=1 << 20)) as fault:
    for _ in range(4):
        try:
            device.load(DEFAULT_MODEL).run(np.zeros((16, 150, 80), np.float32))
            kinds.append("ok")
        except Exception as error:
            kinds.append(classify(error).value)
same = before == resource.getrlimit(resource.RLIMIT_DATA)
core = resource.getrlimit(resource.RLIMIT_CORE)
print(json.dumps([kinds, fault.record().to_json(), same, core, len(bytearray(256 << 20))]))
""")
    kinds, record, same_limit, core, size = found
    assert kinds == ["ok", "host_oom", "host_oom", "ok"], f"the four loads ended with {kinds}"
    assert (record["points_seen"], record["faults_fired"], record["absorbed"]) == (4, 2, 0), f"the record is {record}"
    assert same_limit, "RLIMIT_DATA was not put back"
    # 0 where it was 0 for good: it cannot be raised.
    assert core in ([1, 1], [0, 0]), f"core dumps are not suppressed: RLIMIT_CORE is {core}"
    assert size == 256 * MIB, f"{size} bytes could be had afterwards"


def test_the_faults_of_the_host_reach_the_fallback(in_child: Callable[[str], Any]) -> None:
    kind = in_child("""
import json
from backends.contract import FaultPlan, Site
from backends.cpu import Cpu
from backends.errors import classify
from backends.model import DEFAULT_MODEL
device = Cpu()
kind = "none"
with device.arm(FaultPlan(Site.HOST_MEMORY, min_bytes=1 << 20)):
    try:
        device.fallback().load(DEFAULT_MODEL)
    except Exception as error:
        kind = classify(error).value
print(json.dumps(kind))
""")
    assert kind == "host_oom", f"a load of the fallback without host memory is {kind}"


def test_the_machine_keeps_its_share(in_child: Callable[[str], Any]) -> None:
    text = in_child("""
import json
from backends.contract import BackendError
from backends.host import available_bytes
text = "none"
try:
    limits.cap_host_memory(available_bytes() - (512 << 20))
except BackendError as error:
    text = str(error)
print(json.dumps(text))
""")
    assert "left to the other programs of the machine" in text, f"using all but 512 MiB of it: {text}"
