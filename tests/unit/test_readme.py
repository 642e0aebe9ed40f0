"""The README is true: criteria, commands, links, marks, sessions and options are what the code has."""

from __future__ import annotations

import ast
import configparser
import functools
import inspect
import itertools
import json
import os
import re
import shlex
import sqlite3
import string
import subprocess
import sys
import tomllib
import wave
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import backends
from backends.contract import Backend, Capability, Site
from backends.model import DEFAULT_MODEL, read_onnx
from protection.policy import Policy
from qualification import history, plugin, records
from qualification.criteria import CRITERIA, PARAMETERS, PROFILES, Criterion
from qualification.doctor import session as cell_session
from qualification.records import RecordWriter
from qualification.report import command as report_command
from qualification.report import gate as report_gate
from qualification.run import DEFAULT_AUDIO, prepare
from qualification.subject import DEFAULT_SUBJECT, EVENT_KINDS, STRATEGIES, load_factory
from qualification.sweep.campaign import PROBLEMS, Tally
from qualification.sweep.points import DEVICE_SWEEPS, HOST, RUNTIME, SWEEPS, TRANSIENT

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / ".github" / "workflows" / "memory.yml"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "data" / "README.md"]
QUALIFICATION = ("tests/test_memory_protection.py", "tests/test_oom_recovery.py", "tests/test_fault_sweep.py")
TESTS = list(dict.fromkeys(criterion.test for criterion in CRITERIA))

#: Commands that are shown and not executed: their first words, and why not.
EXEMPT = {
    "pip install nox": "needs a package index; the session that runs this test was made by nox",
    "pipx run nox": "needs pipx and a package index; its session is checked",
    "uvx nox": "needs uv and a package index; its session is checked",
    "python3 -m venv .venv": "makes a virtual environment in the checkout",
    ". .venv/bin/activate": "changes the shell that it is typed into",
    "nvidia-smi": "needs an NVIDIA driver",
    "watch": "runs until it is stopped, in a second terminal",
    "ls -t results": "the folder is there after the first run",
    "mkdir -p merged": "makes the folder for the report of the workflow",
    "cat merged/report/summary.md": "the folder is there after the report of the workflow",
    "espeak-ng": "needs a speech synthesiser; the recording is committed",
    "sox": "needs SoX; the recording is committed",
}


# Reading the documents.


def fences(text: str, *languages: str) -> list[str]:
    """Give the fenced blocks of these languages."""
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text)
    return [body for language, body in found if language in languages]


