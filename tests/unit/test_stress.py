"""The stress harness, as it is started: arguments, verdicts and exit statuses, an end in order, and planted defects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from qualification import records, stress

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "tests/test_memory_protection.py"]
#: The same, with ten samples a second and a verdict on leaks within seconds.
DENSE = [
    sys.executable,
    "-c",
    "from qualification import stress; stress.SAMPLE_EVERY_LEAST_S = 0.1; stress.LEAKS_AFTER_S = 3; "
    "raise SystemExit(stress.main())",
]
#: Small and quick, and queued behind another qualification on this machine.
SMALL = ["--gpu-pressure", "20", "--cpu-pressure", "20", "--toggle-interval", "1", "--lock-wait", "300"]

#: Applications that keep everything in memory; all but the first have a defect.
SUBJECTS = '''
import os
from types import SimpleNamespace

import psutil


class Healthy:
    def __init__(self, context):
        context.workdir.joinpath("mine").write_text("kept when something fails")
        self.made, self.at, self.recording = [], 0, True

    def feed(self, start, block):
        if start == self.at:
            self.at += len(block)
            self.answer(start, self.at)
        return self.at

    def answer(self, start, stop):
        self.made.append(SimpleNamespace(start=start, stop=stop, output=0, device="cpu", degraded=False))

    def drain(self, timeout_s):
        pass

    def results(self):
        return self.made

    def toggle(self):
        self.recording = not self.recording
        return self.recording

    def device(self):
        return "cpu"

    def process_ids(self):
        return [os.getpid()]

    def events(self):
        return []

    def metrics(self):
        return {}

    def shutdown(self, reason):
        pass

    def close(self):
        pass


class Skipping(Healthy):
    def answer(self, start, stop):
        if len(self.made) != 5 or start % 3 == 0:
            super().answer(start, stop)


class Leaking(Healthy):
    kept = []

    def feed(self, start, block):
        self.kept.append(bytearray(b"x") * 100_000)
        return super().feed(start, block)


class Crashing(Healthy):
    def feed(self, start, block):
        if start >= 970_000:
            raise RuntimeError("the microphone is on fire")
        return super().feed(start, block)


class LeakingUntilItFails(Leaking):
    def feed(self, start, block):
        if start >= 1_120_000:
            raise MemoryError("nothing is left")
        return super().feed(start, block)


class Stuck(Healthy):
    def toggle(self):
        return True


class Relieving(Healthy):
    """Ends the neighbour that holds the host's memory."""

    def drain(self, timeout_s):
        for child in psutil.Process().children():
            if "backends.faults.ballast" in child.cmdline():
                child.kill()
                child.wait()
