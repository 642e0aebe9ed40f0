"""The noxfile: which sessions there are, and that one that cannot run is an error."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import backends
from qualification import history, identity, records

ROOT = Path(__file__).resolve().parents[2]
CELLS = sorted(
    (declared.name, environment) for declared in backends.declared() for environment in declared.environments
)
ENVIRONMENTS = sorted({environment for backend in backends.declared() for environment in backend.environments})
PINS = sorted((ROOT / "constraints").glob("*.txt"))
KINDS = ("memory-quick", "memory-soak", "memory-sweep")


def nox(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nox", "--no-color", "-f", str(folder / "noxfile.py"), *arguments]
    # With --no-venv, python is the one of this test.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False, env=env)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with what the noxfile reads."""
    for name in ("backends", "qualification"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).glob("*.py"):
            shutil.copy(path, tmp_path / name)
    for name in ("noxfile.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    return tmp_path


def listed(folder: Path) -> dict[str, str]:
    """Read the sessions that `nox --list` shows, and what it says of each."""
    done = nox(folder, "--list")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"(?m)^[*-] (\S+) .*?-> (.+)$", done.stdout))


def test_the_sessions_are_the_matrix() -> None:
    expected = {f"{kind}-{environment}" for kind in KINDS for environment in ENVIRONMENTS}
    expected |= {f"cell-{environment}-{backend}" for backend, environment in CELLS}
    expected |= {"refusals-cuda12", "refusals-cuda13"}
    expected |= {"memory-quick", "qualify", "report", "doctor", "ci-matrix"}
    expected |= {"tests", "bench", "bench-leaks", "lint", "lock"}
    assert set(listed(ROOT)) == expected