def commands_in(text: str) -> list[str]:
    """Give every command: the lines of bash blocks, and commands in running text."""
    lines = [line for body in fences(text, "bash") for line in body.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:pytest|nox|python3?|pip|pipx|uvx) [^`\n]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))
    commands = [" ".join(line.split()) for line in (*lines, *inline)]
    # A name in capitals or a `…` stands for something that is to be filled in.
    return [each for each in commands if each and not each.startswith("#") and not re.search(r"…|\b[A-Z]{4,}\b", each)]


def workflow_commands(text: str) -> list[str]:
    """Give what a workflow runs, for each cell and each value that its expressions give to the variables."""
    expressions = dict(re.findall(r"(?m)^\s+([A-Z_]+): \$\{\{ (.+) \}\}$", text))
    cells = [
        {"matrix.backend": backend.name, "matrix.environment": environment}
        for backend in backends.declared()
        for environment in backend.environments
    ]
    found = []
    for command in re.findall(r"(?m)^\s+(?:- )?run: (.+)$", text):
        used = [name for name in expressions if f"${name}" in command]
        for cell in cells:
            choices = [
                [cell[expressions[name]]]
                if expressions[name] in cell
                else re.findall(r"(?:&&|\|\|) '([^']*)'", expressions[name])
                for name in used
            ]
            assert all(choices), f"an expression gives no value to one of {used}"
            given = (dict(zip(used, values, strict=True)) for values in itertools.product(*choices))
            found += [string.Template(command).safe_substitute(each) for each in given]
    return found


COMMANDS = sorted(
    {
        *(command for path in DOCUMENTS for command in commands_in(path.read_text(encoding="utf-8"))),
        *workflow_commands(WORKFLOW.read_text(encoding="utf-8")),
    }
)


def exemptions(command: str) -> set[str]:
    """Give what exempts a command from being executed."""
    words = re.sub(r"^python3? -m pip ", "pip ", command) + " "
    return {each for each in EXEMPT if words.startswith(f"{each} ")}


def section(title: str) -> str:
    """Give the README's section under this heading, subsections included."""
    level, fenced, inside = 0, False, []
    for line in README.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        # A comment in a block of commands is no heading.
        heading = None if fenced else re.match(r"(#+) (.+)", line)
        if heading and level and len(heading[1]) <= level:
            break
        if level:
            inside.append(line)
        elif heading and heading[2] == title:
            level = len(heading[1])
    assert level, f"README.md has no section {title!r}"
    return "".join(inside)


#: Executed, one after another.
PROGRAM = commands_in(section("The pipeline as a program"))


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run in the checkout, or elsewhere with the checkout's packages."""
    # A cell has no hypothesis, whose plugin takes longer to import than tests to collect.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "-p no:hypothesispytest"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


def anchors(text: str) -> set[str]:
    """Give the anchors that GitHub makes of the headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


# The tests of the qualification: docstring, criteria, README.


@functools.cache
def docstrings() -> dict[str, tuple[str, str]]:
    """Give (id, docstring) of every test of the qualification, by name."""
    found: dict[str, tuple[str, str]] = {}
    for name in QUALIFICATION:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for group in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            for test in (node for node in group.body if isinstance(node, ast.FunctionDef)):
                if test.name.startswith("test_"):
                    found[test.name] = (f"{name}::{group.name}::{test.name}", ast.get_docstring(test) or "")
    return found


def bullets(text: str) -> list[str]:
    """Give the first list after ``Pass criteria:``."""
    found = re.search(r"Pass criteria:(?:\*\*)?\n((?:- .+(?:\n|\Z))+)", text)
    return [] if found is None else [line.removeprefix("- ") for line in found[1].splitlines()]


def scenario(identity: str) -> str:
    """Give the README's text under the test's own command."""
    found = re.search(rf"(?ms)^pytest {re.escape(identity)} -v\n```\n(.*?)(?=^#|\Z)", section("Test scenarios"))
    assert found, f"README.md has no scenario with the command: pytest {identity} -v"
    return found[1]


def test_every_test_has_criteria_and_every_criterion_a_test() -> None:
    assert set(docstrings()) == set(TESTS), f"only one of the two: {set(docstrings()) ^ set(TESTS)}"


@pytest.mark.parametrize("name", TESTS)
def test_docstring_readme_and_criteria_promise_the_same(name: str) -> None:
    identity, docstring = docstrings()[name]
    promises = [criterion.promise for criterion in CRITERIA if criterion.test == name]
    assert bullets(docstring) == promises, f"the docstring of {name} promises {bullets(docstring)}"
    shown = scenario(identity)
    assert bullets(shown) == promises, f"README.md promises {bullets(shown)} for {name}"
    what = " ".join(docstring.split("Pass criteria:")[0].split())
    assert f"**Tests:** {what}\\" in shown, f"README.md does not say of {name}: {what}"
    assert re.search(r"(?m)^\*\*Duration:\*\* .+\\$", shown), f"README.md has no duration of {name}"


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda each: f"{each.test}-{each.name}")
def test_the_numbers_of_a_promise_are_its_limit(criterion: Criterion) -> None:
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", criterion.promise)}
    if criterion.limit not in (0, 1) or (criterion.limit and criterion.relation in ("<", "<=", ">")):
        assert criterion.limit in numbers, f"{criterion.promise!r} does not name its limit {criterion.limit:g}"
    policy = Policy()
    others = {parameter.value for parameter in PARAMETERS if parameter.test == criterion.test}
    others |= {100 * share for share in (policy.warning, policy.critical, policy.emergency, policy.shutdown)}
    unknown = numbers - others - {criterion.limit}
    assert not unknown, f"{criterion.promise!r} names {unknown}: no limit, parameter or level of pressure"


# Commands.


@functools.cache
def sessions() -> set[str]:
    """Give the sessions of ``nox --list``."""
    done = run(sys.executable, "-m", "nox", "--no-color", "--list")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?m)^[*-] (\S+) ", done.stdout))