'''


@dataclass(frozen=True)
class Outcome:
    """What a run said, and what it wrote."""

    status: int
    output: str
    record: records.Record

    @property
    def verdicts(self) -> dict[str, str]:
        return {each["criterion"]: each["verdict"] for each in self.record.criteria}

    def failed(self) -> set[str]:
        return {name for name, verdict in self.verdicts.items() if verdict == "fail"}


def outcome(status: int, output: str, results: Path) -> Outcome:
    (path,) = results.glob("*.jsonl")
    assert f"records: {path}\nplot: " in output
    plot = path.with_suffix(".svg")
    assert (f"plot: {plot}\n" in output) == plot.exists()
    return Outcome(status, output, records.read(path))


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


@pytest.fixture
def run(tmp_path: Path, temporary: Path) -> Any:
    def start(*arguments: str, command: list[str] = SCRIPT) -> Outcome:
        results = tmp_path / "results"
        done = subprocess.run(
            [*command, *SMALL, "--results", str(results), *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            timeout=360,
            check=False,
        )
        return outcome(done.returncode, done.stdout + done.stderr, results)

    return start


@pytest.fixture
def planted(tmp_path: Path) -> Any:
    path = tmp_path / "planted.py"
    path.write_text(SUBJECTS)
    return lambda name: ("--subject", f"{path}:{name}")


def test_help_says_what_is_done_and_gives_examples() -> None:
    done = subprocess.run([*SCRIPT, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for text in ("examples:", "exit status:", "--gpu-pressure MB", "1000)", "60 %", "Ctrl-C"):
        assert text in done.stdout


def test_the_defaults_are_those_of_the_documentation() -> None:
    options = stress._parser().parse_args([])
    asked = (options.duration, options.gpu_pressure, options.cpu_pressure, options.toggle_interval)
    assert asked == (1.0, 1000, 500, 30.0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--duration", "-1"], "expected a number from 0.0001 to 24 hours"),
        (["--duration", "0"], "expected a number from 0.0001 to 24 hours"),
        (["--duration", "nan"], "expected a number from 0.0001 to 24 hours"),
        (["--duration", "an hour"], "'an hour': expected a number"),
        (["--duration", "1e9"], "expected a number from 0.0001 to 24 hours"),
        (["--gpu-pressure", "-5"], "expected a number from 1 to 1e+06 MB"),
        (["--gpu-pressure", "0"], "expected a number from 1 to 1e+06 MB"),
        (["--cpu-pressure", "inf"], "expected a number from 1 to 1e+06 MB"),
        (["--cpu-pressure", "1000000"], "of host memory is available and"),
        (["--gpu-pressure", "1000000"], "the device cannot hold that"),
        (["--toggle-interval", "0"], "expected a number from 1 to 86400 seconds"),
        (["--toggle-interval", "NaN"], "expected a number from 1 to 86400 seconds"),
        (["--lock-wait", "-1"], "expected a number from 0 to 86400 seconds"),
        (["--backend", "cpuu"], "did you mean cpu"),
        (["--backend", "cpu", "--device", "cuda:1"], "cpu has no device 'cuda:1': expected 'cpu:arena'"),
        (["--subject", "nowhere"], "expected package.module:factory"),
        (["--model", "missing.onnx"], "there is no such file"),
        (["--audio", "README.md"], "README.md"),
        (["--durations", "1"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as exit_:
        stress.main(["--lock-wait", "300", "--results", str(tmp_path), *arguments])
    assert exit_.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_too_short_for_a_verdict_on_leaks_is_inconclusive(run: Any, temporary: Path) -> None:
    done = run("--duration", "0.003")
    assert done.status == stress.EXIT_INCONCLUSIVE, done.output
    assert "INCONCLUSIVE: " in done.output
    leaks = {"leak_detected", "growth_rate", "total_growth"}
    assert {name for name, verdict in done.verdicts.items() if verdict == "not_run"} == leaks
    assert {name for name, verdict in done.verdicts.items() if verdict == "pass"} == {
        each.name for each in stress.CRITERIA
    } - leaks
    assert done.record.complete
    assert done.record.run["collected"] == [stress.TEST]
    assert done.record.run["stress"]["toggle_interval"] == 1
    assert not list(temporary.glob("plimsoll-*"))


def test_a_long_enough_run_of_a_healthy_subject_is_green(run: Any, planted: Any) -> None:
    done = run("--duration", "0.003", *planted("Healthy"), command=DENSE)
    assert done.status == stress.EXIT_GOOD, done.output
    assert set(done.verdicts.values()) == {"pass"}
    (leak,) = [each for each in done.record.criteria if each["criterion"] == "leak_detected"]
    assert len(leak["series"]["uss_bytes"]) >= 24


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("Skipping", {"samples_unanswered", "gaps_and_overlaps"}),
        ("Crashing", {"crashes", "samples_unanswered"}),
        ("Stuck", {"toggles_failed"}),
        ("Relieving", {"pressure_lost"}),
    ],
)
def test_a_planted_defect_fails_its_criterion(
    run: Any, planted: Any, temporary: Path, name: str, failed: set[str]
) -> None:
    done = run("--duration", "0.0004", *planted(name))
    assert done.status == stress.EXIT_FAILED, done.output
    assert failed <= done.failed() <= failed | {"samples_unanswered"}
    assert "promised: " in done.output and "repeat:   python tests/test_memory_protection.py" in done.output
    (workdir,) = temporary.glob("plimsoll-*")
    assert f"the subject's files are kept: {workdir}" in done.output
    assert (workdir / "mine").exists()
    assert ("RuntimeError: «the microphone is on fire»" in done.output) == (name == "Crashing")


def test_what_a_subject_said_as_it_failed_is_shown_and_in_no_record(run: Any, planted: Any, tmp_path: Path) -> None:
    done = run("--duration", "0.0004", *planted("Crashing"))
    assert "RuntimeError: «the microphone is on fire» at qualification/stress.py:" in done.output, done.output
    kept = [path for path in (tmp_path / "results").iterdir() if b"on fire" in path.read_bytes()]
    assert not kept, f"what it said is in {kept}"
    (line,) = done.record.tests
    assert any("crash      RuntimeError: «…» at qualification/stress.py:" in each for each in line["evidence"])


def test_a_planted_leak_is_found(run: Any, planted: Any) -> None:
    done = run("--duration", "0.003", *planted("Leaking"), command=DENSE)
    assert done.status == stress.EXIT_FAILED, done.output
    assert "leak_detected" in done.failed()


def test_what_leaked_until_the_subject_failed_is_judged(run: Any, planted: Any) -> None:
    """After 10 s of speech: that memory ran out is what the leak did."""
    done = run("--duration", "0.01", *planted("LeakingUntilItFails"), command=DENSE)
    assert done.status == stress.EXIT_FAILED and "MemoryError: «nothing is left»" in done.output, done.output
    assert {"crashes", "leak_detected"} <= done.failed(), done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_in_order_with_a_verdict(tmp_path: Path, temporary: Path, number: signal.Signals) -> None:
    results = tmp_path / "results"
    process = subprocess.Popen(
        [*SCRIPT, *SMALL, "--duration", "1", "--results", str(results)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    try:
        # It may wait for its turn, and be slow to begin: this line comes once it records.
        while "\nstress 0:" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        # As a terminal does: to the neighbour as well.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        said += process.communicate(timeout=100)[0]
    finally:
        process.kill()
        process.wait()
    done = outcome(process.returncode, said, results)
    assert done.status == stress.EXIT_INCONCLUSIVE, said
    assert f"ended by {number.name}" in said and "Traceback" not in said
    assert done.verdicts["samples_unanswered"] == "pass"
    assert done.record.complete
    assert not [child for child in family if child.is_running()]
    assert not list(temporary.glob("plimsoll-*"))
