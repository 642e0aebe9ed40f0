"""Bad input: each with an error that says what was wrong, what was expected, and what to do. Nothing runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from qualification import records
from qualification.audio import write_wav
from qualification.lock import DeviceLock, LockBusy
from tests.meta.qualifying import PROTECTION, PYTEST, RECOVERY, ROOT, qualify

QUICK = f"{RECOVERY}::TestOOMDetection::test_oom_detection"


def refused(tmp_path: Path, *arguments: str) -> str:
    run = qualify(tmp_path / "results", QUICK, *arguments)
    assert run.status == 4, f"exit status {run.status}, expected 4 (usage error):\n{run.output[-2000:]}"
    assert not run.criteria, f"{len(run.criteria)} criteria were judged, expected none"
    return run.output


def test_unknown_backend_names_the_nearest(tmp_path: Path) -> None:
    assert "cpu" in refused(tmp_path, "--backend", "cpuu")


def test_a_device_that_the_backend_does_not_have(tmp_path: Path) -> None:
    assert "--device cuda:1: cpu has no device 'cuda:1': expected 'cpu:arena'" in refused(
        tmp_path, "--device", "cuda:1"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[test_oom_detectoin]\nx = 1", "did you mean test_oom_detection"),
        ("[test_oom_detection]\noms_undetected = 1", "did you mean ooms_undetected"),
        ("[test_sustained_high_memory_usage]\ngrowth_rate = -1", "at least 0 MB/s"),
        ("[test_sustained_high_memory_usage]\ngrowth_rate = nan", "finite number"),
        ("[test_sustained_high_memory_usage]\ngrowth_rate = 'fast'", "finite number"),
        ("[test_sustained_high_memory_usage]\nheld_mb = 1e12", "from 1 to 1e+06"),
        ("test_oom_detection = 3", "expected a table"),
        ("[test_oom", "cannot be read"),
    ],
    ids=["test", "criterion", "negative", "nan", "text", "absurd", "no-table", "no-toml"],
)
def test_bad_criteria(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "criteria.toml"
    path.write_text(text)
    assert expected in refused(tmp_path, "--criteria", str(path))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("nowhere", "expected package.module:factory"),
        ("no.such.module:factory", "importing no.such.module failed"),
        ("protection.pipeline:factroy", "no callable 'factroy'"),
        ("missing.py:factory", "there is no file"),
        ("cmd:./app", "not supported yet"),
    ],
)
def test_bad_subject(spec: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, "--subject", spec)


def test_audio_that_is_no_wav(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(b"not audio at all" * 100)
    assert "WAV" in refused(tmp_path, "--audio", str(path))


def test_audio_of_another_sample_rate(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    write_wav(path, np.zeros(8_000, np.float32), rate_hz=8_000)
    output = refused(tmp_path, "--audio", str(path))
    assert "8000" in output and "16000" in output, output[-1000:]


def test_audio_that_is_not_there(tmp_path: Path) -> None:
    assert "missing.wav" in refused(tmp_path, "--audio", str(tmp_path / "missing.wav"))


def test_model_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path, "--model", str(tmp_path / "missing.onnx"))


def test_model_that_does_not_load(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00garbage" * 50)
    assert "does not load" in refused(tmp_path, "--model", str(path))


def test_model_with_other_inputs(tmp_path: Path) -> None:
    assert "expected one input" in refused(tmp_path, "--model", "backends/data/block.onnx")


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file where a folder should be")
    run = qualify(tmp_path / "results", QUICK)
    assert run.status == 4 and "cannot be written" in run.output, run.output[-1500:]


def test_a_second_run_is_refused_and_named(tmp_path: Path) -> None:
    lock = DeviceLock("cpu", wait_s=600)
    try:
        command = [*PYTEST, QUICK, "--results", str(tmp_path / "results"), "--lock-wait", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    finally:
        lock.release()
    assert done.returncode == 4, done.stdout[-1500:]
    assert f"process {os.getpid()}" in done.stdout + done.stderr, done.stdout[-1500:]


def test_a_second_run_queues_when_it_is_told_to(tmp_path: Path) -> None:
    lock, said = DeviceLock("cpu", folder=tmp_path), list[str]()
    with pytest.raises(LockBusy, match=str(os.getpid())):
        DeviceLock("cpu", wait_s=0.5, folder=tmp_path, say=said.append)
    assert said == [f"waiting for process {os.getpid()}, at most 0.5 s"]
    lock.release()
    DeviceLock("cpu", folder=tmp_path).release()


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "long"])
def test_bad_lock_wait(seconds: str, tmp_path: Path) -> None:
    assert "expected a number of seconds of at least 0" in refused(tmp_path, f"--lock-wait={seconds}")


def test_an_environment_that_the_backend_does_not_declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_ENVIRONMENT", "cuda99")
    assert "backend cpu is declared for cpu" in refused(tmp_path)


def test_our_own_tests_and_the_qualification_are_not_run_together(tmp_path: Path) -> None:
    assert "tests of Plimsoll itself" in refused(tmp_path, "tests/unit/test_stream.py")


def test_listing_tests_takes_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    run = qualify(tmp_path / "results", "--collect-only", "-q", PROTECTION, RECOVERY)
    assert run.status == 0, run.output[-1500:]
    assert not (tmp_path / "results").exists()


def test_ctrl_c_ends_in_order_and_the_records_are_whole(tmp_path: Path) -> None:
    results = tmp_path / "results"
    test = f"{PROTECTION}::TestMemoryStress::test_sustained_high_memory_usage"
    # Begun in the background of a script SIGINT is ignored, and by every child too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*PYTEST, test, "--results", str(results), "--lock-wait", "600"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    # Live progress says that the test runs.
    for line in process.stdout:
        if "pieces" in line:
            break
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stdout.read()
    status = process.wait(60)
    process.stdout.close()
    assert status == 2, f"exit status {status}, expected pytest's 2 for an interruption:\n{rest[-1500:]}"
    record = records.read(next(results.glob("*.jsonl")))
    verdicts = {each["verdict"] for each in record.criteria}
    assert verdicts <= {"fail", "not_run"}, f"verdicts {verdicts} of a test that was interrupted"


def test_a_killed_run_leaves_records_that_count_as_damaged(tmp_path: Path) -> None:
    results = tmp_path / "results"
    test = f"{PROTECTION}::TestMemoryStress::test_sustained_high_memory_usage"
    process = subprocess.Popen(
        [*PYTEST, test, "--results", str(results), "--lock-wait", "600"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 700
    while not list(results.glob("*.jsonl")) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(records.RecordError, match="truncated"):
        records.read(next(results.glob("*.jsonl")))
    # And the lock is free again.
    DeviceLock("cpu", wait_s=600).release()