@functools.cache
def collected() -> set[str]:
    """Give the ids of every test of the qualification, as pytest collects them."""
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-q", *QUALIFICATION)
    assert done.returncode == 0, done.stdout[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def collect(words: list[str], criteria: Path) -> str | None:
    """Have pytest collect what a command names; give what is wrong, or None."""
    ids, options = [word for word in words if word.startswith("tests/")], [word for word in words if "::" not in word]
    if options == ["-v"]:
        # Nothing but ids: one collection serves all of them.
        missing = [
            each for each in ids if not any(test == each or test.startswith(f"{each}::") for test in collected())
        ]
        return f"pytest has no {', '.join(missing)}" if missing else None
    words = [str(criteria) if word == "criteria.toml" else word for word in words]
    done = run(sys.executable, "-m", "pytest", "--collect-only", "-q", *words)
    return (
        None
        if done.returncode == 0
        else f"pytest ended with {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}"
    )


@functools.cache
def harness_help() -> str:
    """Give the stress harness's --help."""
    done = run(sys.executable, "tests/test_memory_protection.py", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@functools.cache
def a_history(criteria: Path) -> Path:
    """Make a history with one row."""
    path = criteria.with_name(history.FILE)
    history.store(path, history.KEY, {"kind": "report", "finished": "now", "verdict": "pass"})
    return path


def ask(words: list[str], criteria: Path) -> str | None:
    """Run what ``python -m qualification`` can do at once, and compare the options of the rest with its help."""
    start = (sys.executable, "-m", "qualification")
    match words:
        case []:
            done = run(*start, "--help")
        case ["list", *_]:
            done = run(*start, *words)
        case ["status"] | ["status", "--history", *_]:
            done = run(*start, "status", "--history", str(a_history(criteria)), *words[3:])
        case ["run", *_]:
            done = run(*start, *words, "--collect-only", "-q")
        case [command, *rest]:
            done = run(*start, command, "--help")
            unknown = {word for word in rest if word.startswith("--") and f"{word} " not in done.stdout}
            missing = {word for word in rest if word.endswith(".toml") and not (ROOT / word).is_file()}
            if unknown or missing:
                return f"{command} does not know {unknown}, or there is no {missing}"
    return f"it ended with {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}" if done.returncode else None


def check(command: str, criteria: Path) -> str | None:
    """Execute a command as far as its length allows; give what is wrong, or None."""
    words = shlex.split(command)
    if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2] in ("pytest", "nox", "pip"):
        words = words[2:]
    if exemptions(command):
        named = set(re.findall(r"nox -s ([\w-]+)", command))
        return f"nox has no session {named - sessions()}" if named - sessions() else None
    match words:
        case ["pytest", *rest]:
            return collect(rest, criteria)
        case ["nox", "-s", "doctor"]:
            done = run(sys.executable, "-m", "nox", "-s", "doctor")
            return None if "environment  can run" in done.stdout else f"nox ended with {done.returncode}: {done.stderr}"
        case ["nox", "-s", "ci-matrix", "--", *_]:
            # One of its own: two commands are checked at a time.
            output = criteria.with_name(re.sub(r"\W+", "-", command))
            output.write_text("", encoding="utf-8")
            done = run("env", f"GITHUB_OUTPUT={output}", sys.executable, "-m", *words)
            expected = f"matrix={done.stdout}" if "--github-output" in words else ""
            good = done.returncode == 0 and output.read_text(encoding="utf-8") == expected
            return None if good else f"nox ended with {done.returncode}: {done.stderr}"
        case ["nox", "-s", "qualify", "--", "--gate", gate]:
            return None if (ROOT / gate).is_file() else f"there is no {gate}"
        case ["nox", "-s", "qualify", "--", *rest] if "--on-finish" in rest[:-1]:
            # What follows is a command's.
            return collect([*QUALIFICATION, *rest[: rest.index("--on-finish")]], criteria)
        case ["nox", "-s", "report", "--", *rest]:
            gates = [after for option, after in itertools.pairwise(rest) if option == "--gate"]
            missing = [gate for gate in gates if not (ROOT / gate).is_file()]
            strange = {word for word in rest if word.startswith("-")} - {"--gate", "--out"}
            return f"there is no {missing}, or the report does not know {strange}" if missing or strange else None
        case ["nox", "-s", session, *_]:
            # Several sessions before the dashes get the same arguments.
            asked = list(itertools.takewhile(lambda word: word != "--", words[2:]))
            rest = words[2 + len(asked) :]
            if unlisted := {session, *asked} - sessions():
                return f"nox has no session {', '.join(sorted(unlisted))}"
            if not rest or session == "lock":
                unknown_to_lock = set(rest[1:]) - {"--check", "--upgrade"}
                return f"nox -s lock does not know {unknown_to_lock}" if unknown_to_lock else None
            if session == "tests":
                return collect(rest[1:], criteria)
            problem = collect([*QUALIFICATION, *rest[1:]], criteria)
            # Without a card it is refused for that: what it says is understood.
            lacking = "cuda" in session and problem and ("cannot run here" in problem or "has no device" in problem)
            return None if lacking else problem
        case ["nox", "--list", "--json", "-t", tag]:
            done = run(sys.executable, "-m", *words)
            return None if f'"{tag}"' in done.stdout else f"nox lists nothing under {tag}: {done.stderr}"
        case ["nox", "--list"]:
            return None if sessions() else "nox lists no session"
        case ["python", "-m", "protection", *_]:
            return None if command in PROGRAM else "it is not in the README's section on the program, which is executed"
        case ["pip", "install", "-r", name]:
            pins = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8"))
            required = re.findall(r"(?m)^[\w.-]+$", (ROOT / name).read_text(encoding="utf-8"))
            unpinned = set(required) - set(pins)
            return f"{name} requires {unpinned}, which have no pin" if unpinned or not required else None
        case ["python", "tests/test_memory_protection.py", *rest]:
            unknown = [word for word in rest if word.startswith("--") and word not in harness_help()]
            return f"the harness has no {', '.join(unknown)}" if unknown else None
        case ["python", "-m", "backends.model", file, *rest]:
            made = criteria.with_name("made.onnx")
            done = run(sys.executable, "-m", "backends.model", str(made), *rest)
            return done.stderr if done.returncode else different(made, ROOT / file)
        case ["python", "-m", "qualification", *rest]:
            return ask(rest, criteria)
        case ["sqlite3", _, query]:
            with closing(sqlite3.connect(a_history(criteria))) as database:
                rows = database.execute(query).fetchall()
            return None if rows == [("pass", "now")] else f"it gives {rows}"
        case ["python", "-m", "qualification.leaks", file]:
            # A trace of the reader's own is none of ours.
            trace = "tests/data/leaking.csv" if file == "TRACE.csv" else file
            done = run(sys.executable, "-m", "qualification.leaks", trace)
            shown = re.search(r'(?m)^\{"verdict": "leak".*?(?= \.\.\.$)', README)
            return None if shown and done.stdout.startswith(shown[0]) else f"it says {done.stdout}{done.stderr}"
        case ["python", "-m", "benchmarks.interposer_cost", "--pairs", pairs]:
            # It takes minutes. One pair too few is refused before anything is measured.
            done = run(sys.executable, "-m", "benchmarks.interposer_cost", "--pairs", "0")
            return None if f"expected at least {pairs}" in done.stderr else f"it says: {done.stderr}"
    return "it is neither executed here nor on the list of exemptions"


def different(made: Path, committed: Path) -> str | None:
    """Say how two models differ, or None."""
    (spec, weights), (its_spec, its_weights) = read_onnx(made), read_onnx(committed)
    if spec != its_spec:
        return f"it makes {spec}, and {committed.name} is {its_spec}"
    same = list(weights) == list(its_weights) and all(
        np.array_equal(weights[name], its_weights[name]) for name in weights
    )
    return None if same else f"the weights of {committed.name} are others"


@pytest.fixture(scope="module")
def wrong_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str | None]:
    """Check all commands once, two at a time, and give what is wrong with each."""
    criteria = tmp_path_factory.mktemp("readme") / "criteria.toml"
    criteria.write_text(fences(section("Criteria overrides"), "toml")[0], encoding="utf-8")
    sessions(), collected()
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(COMMANDS, pool.map(lambda command: check(command, criteria), COMMANDS), strict=True))
    return found.__getitem__


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_what_it_says(command: str, wrong_with: Callable[[str], str | None]) -> None:
    problem = wrong_with(command)
    assert problem is None, f"{command}: {problem}"


