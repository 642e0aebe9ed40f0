"""Each planted defect is caught, and by the criterion that promises the opposite. A healthy subject passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backends.faults.cgroup import CgroupUnavailable, MemoryCgroup
from tests.meta.qualifying import PROTECTION, RECOVERY, qualify

BROKEN = "tests/meta/broken.py"
SHORT = """
[test_sustained_high_memory_usage]
duration_s = 20
held_mb = 100
# Half a megabyte in each turn: a busy machine makes few of them.
growth_rate = 0.2
[test_rapid_toggle_with_fallback]
# A verdict by the cycle needs 24 readings.
cycles = 24
[test_kill_during_recording]
# A worker, two hosts while they record, one in its start-up.
kills = 4
seed = 9
[test_oom_killer]
kills = 2
"""
SUSTAINED = f"{PROTECTION}::TestMemoryStress::test_sustained_high_memory_usage"
FALLBACK = f"{PROTECTION}::TestGPUFallback::test_gpu_to_cpu_fallback_on_oom"
TOGGLE = f"{PROTECTION}::TestGPUFallback::test_rapid_toggle_with_fallback"
TRIGGER = f"{PROTECTION}::TestEmergencyShutdown::test_emergency_shutdown_trigger"
DETECTION = f"{RECOVERY}::TestOOMDetection::test_oom_detection"
STRATEGIES = f"{RECOVERY}::TestGracefulDegradation::test_progressive_recovery_strategies"
BUFFER = f"{RECOVERY}::TestDataPreservation::test_audio_buffer_preservation"
STATE = f"{RECOVERY}::TestDataPreservation::test_transcription_state_preservation"
KILL = f"{RECOVERY}::TestDataPreservation::test_kill_during_recording"
SUSPEND = f"{RECOVERY}::TestProcessSurvival::test_suspend_and_resume"
OOM_KILLER = f"{RECOVERY}::TestProcessSurvival::test_oom_killer"
POISON = f"{RECOVERY}::TestProcessSurvival::test_poison_chunk"
LIBRARY = f"{RECOVERY}::TestProcessSurvival::test_library_missing_at_first_inference"
FILE_SIZE = f"{RECOVERY}::TestStorageFailure::test_file_size_limit_while_recording"

DEFECTS = [
    ("drops_a_block", BUFFER, {"samples_different"}),
    ("falls_back_silently", FALLBACK, {"notifications"}),
    ("returns_zeros_on_oom", FALLBACK, {"answers_wrong", "first_answer", "ooms_undetected"}),
    ("acknowledges_before_it_stores", KILL, {"samples_lost"}),
    ("counts_no_ooms", DETECTION, {"ooms_uncounted"}),
    ("falls_back_too_early", STRATEGIES, {"not_needed", "out_of_order"}),
    ("answers_twice", STATE, {"overlaps"}),
    ("never_shuts_down", TRIGGER, {"exit_status"}),
    ("answers_nothing", BUFFER, {"samples_unanswered"}),
    ("accepts_no_more", BUFFER, {"samples_lost"}),
    ("tells_of_a_shutdown_only", TRIGGER, {"exit_status"}),
    ("leaves_a_process_behind", TRIGGER, {"left_behind"}),
    ("leaves_a_process_behind", KILL, {"orphans"}),
    ("returns_zeros_when_its_worker_dies", KILL, {"answers_wrong"}),
    ("dies_by_itself_the_third_time", KILL, {"hosts_failed"}),
    ("blames_its_worker_for_its_own_sleep", SUSPEND, {"workers_replaced"}),
    ("retreats_into_its_own_process", OOM_KILLER, {"workers_spared"}),
    ("sets_the_neighbours_aside", POISON, {"not_poisoned"}),
    ("blames_the_audio", LIBRARY, {"set_aside"}),
    ("acknowledges_what_it_cannot_store", FILE_SIZE, {"refusals", "samples_lost"}),
    ("acknowledges_the_block_that_meets_the_full_disk", FILE_SIZE, {"samples_different"}),
]


#: Leaks: the test, the criteria that fail, and what the failure says of where it comes from.
LEAKS = {
    "loses_20_kb_per_chunk": (
        SUSTAINED,
        {"leak_detected", "growth_rate"},
        [r"recording: .*kB heap in use", r"kB each turn, .*tests/meta/broken.py:\d+", r"of it in .* process"],
    ),
    "loses_20_kb_per_chunk_in_its_worker": (
        SUSTAINED,
        {"leak_detected"},
        [r"workers' heaps in use: grew in every part", r"recording: .*kB workers' heaps in use", r"in a worker: \+\d+"],
    ),
    "keeps_a_descriptor_a_thread_and_memory": (
        TOGGLE,
        {"resources_left", "leak_detected"},
        [
            r"left behind: 48 descriptors, 24 threads.*48 x descriptor of /dev/null",
            r"24 x thread forgotten",
            r"opened and kept: 8 x descriptor of /dev/null, 4 x thread forgotten",
            # Two at each of four turns; a reading may find one open that is not kept.
            r"toggle: .*\+[789] descriptors",
            r"fallback: .*\+4 threads",
            r"heap in use: grew in every part",
            r"\+250\.\d kB each turn, .*tests/meta/broken.py:\d+",
        ],
    ),
}


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.toml"
    path.write_text(SHORT)
    return path


def _require_cgroup() -> None:
    try:
        MemoryCgroup().remove()
    except CgroupUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("defect", "test", "criteria"), DEFECTS, ids=[defect for defect, _, _ in DEFECTS])
def test_a_defect_is_caught_by_the_criterion_that_promises_the_opposite(
    defect: str, test: str, criteria: set[str], tmp_path: Path, short: Path
) -> None:
    if test == OOM_KILLER:
        _require_cgroup()
    run = qualify(tmp_path / "results", test, "--subject", f"{BROKEN}:{defect}", "--criteria", str(short))
    assert run.status == 1, f"exit status {run.status}, expected 1:\n{run.output[-3000:]}"
    other = f"failed for other reasons: {run.failed() - run.broken()}"
    assert criteria <= run.broken(), f"broken {run.broken()}, expected {criteria}; {other}:\n{run.output[-3000:]}"


@pytest.mark.parametrize("defect", LEAKS)
def test_a_leak_is_found_and_attributed(defect: str, tmp_path: Path, short: Path) -> None:
    test, criteria, said = LEAKS[defect]
    run = qualify(tmp_path / "results", test, "--subject", f"{BROKEN}:{defect}", "--criteria", str(short))
    assert criteria <= run.broken(), f"broken {run.broken()}, expected {criteria}:\n{run.output[-3000:]}"
    assert run.status == 1, f"exit status {run.status}, expected 1:\n{run.output[-3000:]}"
    lines = ["Leak detected: True", "Growth rate: ", "Total growth: ", "AssertionError: Memory leak detected!"]
    said = [*said, *lines]
    missing = [pattern for pattern in said if not re.search(pattern, run.output)]
    assert not missing, f"nothing says {missing}:\n{run.output[-4000:]}"


def test_a_healthy_subject_passes_every_one_of_these_tests(tmp_path: Path, short: Path) -> None:
    # But for the long ones, which memory-quick runs: a verdict on leaks alone takes a minute.
    tests = dict.fromkeys(
        test for test in [TOGGLE, *(test for _, test, _ in DEFECTS)] if test not in (SUSTAINED, TRIGGER, OOM_KILLER)
    )
    run = qualify(tmp_path / "results", *tests, "--subject", f"{BROKEN}:healthy", "--criteria", str(short))
    assert run.status == 0, f"exit status {run.status}; failed: {run.failed()}\n{run.output[-3000:]}"
    verdicts = {each["verdict"] for each in run.criteria}
    assert verdicts == {"pass"}, f"verdicts {verdicts}, expected only pass"


def test_every_fault_has_its_provenance_in_the_records(tmp_path: Path, short: Path) -> None:
    run = qualify(tmp_path / "results", FALLBACK, DETECTION, KILL, "--criteria", str(short))
    modes = {path.suffix: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "results").iterdir()}
    assert modes == {".jsonl": "0o600", ".log": "0o600", ".sqlite": "0o600"}
    faulty = [each for each in run.criteria if each["points_seen"]]
    unnamed = [each["criterion"] for each in faulty if each["provenance"] not in ("capped", "killed")]
    assert faulty, "no criterion of an OOM test has a fault in the records"
    assert not unnamed, f"no provenance for {unnamed}"


def test_a_fault_that_never_fired_is_no_pass(tmp_path: Path) -> None:
    run = qualify(tmp_path / "results", FALLBACK, "--subject", f"{BROKEN}:never_on_the_device")
    unfired = [each for each in run.criteria if "proves nothing" in each["reason"]]
    assert unfired, f"no criterion says that its fault proves nothing: {run.criteria}"
    assert {each["verdict"] for each in unfired} == {"fail"}


def test_a_failure_begins_with_the_four_lines(tmp_path: Path) -> None:
    run = qualify(tmp_path / "results", FALLBACK, "--subject", f"{BROKEN}:falls_back_silently")
    section = run.output.split("= FAILURES =")[1].splitlines()
    begin = next(i for i, line in enumerate(section) if line.startswith("promised:"))
    heads = [line.split(":")[0] for line in section[begin : begin + 4]]
    assert heads == ["promised", "measured", "fault", "repeat"], f"the failure begins with {section[begin : begin + 4]}"
    assert begin <= 2, f"{begin} lines come before the four:\n" + "\n".join(section[: begin + 4])
    assert f"{FALLBACK} --backend cpu --subject {BROKEN}:falls_back_silently" in section[begin + 3]


def test_the_command_that_repeats_a_failure_has_the_device_and_what_was_allowed(tmp_path: Path) -> None:
    options = ("--device", "cpu:arena", "--allow-shared-gpu", "--allow-device-faults")
    run = qualify(tmp_path / "results", FALLBACK, "--subject", f"{BROKEN}:falls_back_silently", *options)
    repeat = next(line for line in run.output.splitlines() if line.startswith("repeat:"))
    assert "--backend cpu --device cpu:arena --subject" in repeat, repeat
    assert repeat.endswith("--allow-shared-gpu --allow-device-faults"), repeat


def test_a_subject_that_answers_nothing_is_no_reference(tmp_path: Path) -> None:
    run = qualify(tmp_path / "results", STATE, "--subject", f"{BROKEN}:answers_nothing")
    assert run.status == 1 and "answers nothing even when nothing happens to it" in run.output, run.output[-2000:]


def test_what_a_backend_cannot_do_is_not_run_and_says_why(tmp_path: Path) -> None:
    run = qualify(tmp_path / "results", f"{PROTECTION}::TestCUDAErrorRecovery")
    assert run.status == 0, run.output[-2000:]
    assert "2 not run" in run.output
    assert {each["verdict"] for each in run.criteria} == {"not_run"}
    assert all("CUDA" in each["reason"] for each in run.criteria), (
        f"reasons: {[each['reason'] for each in run.criteria]}"
    )


SKIPPING = """
import pytest

