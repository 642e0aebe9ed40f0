"""The matrix of a CI system: one job for each declared cell, or an error; and what the workflow makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import backends
from qualification.ci_matrix import ALL, CPU, GPU, LABELS, BadMatrix, labels, matrix

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = (ROOT / ".github" / "workflows" / "memory.yml").read_text(encoding="utf-8")
RUNNERS = {kind: labels(text) for kind, text in LABELS.items()}
OWN = ["self-hosted", "linux", "x64", "gpu"]
NEW = """\
# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2"]
#
# [tool.plimsoll]
# backend = "made-up"
# tags = ["made"]
#
# [tool.plimsoll.environments.rocm99]
# download-mb = 1
# disk-mb = 1
# ///
"""


def python(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "GITHUB_OUTPUT"} | environment
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False
    )


def ci_matrix(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(ROOT, "qualification.ci_matrix", *arguments, **environment)


def jobs(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Read the jobs of a matrix that was printed, and nothing else with it."""
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout + done.stderr
    text = json.loads(done.stdout)
    assert list(text) == ["include"]
    found: list[dict[str, Any]] = text["include"]
    return found


@pytest.fixture(scope="module")
def listed() -> Any:
    """What nox lists: the cells, and sessions that are none."""
    done = python(ROOT, "nox", "--list", "--json", "-t", "cells", "checks")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"lint", "cell-cpu-cpu"} <= {each["session"] for each in found}
    return found


@pytest.fixture(scope="module")
def printed() -> list[dict[str, Any]]:
    """The jobs that the session prints by itself."""
    return jobs(python(ROOT, "nox", "-s", "ci-matrix"))


@pytest.fixture
def declared_too(tmp_path: Path) -> tuple[backends.Declared, ...]:
    """What is declared where there is one more backend."""
    for path in (ROOT / "backends").glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "made_up.py").write_text(NEW, encoding="utf-8")
    return backends.declared(tmp_path)


def test_there_is_one_job_for_each_declared_cell(printed: list[dict[str, Any]]) -> None:
    expected = [
        {
            "backend": backend.name,
            "environment": name,
            "session": f"cell-{name}-{backend.name}",
            "accelerator": "cpu" if needs.cuda is None else "gpu",
            "runs-on": "ubuntu-latest" if needs.cuda is None else OWN,
        }
        for backend in backends.declared()
        for name, needs in backend.needs.items()
    ]
    assert len(printed) == len(expected) and all(job in printed for job in expected), printed


def test_what_the_session_prints_is_the_matrix_of_what_nox_lists(listed: Any, printed: list[dict[str, Any]]) -> None:
    assert matrix(listed, backends.declared(), RUNNERS) == {"include": printed}


def test_variables_that_choose_sessions_leave_no_cell_out(printed: list[dict[str, Any]]) -> None:
    assert jobs(ci_matrix(NOXKEYWORDS="ci", NOXPYTHON="3.11")) == printed