def test_the_programs_commands_work_one_after_another(tmp_path: Path) -> None:
    for command in PROGRAM:
        words = [str(ROOT / word) if word.startswith("tests/") else word for word in shlex.split(command)]
        done = run(sys.executable, *words[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
    with (
        wave.open(str(tmp_path / "my-recording.wav")) as exported,
        wave.open(str(ROOT / "tests/data/speech.wav")) as fed,
    ):
        samples = exported.readframes(exported.getnframes()), fed.readframes(fed.getnframes())
    assert samples[0] == samples[1], f"{len(samples[0])} bytes were exported, {len(samples[1])} recorded: not the same"


def test_every_exemption_is_needed() -> None:
    used = {each for command in COMMANDS for each in exemptions(command)}
    assert used == set(EXEMPT), f"no document has these commands any more: {set(EXEMPT) - used}"


def test_the_two_commands_come_first() -> None:
    assert fences(README, "bash")[0].splitlines() == ["python3 -m pip install nox", "nox -s memory-quick"]
    assert "Plimsoll tells you whether" in README.splitlines()[0]


# Names.


def test_every_session_that_is_named_exists() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (*DOCUMENTS, WORKFLOW))
    named = set(re.findall(r"nox -s ([a-z0-9-]*[a-z0-9])(?!…)\b", text))
    assert named - {"memory-quick-", "memory-soak-", "memory-sweep-"} <= sessions(), (
        f"nox has no session {named - sessions()}"
    )
    tables = "\n".join(line for line in README.splitlines() if line.startswith("| "))
    listed = set(re.findall(r"`nox -s ([\w-]+)`", tables))
    assert listed == sessions(), f"the README's tables and nox differ in {listed ^ sessions()}"


def test_the_matrix_is_that_of_the_headers_and_pins() -> None:
    expected = []
    for name in sorted({name for each in backends.declared() for name in each.environments}):
        pins = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
        for backend in backends.declared():
            if name in backend.environments:
                runtime = re.search(
                    rf"(?m)^({'torch' if 'torch' in backend.tags else 'onnxruntime(?:-gpu)?'})==(\S+)", pins
                )
                assert runtime, f"constraints/{name}.txt has no runtime for {backend.name}"
                session = cell_session(backend.name, name)
                size = f"{backend.needs[name].download_mb} MB"
                expected.append((backend.name, name, session, f"{runtime[1]} {runtime[2]}", size))
    row = r"(?m)^\| `([\w-]+)` \| `(\w+)` \| `nox -s ([\w-]+)` \| (\S+ \S+) \| (\d+ MB) \|$"
    assert re.findall(row, section("The matrix")) == expected


def test_the_marks_are_those_of_the_configuration() -> None:
    configuration = configparser.ConfigParser(interpolation=None)
    configuration.read(ROOT / "pytest_memory.ini")
    declared = configuration["pytest"]["markers"].strip().splitlines()
    names = [re.split(r"[(:]", line, maxsplit=1)[0] for line in declared]
    assert re.findall(r"(?m)^  - `(\w+)`: ", section("Test configuration")) == names
    assert set(re.findall(r"@pytest\.mark\.(\w+)", README)) <= set(names)
    assert configuration["pytest"]["timeout"] == "7200" and configuration["pytest"]["log_level"] == "INFO"


def test_the_options_are_those_of_pytest_help() -> None:
    text = run(sys.executable, "-m", "pytest", "--help").stdout
    ours = re.search(r"(?ms)^qualification \(Plimsoll\):\n(.*?)^\S", text)
    assert ours, "pytest --help has no group of ours"
    declared = re.findall(r"(?m)^  (--[\w-]+)(?:=(\S+))?", ours[1])
    assert re.findall(r"(?m)^\| `(--[\w-]+)(?: (\S+))?` \|", section("Options")) == declared


def test_the_parameters_of_the_harness_have_their_defaults() -> None:
    shown = dict(re.findall(r"(?m)^- `(--[\w-]+)`: .+\(default: (.+)\)$", section("Memory stress harness")))
    flat = " ".join(harness_help().split())
    for option, default in shown.items():
        assert re.search(rf"{option} [A-Z]+ [^-]*?\(default: {re.escape(default)}\)", flat), f"{option}: not {default}"
    expected = ["--duration", "--gpu-pressure", "--cpu-pressure", "--toggle-interval", "--backend"]
    assert list(shown) == expected


def test_the_workflow_of_the_readme_is_the_one_that_runs() -> None:
    assert fences(README, "yaml") == [WORKFLOW.read_text(encoding="utf-8")]


# Links and files.


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    named = re.findall(
        r"`((?:backends|protection|qualification|tests|docs|constraints|\.ci|\.github)/[\w./-]*)`", prose
    )
    broken += [name for name in named if not (ROOT / name).exists()]
    assert not broken, f"{path.name} points to what is not there: {broken}"


# What the documents for authors of applications and readers of records say.

DOCS = {path.stem: path.read_text(encoding="utf-8") for path in DOCUMENTS[1:-1]}


def test_the_kinds_of_events_are_all_named() -> None:
    text = DOCS["bring-your-own-application"].split("## Event kinds")[1].split("\n## ")[0]
    first, rest = text.split("`oom_detected` opens")
    assert set(re.findall(r"`(\w+)`", first)) == EVENT_KINDS
    assert re.findall(r"`(\w+)`", rest.split(":")[1].split(".")[0]) == list(STRATEGIES)


def test_the_small_subject_keeps_and_answers_what_it_accepts(tmp_path: Path) -> None:
    (source,) = fences(DOCS["bring-your-own-application"], "python")
    (tmp_path / "small.py").write_text(source, encoding="utf-8")
    factory = load_factory(f"{tmp_path / 'small.py'}:factory")
    context = SimpleNamespace(workdir=tmp_path / "spool")
    audio = np.linspace(-1, 1, 40_000, dtype=np.float32)
    first = factory(context)  # type: ignore[arg-type]
    assert [first.feed(0, audio[:30_000]), first.feed(20_000, audio[20_000:30_000])] == [30_000, 30_000]
    first.close()
    second = factory(context)  # type: ignore[arg-type]
    assert second.feed(30_000, audio[30_000:]) == 40_000
    assert np.array_equal(second.recovered(), audio)  # type: ignore[attr-defined]
    assert [(each.start, each.stop) for each in second.results()] == [(0, 16_000), (16_000, 32_000), (32_000, 40_000)]
    second.close()


def test_the_example_reads_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    writer = RecordWriter(tmp_path / "results" / "cpu.jsonl", {"backend": "cpu"})
    writer.criterion(backend="cpu", environment="cpu", test="t", criterion="c", verdict="pass", value=1.0)
    writer.close()
    (source,) = fences(DOCS["read-the-records"], "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "read-the-records.md", "exec"), {})
    assert capsys.readouterr().out == "cpu.jsonl whole {'pass': 1}\n"


def named_in(table: str) -> set[str]:
    """Give the names in the first column of a table."""
    return set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`.+?) \|", table))))


def parameters_of(write: Callable[..., None]) -> set[str]:
    return set(inspect.signature(write).parameters) - {"self", "fields"}


def test_the_fields_of_a_record_are_all_named(tmp_path: Path) -> None:
    text = DOCS["read-the-records"]
    first, rest = text.split("**Then a line for each criterion")
    criterion, rest = rest.split("**And a line for each part of the")
    swept, rest = rest.split("**And a line when a test has come to its end")
    ended, rest = rest.split("**Last line, `end`:**")
    given = {"subject": DEFAULT_SUBJECT, "model": DEFAULT_MODEL, "audio": DEFAULT_AUDIO}
    begun = prepare(backend="cpu", device=None, **given)  # type: ignore[arg-type]
    path = begun.begin_records(tmp_path)
    begun.end_records()
    record = records.read(path)
    cannot = records.read(records.write_not_run(tmp_path / "not", {"backend": "a", "environment": "b"}, "why")).run
    # What the plugin and the harness add: given by name.
    more = set(re.findall(r"(?m)^ {12}(\w+)=", inspect.getsource(plugin.pytest_collection_finish)))
    assert {"point", "shard"} <= more
    assert named_in(first) == set(record.run) | set(cannot) | more | {"stress"}
    assert f"| `schema_version` | {records.SCHEMA_VERSION}. " in first
    (machine,) = re.findall(r"(?m)^\| `machine` \| (.+) \|$", first)
    assert set(re.findall(r"`([a-z_]+)`", machine)) == set(record.run["machine"])
    assert named_in(criterion) == parameters_of(RecordWriter.criterion)
    whose = parameters_of(RecordWriter.sweep)
    assert named_in(swept) == whose | {"model", "seed", "shard"} | set(Tally(SWEEPS[0], TRANSIENT).plain())
    assert named_in(ended) == parameters_of(RecordWriter.test) | {"events_told"}
    (bounds,) = re.findall(r"the first (\d+) lines", ended)
    assert int(bounds) == records.EVIDENCE_MAX and f"at most {records.EVENTS_MAX}," in ended
    outcomes = next(line for line in ended.splitlines() if line.startswith("| `outcome`"))
    assert re.findall(r"`(\w+)`", outcomes)[1:] == list(records.OUTCOMES)
    end = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    assert set(re.findall(r"`(\w+)`", rest.split("\n## ")[0])) == set(end) - {"kind", "previous"}
    kept = text.split("## History")[1]
    with closing(sqlite3.connect(a_history(tmp_path / "any"))) as database:
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(history)")]
    assert re.findall(r"(?m)^\| `(\w+)` \|", kept) == columns and history.KEY in kept


def test_the_keys_of_a_gate_are_all_named(tmp_path: Path) -> None:
    text = DOCS["read-a-report"].split("## The gate")[1].split("\n## ")[0]
    keys = [each.name for each in fields(report_gate.Gate) if each.name != "source"]
    assert re.findall(r"(?m)^\| `(\w+)` \|", text) == keys
    (shown,) = fences(text, "toml")
    assert sorted(tomllib.loads(shown)) == sorted(keys), "the example does not have every key"
    (tmp_path / "gate.toml").write_text(shown, encoding="utf-8")
    declared = [(each.name, environment) for each in backends.declared() for environment in each.environments]
    assert report_gate.load(tmp_path / "gate.toml", declared).profiles == PROFILES
    gates = sorted((ROOT / "gates").glob("*.toml"))
    assert {f"../gates/{each.name}" for each in gates} == set(re.findall(r"\]\((\.\./gates/[^)]+)\)", text))
    assert all(report_gate.load(each, declared) for each in gates)


def test_the_gate_without_recovered_excuses_what_compares_audio(tmp_path: Path) -> None:
    (shown,) = fences(DOCS["bring-your-own-application"], "toml")
    (tmp_path / "gate.toml").write_text(shown, encoding="utf-8")
    declared = [(each.name, environment) for each in backends.declared() for environment in each.environments]
    gate = report_gate.load(tmp_path / "gate.toml", declared)
    assert gate.profiles == PROFILES
    # Each is skipped by a function of its file that asks for what the subject kept; the sweep leaves out two criteria.
    asking = ("kept = recovered(subject)", ", recovered(subject)", "judge_storage(judge", "survive_kills()")
    tests = set()
    for name in QUALIFICATION[:2]:
        text = (ROOT / name).read_text(encoding="utf-8")
        for group in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            for test in (node for node in group.body if isinstance(node, ast.FunctionDef)):
                if any(each in (ast.get_source_segment(text, test) or "") for each in asking):
                    tests.add(test.name)
    expected = {
        (each.test, each.name)
        for each in CRITERIA
        if each.test in tests or ("fault_sweep" in each.test and each.name in ("samples_lost", "samples_different"))
    }
    assert {(each.test, each.name) for each in CRITERIA if gate.excuses(each.test, each.name)} == expected


def test_the_thresholds_of_a_regression_are_those_of_the_code() -> None:
    text = DOCS["read-a-report"].split("## Against")[1].split("\n## ")[0]
    shown = {name: float(value) for name, value in re.findall(r"`(\w+_(?:percent|points|s|mb))` \(([\d.]+)\)", text)}
    assert shown == vars(report_gate.Thresholds())


def test_the_files_and_statuses_of_a_report_are_those_of_the_code() -> None:
    text = DOCS["read-a-report"]
    files = text.split("## Files")[1].split("\n## ")[0]
    expected = [getattr(report_command, name) for name in ("PAGE", "DATA", "JUNIT", "SUMMARY")]
    assert re.findall(r"(?m)^\| `([\w.]+)` \|", files) == expected
    statuses = text.split("## Exit statuses")[1].split("\n## ")[0]
    meant = (report_command.EXIT_PASS, report_command.EXIT_RED, report_command.EXIT_REFUSED)
    assert re.findall(r"(?m)^\| (\d) \|", statuses) == [str(each) for each in meant]
    options = set(
        re.findall(r"(?m)^  (--[\w-]+)", run(sys.executable, "-m", "qualification", "report", "--help").stdout)
    )
    assert set(re.findall(r"`(--[\w-]+)", text)) <= options | {"--criteria", "--shard", "--resume"}


def test_the_sweeps_and_what_they_promise_are_all_named() -> None:
    text = DOCS["fault-sweep"]
    rows = re.findall(r"(?m)^\| `(\w+)` \| .+ \| (\d+|–) \| (\d+|–) \|$", text)
    sizes = {(sweep.scenario, sweep.target): str(sweep.min_bytes) for sweep in SWEEPS}
    scenarios = list(dict.fromkeys(sweep.scenario for sweep in SWEEPS))
    assert rows == [(each, sizes.get((each, HOST), "–"), sizes.get((each, RUNTIME), "–")) for each in scenarios]
    assert f"There are\n{len(scenarios)} scenarios" in section("7. Every single allocation")
    oracles = text.split("### The oracles")[1].split("\n## ")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", oracles) == ["scenarios_unswept", *PROBLEMS]
    assert {sweep.min_bytes for sweep in DEVICE_SWEEPS} == {1}


def test_the_sites_are_all_named() -> None:
    table = DOCS["architecture"].split("### How a fault is brought about")[1].split("\n\n")[1]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\| (`.+?) \|", table)))) == {
        each.value for each in Site
    }


def test_the_contract_is_all_named() -> None:
    tables = DOCS["adding-a-backend"].split("## 2.")[1].split("| Method |")
    assert re.findall(r"(?m)^\| `(\w+)` \|", tables[0]) == [each.value for each in Capability]
    assert set(re.findall(r"(?m)^\| `(\w+)\(", tables[1])) == Backend.__abstractmethods__


def test_the_header_that_is_shown_is_one_and_every_key_is_explained() -> None:
    text = DOCS["adding-a-backend"].split("## 2.")[0]
    (shown,) = fences(text, "python")
    assert (ROOT / "backends" / "torch_cpu.py").read_text(encoding="utf-8").startswith(shown)
    named = [name for row in re.findall(r"(?m)^\| (`.+?) \|", text) for name in re.findall(r"`([\w-]+)`", row)]
    assert sorted(named) == sorted((*backends._KEYS, *backends._ENVIRONMENT_KEYS))