def test_full_disk_while_recording(judge):
    pytest.skip("not run: no disk to spare")
"""


def test_what_the_machine_cannot_do_is_not_run_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "test_arranged.py"
    path.write_text(SKIPPING)
    run = qualify(tmp_path / "r", "-c", "pytest_memory.ini", str(path))
    line = next((line for line in run.output.splitlines() if line.startswith("NOT RUN")), "")
    assert line.endswith("::test_full_disk_while_recording - no disk to spare"), run.output[-2000:]
    found = {(each["verdict"], each["reason"]) for each in run.criteria}
    assert found == {("not_run", "no disk to spare")}, f"recorded are {found}"


ARRANGED = """
import pytest

@pytest.mark.needs("device_oom")
def test_oom_detection(backend, judge):
    for criterion in judge.criteria:
        judge(criterion.name, 0)

def test_oom_notification_system(judge):
    judge("ooms_untold", 0)
"""


def test_a_stale_no_turns_red(tmp_path: Path) -> None:
    path = tmp_path / "test_arranged.py"
    path.write_text(ARRANGED)
    run = qualify(tmp_path / "r", "-c", "pytest_memory.ini", "-p", "stale_no", f"{path}::test_oom_detection")
    assert run.status == 1, f"exit status {run.status}, expected 1:\n{run.output[-2000:]}"
    assert "correct its capability statement" in run.output, run.output[-2000:]


def test_a_criterion_that_was_never_measured_fails_the_test(tmp_path: Path) -> None:
    path = tmp_path / "test_arranged.py"
    path.write_text(ARRANGED)
    run = qualify(tmp_path / "r", "-c", "pytest_memory.ini", f"{path}::test_oom_notification_system")
    assert run.status == 1, f"exit status {run.status}, expected 1:\n{run.output[-2000:]}"
    assert run.failed() == {"notifications_incomplete", "notification_delay"}, f"failed: {run.failed()}"


HANGING = """
import pytest

@pytest.mark.timeout(2, func_only=True)
def test_oom_notification_system(judge):
    judge("ooms_untold", 0)
    while True:
        pass
"""


def test_a_timeout_finds_the_records_flushed(tmp_path: Path) -> None:
    path = tmp_path / "test_arranged.py"
    path.write_text(HANGING)
    run = qualify(tmp_path / "r", "-c", "pytest_memory.ini", str(path))
    verdicts = {each["criterion"]: each["verdict"] for each in run.criteria}
    expected = {"ooms_untold": "pass", "notifications_incomplete": "fail", "notification_delay": "fail"}
    assert verdicts == expected, f"verdicts {verdicts}"
    assert run.status == 1 and "Timeout" in run.output, run.output[-1500:]