def test_plain_nox_is_memory_quick() -> None:
    assert [entry["session"] for entry in json.loads(nox(ROOT, "--list", "--json").stdout)] == ["memory-quick"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tag_gives_the_cells_of_a_ci_matrix(kind: str) -> None:
    found = json.loads(nox(ROOT, "--list", "--json", "-t", kind).stdout)
    assert {entry["session"] for entry in found} == {f"{kind}-{environment}" for environment in ENVIRONMENTS}


def test_the_cells_have_a_tag() -> None:
    found = json.loads(nox(ROOT, "--list", "--json", "-t", "cells").stdout)
    assert {entry["session"] for entry in found} == {f"cell-{environment}-{backend}" for backend, environment in CELLS}


def test_an_environments_tag_runs_no_cell_twice() -> None:
    found = {entry["session"] for entry in json.loads(nox(ROOT, "--list", "--json", "-t", "cpu").stdout)}
    assert found == {f"{kind}-cpu" for kind in KINDS}


NEW = """\
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2"]
#
# [tool.plimsoll]
# backend = "made-up"
# tags = ["made"]
#
# [tool.plimsoll.environments.cpu]
# download-mb = 1
# disk-mb = 1
#
# [tool.plimsoll.environments.rocm99]
# dependencies = ["made-up==1.0"]
# reason = "the only one"
# download-mb = 77
# disk-mb = 99
# ///
"""


def test_a_new_backend_is_one_file(checkout: Path) -> None:
    (checkout / "backends/made_up.py").write_text(NEW, encoding="utf-8")
    sessions = listed(checkout)
    assert "made-up" in sessions["memory-quick-rocm99"]
    assert "made-up" in sessions["memory-soak-rocm99"]
    assert "made-up" in sessions["memory-sweep-rocm99"]
    assert "made-up" in sessions["memory-quick-cpu"]
    assert {"cell-cpu-made-up", "cell-rocm99-made-up"} <= set(sessions)
    found = json.loads(nox(checkout, "--list", "--json", "-t", "made").stdout)
    assert {entry["session"] for entry in found} == {"cell-cpu-made-up", "cell-rocm99-made-up"}
    row = next(line for line in nox(checkout, "-s", "doctor").stdout.splitlines() if "rocm99" in line)
    assert row.split()[:5] == ["made-up", "rocm99", "no", "77", "MB"]


def wheel(folder: Path, version: str) -> None:
    """Write a wheel that can be installed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "made_up.py": f"VERSION = {version!r}\n",
        f"made_up-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: made-up\nVersion: {version}\n",
        f"made_up-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"made_up-{version}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"made_up-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing: what a test prints is about the test."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder: each folder in it that has a folder for each package is a package index."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def with_index(checkout: Path, served: str) -> Path:
    """A checkout whose backend wants the build 1.0+small of a package; pip finds the other one, 1.0."""
    wheel(checkout / "found-by-pip", "1.0")
    index = f'# package-index = "{served}/index"\n# build = "small"\n'
    header = NEW.replace("# reason", f"{index}# reason").replace('["numpy>=2"]', '["made-up"]')
    (checkout / "backends/made_up.py").write_text(header, encoding="utf-8")
    (checkout / "constraints/rocm99.txt").write_text("made-up==1.0\n", encoding="utf-8")
    # Nothing else is installed: the cell gets no pytest, so it cannot pass.
    project = re.sub(r"(?m)^(qualification|optional) = .*$", r"\1 = []", (checkout / "pyproject.toml").read_text())
    (checkout / "pyproject.toml").write_text(project, encoding="utf-8")
    return checkout


def installed(checkout: Path, **environment: str) -> tuple[str, str]:
    """Install the cell; give which build it got, and what was said."""
    pip = {
        "PIP_FIND_LINKS": str(checkout / "found-by-pip"),
        "PIP_INDEX_URL": (checkout / "nothing").as_uri(),
        "NO_PROXY": "*",
    }
    done = nox(checkout, "-s", "cell-rocm99-made-up", PIP_CONFIG_FILE=os.devnull, **pip, **environment)
    assert done.returncode == 1
    builds = [path.name for path in (checkout / ".nox/cell-rocm99-made-up").glob("lib/*/site-packages/made_up-*")]
    return " ".join(builds), done.stderr


def test_a_build_comes_from_the_headers_index(with_index: Path) -> None:
    wheel(with_index / "index/made-up", "1.0+small")
    builds, said = installed(with_index)
    assert builds == "made_up-1.0+small.dist-info", said
    assert "about 77 MB to download" in said


def test_an_index_in_the_environment_takes_the_place_of_the_headers(with_index: Path, served: str) -> None:
    wheel(with_index / "other/made-up", "1.0+small")
    builds, said = installed(with_index, PLIMSOLL_MADE_UP_INDEX=f"{served}/other")
    assert builds == "made_up-1.0+small.dist-info", said


def test_pips_own_configuration_serves_where_the_index_cannot_be_reached(with_index: Path) -> None:
    wheel(with_index / "found-by-pip", "1.0+small")
    builds, said = installed(with_index)
    assert builds == "made_up-1.0+small.dist-info", said
    assert "cannot be reached" in said


def test_another_build_is_never_installed_in_its_place(with_index: Path) -> None:
    builds, said = installed(with_index, PLIMSOLL_MADE_UP_INDEX="")
    assert builds == "", said
    assert "there is no made-up==1.0+small for this Python where pip is configured to look" in said
    assert "Set PLIMSOLL_MADE_UP_INDEX" in said


def test_a_cell_asked_for_by_name_that_cannot_run_is_an_error_with_the_reason(checkout: Path) -> None:
    (checkout / "constraints/cpu.txt").unlink()
    done = nox(checkout, "-s", "memory-quick-cpu")
    assert done.returncode == 1
    assert not list((checkout / ".nox").glob("cell-*")), "nothing is installed for it"
    assert "memory-quick-cpu cannot run here: constraints/cpu.txt is missing" in done.stderr


def test_the_umbrella_is_an_error_where_no_cell_can_run(checkout: Path) -> None:
    shutil.rmtree(checkout / "constraints")
    done = nox(checkout, "-s", "memory-quick")
    assert done.returncode == 1
    assert "not run: cpu in cpu: constraints/cpu.txt is missing" in done.stdout
    assert "memory-quick cannot run here: constraints/cpu.txt is missing" in done.stderr


def test_a_cell_that_cannot_run_does_not_keep_the_others_from_it_but_is_shown(checkout: Path) -> None:
    (checkout / "backends/made_up.py").write_text(NEW.replace('">=3.11"', '">=9.9"'), encoding="utf-8")
    done = nox(checkout, "--no-venv", "-s", "memory-quick-cpu", "--", "--version")
    assert "not run: made-up in cpu: Python 9.9 or newer is needed" in done.stderr
    assert "queued: cell-cpu-cpu" in done.stderr
    assert "cell-cpu-made-up" not in done.stderr


def test_a_cell_that_cannot_run_has_a_record_that_says_why(checkout: Path) -> None:
    (checkout / "backends/made_up.py").write_text(NEW.replace('">=3.11"', '">=9.9"'), encoding="utf-8")
    nox(checkout, "--no-venv", "-s", "memory-quick-cpu", "--", "--version", "--results", "mine")
    (path,) = (checkout / "mine").glob("*.jsonl")
    found = records.read(path)
    assert found.complete and found.run["collected"] == []
    assert (found.run["backend"], found.run["environment"]) == ("made-up", "cpu")
    assert found.run["not_run"].startswith("Python 9.9 or newer is needed"), found.run["not_run"]
    assert found.run["machine"] == identity.machine()


def test_a_release_runs_everything_then_reports_and_is_red_where_nothing_was_proven(tmp_path: Path) -> None:
    results, hook = tmp_path / "results", tmp_path / "told.json"
    done = nox(
        *(ROOT, "--no-venv", "-s", "qualify", "--", "--backend", "cpu", "--collect-only", "-q"),
        *("--results", str(results), "--gate", "gates/quick.toml", "--history", str(tmp_path / "history.sqlite")),
        # What follows is the command's, whatever it looks like.
        *("--on-finish", "tee", "--append", str(hook)),
    )
    assert done.returncode == 1
    commands = re.findall(r"> python -m (pytest .*|qualification .*)", done.stderr)
    assert [each.split()[0] for each in commands] == ["pytest", "pytest", "qualification"], done.stderr
    assert "not (sweep and slow)" in commands[0] and "--resume" in commands[0]
    assert "'sweep and slow'" in commands[1] and "--resume" in commands[1]
    assert all(f"--on-finish 'tee --append {hook}'" in each for each in commands[:2]), commands
    assert commands[2].endswith(f" --on-finish tee --append {hook}"), commands
    made = json.loads((results / "report" / "report.json").read_text(encoding="utf-8"))
    assert made["verdict"] == "fail" and made["gate"]["source"] == "gates/quick.toml"
    assert "no record of cpu in cpu" in made["reasons"][0]
    assert json.loads(hook.read_text(encoding="utf-8"))["kind"] == "report"
    assert history.last(tmp_path / "history.sqlite") == json.loads(hook.read_text(encoding="utf-8"))


@pytest.mark.parametrize("words", [["--on-finish"], ["--on-finish", ""], ["--on-finish=tee"]], ids=repr)
def test_a_release_that_has_no_command_to_tell_is_refused_at_once(tmp_path: Path, words: list[str]) -> None:
    results = tmp_path / "results"
    done = nox(ROOT, "--no-venv", "-s", "qualify", "--", "--results", str(results), *words)
    assert done.returncode == 1 and not results.exists()
    assert f"{words[0]} names no command: expected --on-finish as the last option" in done.stderr, done.stderr


def test_a_release_on_a_machine_that_can_run_nothing_has_a_report_that_says_so(checkout: Path) -> None:
    for name in ("backends", "qualification", "gates", "protection"):
        shutil.copytree(ROOT / name, checkout / name, dirs_exist_ok=True)
    for environment in ENVIRONMENTS:
        (checkout / "constraints" / f"{environment}.txt").unlink()
    done = nox(checkout, "--no-venv", "-s", "qualify")
    assert done.returncode == 1, done.stderr
    (path,) = (checkout / "results").glob("qualify-*/report/summary.md")
    assert "not run: constraints/cpu.txt is missing" in path.read_text(encoding="utf-8")


def test_one_backend_is_chosen_and_quick_full_and_sweeping_runs_share_its_cell() -> None:
    done = nox(
        ROOT,
        *("--no-venv", "-s", *(f"{kind}-cpu" for kind in KINDS), "memory-quick-cpu"),
        *("--", "--backend=cpu", "--collect-only", "-q", "-k", "oom_detection or fault_sweep"),
    )
    assert done.returncode == 0, done.stderr
    every = "tests/test_memory_protection.py tests/test_oom_recovery.py tests/test_fault_sweep.py"
    expected = [
        f"{every} -v -m 'not slow'",
        f"{every} -v -m 'not (sweep and slow)'",
        "tests/test_fault_sweep.py -v -m 'sweep and slow'",
    ]
    runs = re.findall(r"python -m pytest -c pytest_memory.ini (.*)", done.stderr)
    given = "--collect-only -q -k 'oom_detection or fault_sweep' --backend cpu"
    # What takes hours goes on where it was cut off.
    assert runs == [f"{each} {given}{'' if 'not slow' in each else ' --resume'}" for each in expected]
    tests = re.findall(r"<Function (\w+)>", done.stdout)
    assert tests == [
        *("test_oom_detection", "test_fault_sweep_sample"),
        *("test_oom_detection", "test_fault_sweep_sample"),
        *("test_fault_sweep", "test_device_fault_sweep"),
    ]


def test_marks_that_are_asked_for_narrow_a_sweep_down() -> None:
    done = nox(
        *(ROOT, "--no-venv", "-s", "memory-sweep-cpu"),
        *("--", "--backend=cpu", "--collect-only", "-q", "-m", "gpu or stress"),
    )
    assert done.returncode == 0, done.stderr
    assert "-m '(gpu or stress) and sweep and slow'" in done.stderr
    assert re.findall(r"<Function (\w+)>", done.stdout) == ["test_device_fault_sweep"]


def test_a_cell_that_fails_does_not_keep_the_next_from_being_judged(checkout: Path) -> None:
    # There are no tests in this checkout, so both fail at once.
    done = nox(checkout, "--no-venv", "-s", "memory-quick-cpu")
    assert done.returncode == 1
    for backend in (backend for backend, environment in CELLS if environment == "cpu"):
        assert f"not qualified: {backend} in cpu" in done.stderr


def test_a_backend_that_an_environment_does_not_have_is_refused_with_the_nearest() -> None:
    done = nox(ROOT, "-s", "memory-quick-cpu", "--", "--backend", "torch-cup")
    assert done.returncode == 1
    assert "memory-quick-cpu has no backend 'torch-cup': expected torch-cpu" in done.stderr


def test_a_cell_that_has_run_is_not_silently_left_out_of_a_later_session() -> None:
    done = nox(ROOT, "--no-venv", "-s", "cell-cpu-cpu", "memory-soak-cpu", "--", "--backend", "cpu", "--version")
    assert done.returncode == 1
    assert "cell-cpu-cpu has run already" in done.stderr


def test_the_doctor_is_a_session() -> None:
    done = nox(ROOT, "-s", "doctor")
    assert re.search(r"backend +environment +can run", done.stdout), done.stderr


def test_lock_refuses_an_argument_that_it_does_not_know(checkout: Path) -> None:
    done = nox(checkout, "-s", "lock", "--", "--chekc")
    assert done.returncode == 1
    assert "unknown argument --chekc: expected --check or --upgrade" in done.stderr


@pytest.mark.parametrize("path", PINS, ids=[path.stem for path in PINS])
def test_the_pins_are_as_they_were_generated(path: Path) -> None:
    first, _, body = path.read_text(encoding="utf-8").partition("\n")
    assert first.startswith("# Generated by `nox -s lock`")
    assert first.endswith(hashlib.sha256(body.encode()).hexdigest()), f"{path.name} was edited by hand: nox -s lock"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_pins_cover_what_the_headers_and_groups_ask_for(environment: str) -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    wanted = [*groups["qualification"], *groups["optional"]]
    needs = [found.needs[environment] for found in backends.declared() if environment in found.environments]
    wanted += [item for each in needs for item in each.dependencies]
    pins = (ROOT / f"constraints/{environment}.txt").read_text(encoding="utf-8")
    missing = [item for item in wanted if f"\n{re.split(r'[^A-Za-z0-9._-]', item)[0]}==" not in pins]
    assert not missing, f"nox -s lock: constraints/{environment}.txt has no pin for {missing}"


@pytest.mark.parametrize(("environment", "major"), [("cuda12", "cu12"), ("cuda13", "cu13")])
def test_the_pins_of_a_cuda_environment_are_of_its_cuda(environment: str, major: str) -> None:
    pins = (ROOT / f"constraints/{environment}.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^nvidia-[\w-]+-(cu\d+)==", pins)) == {major}


@pytest.mark.parametrize("name", ["cpu", "dev"])
def test_the_pins_without_an_accelerator_bring_nothing_of_cuda(name: str) -> None:
    pins = (ROOT / f"constraints/{name}.txt").read_text(encoding="utf-8")
    assert re.search(r"(?m)^torch==", pins)
    assert not re.findall(r"(?m)^(?:nvidia|cuda|triton).*", pins)


def test_a_pin_that_is_an_exception_says_why_beside_it() -> None:
    for declared in backends.declared():
        for environment, needs in declared.needs.items():
            pins = (ROOT / f"constraints/{environment}.txt").read_text(encoding="utf-8")
            for requirement in needs.own:
                name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
                found = re.search(rf"(?m)^{name}==.*\n    # why: (.*)$", pins)
                assert found is not None, f"{name} in {environment}"
                assert (needs.reason or "").startswith(found[1]), f"{name} in {environment}"


def _noxfile(call: str) -> str:
    program = f"import noxfile; print({call})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_cuda_build_is_tested_for_its_refusals_without_cuda_itself() -> None:
    found = json.loads(nox(ROOT, "--list", "--json", "-t", "refusals").stdout)
    assert {entry["session"] for entry in found} == {"refusals-cuda12", "refusals-cuda13"}
    asked = _noxfile("[noxfile.without_extras(each) for each in ('cpu', 'cuda12', 'cuda13')]")
    assert asked == str([[], ["onnxruntime-gpu>=1.23,<1.27,!=1.24.1,!=1.25.*,!=1.26.0"], ["onnxruntime-gpu>=1.27"]])


def test_marks_that_are_asked_for_are_combined_with_not_slow() -> None:
    asked = [["-x"], ["-m", "oom", "-x"], ["-moom"], ["-m=oom or gpu"]]
    found = _noxfile(f"[noxfile.take_option(each, '-m') for each in {asked}]")
    assert found == str([("", ["-x"]), ("oom", ["-x"]), ("oom", []), ("oom or gpu", [])])


def test_an_option_is_taken_out_with_its_value_and_nothing_that_only_looks_like_it() -> None:
    asked = [["-x", "--backend", "cpu"], ["--backend=cpu", "-x"], ["--backends", "cpu"], ["--model=m", "-m", "oom"]]
    found = _noxfile(f"[noxfile.take_option(each, '--backend') for each in {asked[:3]}]")
    assert found == str([("cpu", ["-x"]), ("cpu", ["-x"]), ("", ["--backends", "cpu"])])
    assert _noxfile(f"noxfile.take_option({asked[3]}, '-m')") == str(("oom", ["--model=m"]))


def test_what_exists_is_a_selection_of_tests_unless_it_is_the_value_of_an_option() -> None:
    asked = [
        ["tests/unit"],
        ["./tests/test_oom_recovery.py::TestOOMDetection"],
        ["--audio", "tests/data/speech.wav"],
        ["--model=backends/data/acoustic.onnx"],
        ["-k", "tests"],
        ["-x"],
        [""],
    ]
    found = _noxfile(f"[noxfile.selects_tests(each) for each in {asked}]")
    assert found == str([True, True, False, False, False, False, False])


MEETING = """
import pathlib, time

def test_the_other_runs_at_the_same_time():
    pathlib.Path("{own}-is-here").touch()
    deadline_s = time.monotonic() + 60
    while not pathlib.Path("{other}-is-here").exists():
        assert time.monotonic() < deadline_s, "{other} did not come"
        time.sleep(0.01)
    time.sleep({stays_s})
    assert not {fails}, "{own} fails"
"""


def meeting(checkout: Path, fails: str = "", stays_s: float = 0) -> list[str]:
    """Put a unit test and a meta test that wait for each other in a checkout, and give the command that runs both."""
    (checkout / "pytest_memory.ini").write_text("[pytest]\n", encoding="utf-8")
    for own, other in (("unit", "meta"), ("meta", "unit")):
        (checkout / "tests" / own).mkdir(parents=True)
        text = MEETING.format(own=own, other=other, stays_s=stays_s, fails=own == fails)
        (checkout / "tests" / own / f"test_{own}.py").write_text(text, encoding="utf-8")
    return ["--no-venv", "-s", "tests"]


@pytest.mark.parametrize("fails", ["unit", "meta"])
def test_unit_and_meta_tests_run_at_the_same_time_and_either_fails_the_session(checkout: Path, fails: str) -> None:
    done = nox(checkout, *meeting(checkout, fails))
    assert done.returncode == 1, done.stdout + done.stderr
    said = re.findall(r"(?m)^=+ (1 \w+) in .* =+$|^(tests/\w+/test_\w+\.py) ", done.stdout)
    expected = [f"1 {'failed' if each == fails else 'passed'}" for each in ("unit", "meta")]
    assert [line[0] for line in said if line[0]] == expected, done.stdout
    assert [line[1] for line in said if line[1]] == ["tests/unit/test_unit.py", "tests/meta/test_meta.py"], done.stdout
    command = "python -m pytest -c pytest_memory.ini"
    assert f"failed: {command} tests/{fails} " in done.stderr, done.stderr


def test_arguments_go_to_one_run_of_both(checkout: Path) -> None:
    done = nox(checkout, *meeting(checkout), "--", "--collect-only", "-q")
    assert done.returncode == 0 and "\n2 tests collected" in done.stdout, done.stdout + done.stderr
    assert re.findall(r"python -m pytest (.*)", done.stderr) == [
        "-c pytest_memory.ini tests/unit tests/meta --collect-only -q"
    ]


def test_where_nothing_but_installing_is_asked_for_neither_runs(checkout: Path) -> None:
    done = nox(checkout, "--install-only", *meeting(checkout))
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
    assert not (checkout / "unit-is-here").exists() and not (checkout / "meta-is-here").exists()


@pytest.mark.parametrize("to_all", [True, False], ids=["at a terminal", "to nox alone"])
def test_ctrl_c_ends_both(checkout: Path, to_all: bool) -> None:
    command = [sys.executable, "-m", "nox", "--no-color", "-f", str(checkout / "noxfile.py")]
    process = subprocess.Popen(
        [*command, *meeting(checkout, stays_s=600)],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    try:
        deadline_s = time.monotonic() + 60
        while not all((checkout / f"{each}-is-here").exists() for each in ("unit", "meta")):
            assert time.monotonic() < deadline_s and process.poll() is None, "they did not begin"
            time.sleep(0.05)
        runs = [each for each in psutil.Process(process.pid).children(recursive=True) if each.is_running()]
        assert len(runs) == 2, runs
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=100)
        assert process.returncode != 0, said
        assert not psutil.wait_procs(runs, timeout=30)[1], f"still running: {runs}"
        assert "tests/meta/test_meta.py" in said and "KeyboardInterrupt" in said, said
    finally:
        process.kill()
        process.communicate()