def test_a_new_backend_is_one_job_more(tmp_path: Path, printed: list[dict[str, Any]]) -> None:
    for name in ("backends", "qualification"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("noxfile.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "backends/made_up.py").write_text(NEW, encoding="utf-8")
    found = jobs(python(tmp_path, "nox", "-s", "ci-matrix"))
    new = [job for job in found if job not in printed]
    assert [(job["session"], job["accelerator"]) for job in new] == [("cell-rocm99-made-up", "cpu")]
    assert len(found) == len(printed) + 1


@pytest.mark.parametrize("only", [CPU, GPU])
def test_only_one_kind_of_cell_can_be_asked_for(only: str, printed: list[dict[str, Any]]) -> None:
    found = jobs(ci_matrix("--only", only))
    assert found and found == [job for job in printed if job["accelerator"] == only]
    assert jobs(ci_matrix("--only", ALL)) == printed


def test_the_runners_are_the_labels_that_are_asked_for() -> None:
    found = jobs(ci_matrix("--cpu-labels", "own, big", "--gpu-labels=one"))
    assert {job["accelerator"]: job["runs-on"] for job in found} == {"cpu": ["own", "big"], "gpu": "one"}


def test_a_declared_cell_that_nox_does_not_list_is_an_error(
    listed: Any, declared_too: tuple[backends.Declared, ...]
) -> None:
    with pytest.raises(BadMatrix, match="nox lists no session cell-rocm99-made-up: expected one with the tag cells"):
        matrix(listed, declared_too, RUNNERS)


def test_a_listed_cell_that_is_not_declared_is_an_error(listed: Any) -> None:
    fewer = [backend for backend in backends.declared() if backend.name != "torch-cpu"]
    with pytest.raises(BadMatrix, match="declares the cell of cell-cpu-torch-cpu: expected only cell-cpu-cpu, "):
        matrix(listed, fewer, RUNNERS)


def test_a_session_counts_as_a_cell_by_its_tag_alone(listed: Any) -> None:
    untagged = [{**each, "tags": []} if each["session"] == "cell-cpu-cpu" else each for each in listed]
    with pytest.raises(BadMatrix, match="nox lists no session cell-cpu-cpu"):
        matrix(untagged, backends.declared(), RUNNERS)


def test_a_matrix_without_a_job_is_an_error(listed: Any) -> None:
    on_cpu = [each for each in listed if each["session"].startswith("cell-cpu-")]
    declared = [backend for backend in backends.declared() if backend.environments == ("cpu",)]
    with pytest.raises(BadMatrix, match="--only gpu leaves no cell"):
        matrix(on_cpu, declared, RUNNERS, GPU)


@pytest.mark.parametrize("what", [{}, None, ["cell-cpu-cpu"], [{"name": "x"}]], ids=repr)
def test_what_is_no_list_of_sessions_is_an_error(what: Any) -> None:
    with pytest.raises(BadMatrix, match="expected a list of sessions"):
        matrix(what, backends.declared(), RUNNERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "tpu"], "argument --only: invalid choice: 'tpu' (choose from "),
        (["--only"], "argument --only: expected one argument"),
        (["--gpu-labels", ""], "'' names no runner: expected labels with commas between them, such as self-hosted,"),
        (["--gpu-labels", "a,,b"], "'a,,b' names no runner"),
        (["--cpu-labels", "a b"], "'a b' names no runner"),
        (["--label", "a"], "unrecognized arguments: --label a"),
        (["--github-output"], "--github-output needs GITHUB_OUTPUT, the file that GitHub names in each step: it is"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_bad_option_is_refused(arguments: list[str], said: str) -> None:
    done = ci_matrix(*arguments)
    assert done.returncode == 2 and not done.stdout, done.stdout
    assert said in done.stderr, done.stderr


def test_a_refusal_fails_the_session() -> None:
    done = python(ROOT, "nox", "-s", "ci-matrix", "--", "--only", "tpu")
    assert done.returncode == 1 and not done.stdout and "invalid choice" in done.stderr, done.stdout + done.stderr


def test_the_matrix_is_handed_over_as_an_output_of_the_step(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_text("before=1\n", encoding="utf-8")
    done = ci_matrix("--github-output", "--only", "cpu", GITHUB_OUTPUT=str(output))
    assert jobs(done)
    assert output.read_text(encoding="utf-8") == f"before=1\nmatrix={done.stdout}"


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = ci_matrix("--github-output", GITHUB_OUTPUT=str(tmp_path))
    assert done.returncode == 2 and not done.stdout and "GITHUB_OUTPUT cannot be written to" in done.stderr, done.stderr


# The workflow.

QUICK = 'nox -s "memory-quick-$ENVIRONMENT" -- --backend "$BACKEND" $OPTIONS'
WHOLE = 'nox -s "memory-sweep-$ENVIRONMENT" "memory-soak-$ENVIRONMENT" -- --backend "$BACKEND" $OPTIONS'
#: Repository variables.
VARIABLES = ("PLIMSOLL_GPU", "PLIMSOLL_GPU_LABELS", "PLIMSOLL_CPU_LABELS", "PLIMSOLL_OPTIONS")


def value(expression: str, event: str, **variables: str) -> Any:
    """Give what an expression of a workflow is: its operators mean what Python's do."""
    text = expression.replace("&&", "and").replace("||", "or")
    names = {
        "github": SimpleNamespace(event_name=event),
        "vars": SimpleNamespace(**{**dict.fromkeys(VARIABLES, ""), **variables}),
    }
    return eval(text, {"__builtins__": {}, **names})


def expression(name: str) -> str:
    """Give the expression that an environment variable of the workflow is set to."""
    found = re.findall(rf"(?m)^ +{name}: \$\{{\{{ (.+) \}}\}}$", WORKFLOW)
    assert len(found) == 1, f"{name}: {found}"
    return str(found[0])


@pytest.mark.parametrize(
    ("event", "variables", "only", "command", "gate"),
    [
        ("pull_request", {}, "cpu", QUICK, "quick"),
        ("pull_request", {"PLIMSOLL_GPU": "true"}, "cpu", QUICK, "quick"),
        ("schedule", {}, "cpu", WHOLE, "nightly"),
        ("schedule", {"PLIMSOLL_GPU": "true"}, "all", WHOLE, "release"),
        ("release", {}, "all", WHOLE, "release"),
        ("workflow_dispatch", {}, "all", WHOLE, "release"),
    ],
)
def test_a_trigger_runs_this(event: str, variables: dict[str, str], only: str, command: str, gate: str) -> None:
    triggers = re.search(r"(?ms)^on:\n(.*?)^\S", WORKFLOW)
    assert triggers and f"  {event}:\n" in triggers[1]
    assert value(expression("ONLY"), event, **variables) == only
    steps = re.findall(r"(?m)^        if: (github.+)\n        run: (.+)$", WORKFLOW)
    run = [what for condition, what in steps if value(condition, event, **variables)]
    assert run == [command, f"nox -s report -- merged --gate gates/{gate}.toml"]


def test_the_gates_of_the_workflow_are_there() -> None:
    named = re.findall(r"--gate (\S+)", WORKFLOW)
    assert len(set(named)) == 3 and not [name for name in named if not (ROOT / name).is_file()]


def test_every_repository_variable_is_described() -> None:
    assert set(re.findall(r"vars\.(\w+)", WORKFLOW)) == set(VARIABLES)
    described = re.findall(r"(?m)^- `(PLIMSOLL_\w+)`: ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(described) == sorted(VARIABLES)


def test_the_runners_of_the_workflow_are_the_defaults_unless_a_variable_names_others() -> None:
    for kind in LABELS:
        name = f"{kind.upper()}_LABELS"
        assert value(expression(name), "release") == LABELS[kind]
        assert value(expression(name), "release", **{f"PLIMSOLL_{name}": "own"}) == "own"


def test_a_pull_request_never_gets_to_a_runner_of_ones_own() -> None:
    assert value(expression("ONLY"), "pull_request", PLIMSOLL_GPU="true") == CPU
    assert value(expression("CPU_LABELS"), "pull_request", PLIMSOLL_CPU_LABELS="own") == LABELS[CPU]


@pytest.mark.parametrize("options", ["", "--allow-device-faults --lock-wait 60"])
def test_the_options_of_the_workflow_are_words_of_the_command(options: str) -> None:
    # As GitHub runs it, with an echo in the place of nox.
    for command in (QUICK, WHOLE):
        given = value(expression("OPTIONS"), "release", PLIMSOLL_OPTIONS=options)
        env = {"BACKEND": "cpu", "ENVIRONMENT": "cpu", "OPTIONS": given}
        script = f"printf '%s\\n' {command.removeprefix('nox ')}"
        done = subprocess.run(["bash", "-e", "-c", script], env=env, capture_output=True, text=True, check=True)
        words = done.stdout.splitlines()
        assert words[words.index("--") + 1 :] == ["--backend", "cpu", *options.split()]


def test_the_folder_of_the_report_is_there_where_no_cell_kept_a_record() -> None:
    runs = re.findall(r"(?m)^        run: (.+)$", WORKFLOW.split("\n  report:\n")[1])
    assert runs.index("mkdir -p merged") < runs.index("nox -s report -- merged --gate gates/quick.toml")


def test_the_workflow_asks_of_the_matrix_what_a_job_has(printed: list[dict[str, Any]]) -> None:
    asked = set(re.findall(r"\$\{\{ matrix\.([\w-]+) \}\}", WORKFLOW))
    assert asked == {"backend", "environment", "session", "runs-on"}
    assert all(asked <= set(job) for job in printed)
    # One artifact for each cell.
    assert len({job["session"] for job in printed}) == len(printed)


def test_no_expression_is_pasted_into_a_command_and_every_variable_is_set() -> None:
    commands = re.findall(r"(?m)^ +(?:- )?run: (.+)$", WORKFLOW)
    assert len(commands) == WORKFLOW.count("run:") and not [each for each in commands if "${{" in each or each == "|"]
    used = {name for command in commands for name in re.findall(r"\$\{?(\w+)", command)}
    given = set(re.findall(r"(?m)^ +([A-Z_]+): \$\{\{", WORKFLOW))
    assert used - {"GITHUB_STEP_SUMMARY"} == given
    assert "secrets." not in WORKFLOW and "github.event." not in WORKFLOW


def test_the_workflow_may_only_read() -> None:
    assert re.findall(r"(?m)^( *)permissions:\n(.+)$", WORKFLOW) == [("", "  contents: read")]
    assert WORKFLOW.count("actions/checkout@") == WORKFLOW.count("persist-credentials: false")


def test_every_job_ends_within_what_github_allows() -> None:
    found = [int(minutes) for minutes in re.findall(r"(?m)^    timeout-minutes: (\d+)$", WORKFLOW)]
    assert len(found) == len(re.findall(r"(?m)^    runs-on:", WORKFLOW)) == 3 and max(found) < 360
