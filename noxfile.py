"""The matrix: which cells there are, what each installs, and what is run in it.

Environments and backends come from the headers of ``backends/*.py``; this file names none of them. It needs nothing
but nox: ``nox --list`` shows the sessions, ``nox -s doctor`` what this machine can host.

A header can ask for a build from a package index of its own, as backends/torch_cpu.py does. The variable
``PLIMSOLL_TORCH_INDEX``, named after the package, gives another index for it; empty, it stands for pip's configuration.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # nox loads this file by its path: its folder is not there yet

from backends import Declared, Environment, declared  # noqa: E402  (needs the path above)
from qualification import doctor as machine  # noqa: E402
from qualification import identity, records  # noqa: E402
from qualification.platform_check import MINIMUM_PYTHON, python_refusal  # noqa: E402
from qualification.profiles import SELECTIONS  # noqa: E402

if refusal := python_refusal():
    sys.exit(f"Plimsoll cannot run here: {refusal}")  # headers are read with tomllib, which an older Python lacks

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["memory-quick"]
# virtualenv comes with nox, so `pip install nox` is all that anyone needs, and its pip reads the configuration (index,
# proxy, certificates) that the machine already has.
nox.options.default_venv_backend = "virtualenv"

PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ROOT / "constraints"
RESULTS = ROOT / "results"
BACKENDS = declared()
ENVIRONMENTS = tuple(sorted({environment for backend in BACKENDS for environment in backend.environments}))
#: What the sessions that need no cell install: pinned like an environment.
DEVELOPMENT = "dev"
#: The kinds of sessions, and what each selects. The whole sweep has sessions of its own.
SELECTED = {f"memory-{profile}": selection for profile, selection in SELECTIONS.items()}
QUICK = "memory-quick"
#: What the sessions over an environment ask of its cells, by the session of the cell: which kind of session, and the
#: arguments for pytest. They come before it: it is queued by them. Quick, full and sweeping runs share a cell's virtual
#: environment in this way, and so do not install it twice.
PLANNED: dict[str, list[tuple[str, list[str]]]] = {}
FINISHED: set[str] = set()
#: What PyTorch's CUDA build requires, and its CPU build does not.
ONLY_CUDA = ("cuda-", "nvidia-", "triton")
#: Options whose value may be a path, and is no selection of tests.
VALUED = (
    "--audio",
    "--backend",
    "--criteria",
    "--history",
    "--history-key",
    "--model",
    "--on-finish",
    "--point",
    "--results",
    "--shard",
    "--subject",
    "-c",
    "-k",
    "-m",
    "-o",
    "-p",
)
CELL_GROUPS = ("qualification", "optional")
DEVELOPMENT_GROUPS = ("tests", "lint")
#: Pinned for development too, but installed for one benchmark alone.
LEAKS_BENCH_GROUPS = ("tests", "leaks-bench")


def groups(*names: str) -> list[str]:
    """Give the requirements of these dependency groups."""
    return list(nox.project.dependency_groups(PYPROJECT, *names))


def backends_of(environment: str) -> list[Declared]:
    """Give the backends that are declared for this environment."""
    return [backend for backend in BACKENDS if environment in backend.environments]


def without_accelerator(environment: str) -> list[Environment]:
    """Give what the backends that need no accelerator need in an environment, or for development in all of them."""
    needs = [needs for backend in BACKENDS for needs in backend.needs.values() if needs.cuda is None]
    return needs if environment == DEVELOPMENT else [each for each in needs if each.name == environment]


def package(requirement: str) -> str:
    """Give the name of the package that a requirement is for."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0]


def install(session: nox.Session, environment: str, requirements: Sequence[str], needs: Sequence[Environment]) -> None:
    """Install at the environment's pins, or do nothing while pins, requirements and Python are what they were."""
    pins = CONSTRAINTS / f"{environment}.txt"
    if not pins.is_file():
        session.error(f"constraints/{pins.name} is missing: nox -s lock makes it")
    if session.venv_backend == "none":
        session.log("nothing is installed: --no-venv takes what is there")
        return
    text = pins.read_text(encoding="utf-8")
    digest = hashlib.sha256("\n".join([sys.base_prefix, platform.python_version(), *requirements, text]).encode())
    folder = Path(session.virtualenv.location)
    stamp = folder / machine.STAMP
    installed = stamp.read_text(encoding="utf-8") if stamp.is_file() else None
    if installed == digest.hexdigest():
        session.log(f"environment {environment}: its pins are unchanged, nothing to install")
        return
    if installed is not None:
        # Made anew, not updated: what the old pins brought along would hide a requirement that is missing.
        session.run_install(sys.executable, "-m", "virtualenv", "--clear", str(folder), external=True, silent=True)
    size = sum(each.download_mb for each in needs)
    session.log(
        f"environment {environment}: installing {len(requirements)} requirements, "
        f"about {size} MB to download unless pip has them cached"
    )
    packages = [package(requirement) for requirement in requirements]
    for each in needs:
        for name in map(package, each.own):
            if each.package_index is not None and name in packages:
                install_build(session, name, each, pins)
    session.install("-c", str(pins), *requirements)
    # As an installation step, so that `nox --no-install` does not claim what it did not do.
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    session.run_install("python", "-c", write, str(stamp), digest.hexdigest(), log=False, silent=True)


def install_build(session: nox.Session, name: str, needs: Environment, pins: Path) -> None:
    """Install the build of a package that a header asks for, such as torch 2.13.0+cpu, and never another.

    The default index has a build of the same version for CUDA, of gigabytes. It does not carry the label, so asking by
    the whole version cannot end there. The build comes alone: what it requires follows from the default index, pinned.
    """
    variable = f"PLIMSOLL_{name.upper().replace('-', '_')}_INDEX"
    found = re.findall(rf"(?m)^{re.escape(name)}==([^\s;]+)$", pins.read_text(encoding="utf-8"))
    if len(found) != 1:
        session.error(f"constraints/{pins.name} has {len(found)} pins for {name}, expected one: nox -s lock")
    build = f"{name}=={found[0]}+{needs.build}"
    index = os.environ.get(variable)
    if index is None and (reason := unreachable(f"{needs.package_index}/{name}/")):
        session.warn(f"{needs.package_index} cannot be reached ({reason}): looking where pip is configured to look")
    elif index is None:
        index = needs.package_index
    try:
        session.install("--no-deps", *(("--index-url", index) if index else ()), build)
    except nox.command.CommandFailed:
        where = f"at {index}" if index else "where pip is configured to look"
        session.error(
            f"there is no {build} for this Python {where}. Set {variable} to an index that has it "
            f"(the header's is {needs.package_index}), or to nothing for pip's configuration alone"
        )


def unreachable(url: str) -> str | None:
    """Say why a page cannot be had within seconds, or None where it can: pip alone would try for a minute."""
    try:
        urllib.request.urlopen(url, timeout=3).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error))
    return None


def selects_tests(arguments: Sequence[str]) -> bool:
    """Whether arguments for pytest name tests: a file or a folder, with or without ``::`` and what is in it."""
    before = ["", *arguments]
    return any(
        not argument.startswith("-") and argument and previous not in VALUED
        for previous, argument in zip(before, arguments, strict=False)
        if (ROOT / argument.split("::")[0]).exists()
    )


def take_option(arguments: Sequence[str], option: str) -> tuple[str, list[str]]:
    """Take an option and its value out of arguments for pytest; of two the last counts, as it does for pytest."""
    value, rest = "", []
    left = iter(arguments)
    for argument in left:
        if argument == option:
            value = next(left, "")
        elif argument.startswith(f"{option}=") or (len(option) == 2 and argument.startswith(option)):
            value = argument.removeprefix(option).removeprefix("=")
        else:
            rest.append(argument)
    return value, rest


def plan(session: nox.Session, found: Sequence[machine.Cell], *kinds: str, words: Sequence[str] | None = None) -> None:
    """Queue the cells that can run here, or the one of ``--backend``, and record why the others are not run.

    ``words`` are arguments for pytest, unless they are the session's own.
    """
    words = session.posargs if words is None else words
    asked, arguments = take_option(words, "--backend")
    if not asked and any(argument.split("=")[0] == "--backend" for argument in words):
        session.error("--backend needs a value: the name of a backend, such as --backend cpu")
    chosen = [cell for cell in found if asked in ("", cell.backend.name)]
    if not chosen:
        names = sorted({cell.backend.name for cell in found})
        near = " or ".join(difflib.get_close_matches(asked, names, cutoff=0.4)) or ", ".join(names)
        session.error(f"{session.name} has no backend {asked!r}: expected {near}")
    for cell in chosen:
        name = machine.session(cell.backend.name, cell.environment)
        if cell.obstacle:
            session.warn(f"not run: {cell.backend.name} in {cell.environment}: {cell.obstacle}")
            record_not_run(session, cell, arguments)
            continue
        if name in FINISHED:
            session.error(
                f"{name} has run already, and a session runs once: name it after {session.name}, or not at all"
            )
        new = [(kind, arguments) for kind in kinds if (kind, arguments) not in PLANNED.setdefault(name, [])]
        if new:
            PLANNED[name] += new
            session.log(f"queued: {name}")
            session.notify(name)
    if all(cell.obstacle for cell in chosen):
        reasons = "; ".join(dict.fromkeys(str(cell.obstacle) for cell in chosen))
        session.error(f"{session.name} cannot run here: {reasons}")


def record_not_run(session: nox.Session, cell: machine.Cell, arguments: Sequence[str]) -> None:
    """Write a record that says why a cell is not run: a cell without any is red in the report, and this one is not."""
    given, _ = take_option(arguments, "--results")
    about = {
        **identity.suite(),
        "backend": cell.backend.name,
        "environment": cell.environment,
        "machine": identity.machine(),
    }
    try:
        records.write_not_run(Path(given or RESULTS), about, str(cell.obstacle))
    except (OSError, records.RecordError) as error:
        session.warn(f"that it is not run cannot be recorded: {error}")


def run_cell(session: nox.Session, backend: Declared, environment: str) -> None:
    """Qualify one cell as planned, or with the quick tests where it is run by its own name."""
    FINISHED.add(session.name)
    asked, own = take_option(session.posargs, "--backend")
    if asked not in ("", backend.name):
        session.error(f"{session.name} is about {backend.name}: expected that, or nothing, for --backend, not {asked}")
    cell = machine.look(backend, environment)
    if cell.obstacle:
        session.error(f"{session.name} cannot run here: {cell.obstacle}")
    install(session, environment, sorted({*cell.needs.dependencies, *groups(*CELL_GROUPS)}), [cell.needs])

    failed = False
    for kind, arguments in PLANNED.get(session.name) or [(QUICK, own)]:
        its = SELECTED[kind]
        marks, rest = take_option(arguments, "-m")
        try:
            session.run(
                *("python", "-m", "pytest", "-c", "pytest_memory.ini"),
                *(() if selects_tests(arguments) else its.files),
                *("-v", "-m", its.narrowed(marks)),
                *(*rest, "--backend", backend.name),
                *its.options,
                env={"PLIMSOLL_ENVIRONMENT": environment},
            )
        except nox.command.CommandFailed:
            failed = True
    if failed:
        session.error(f"not qualified: {backend.name} in {environment}")


def add_environment(environment: str, kind: str) -> None:
    """Define one session over an environment's backends."""

    def run(session: nox.Session) -> None:
        plan(session, [cell for cell in machine.cells() if cell.environment == environment], kind)

    tests = {
        "memory-quick": "quick tests only",
        "memory-soak": "the one-hour tests included",
        "memory-sweep": "every single allocation refused in turn",
    }[kind]
    names = ", ".join(backend.name for backend in backends_of(environment))
    run.__doc__ = f"Qualify the {environment} environment, {tests}. Backends: {names}."
    nox.session(name=f"{kind}-{environment}", python=False, tags=[kind, environment])(run)


def add_cell(backend: Declared, environment: str) -> None:
    """Define the session of one cell, with a virtual environment of its own."""

    def run(session: nox.Session) -> None:
        run_cell(session, backend, environment)

    run.__doc__ = f"One cell, {backend.name} in {environment}: asked for by name, its quick tests."
    name = machine.session(backend.name, environment)
    nox.session(name=name, reuse_venv=True, tags=["cells", *backend.tags])(run)


@nox.session(name="memory-quick", python=False, tags=["memory"])
def memory_quick(session: nox.Session) -> None:
    """Qualify every cell that this machine can host, quick tests only. Arguments after -- go to pytest."""
    found = machine.cells()
    print(machine.table(found), flush=True)
    plan(session, found, QUICK)


for name in ENVIRONMENTS:
    for kind in SELECTED:
        add_environment(name, kind)
for name in ENVIRONMENTS:
    for each in backends_of(name):
        add_cell(each, name)


def take_command(session: nox.Session) -> tuple[list[str], list[str]]:
    """Split the arguments of a session at ``--on-finish``: all that follows it is a command."""
    words = list(session.posargs)
    at = next((at for at, word in enumerate(words) if word.split("=")[0] == "--on-finish"), len(words))
    command = words[at + 1 :]
    if at < len(words) and (words[at] != "--on-finish" or not command or not command[0]):
        session.error(
            f"{words[at]} names no command: expected --on-finish as the last option, and after it the command and its "
            "arguments as words, such as -- --on-finish ./tell-us now"
        )
    return words[:at], command


@nox.session(python=False, tags=["memory"])
def qualify(session: nox.Session) -> None:
    """Qualify for a release: every test in every cell that can run here, then the report and the gate. Takes hours.

    After --: --gate FILE.toml, --against OLD/report.json and --out FOLDER go to the report, what else there is to
    pytest. --results FOLDER of a run that was cut off goes on with it. --on-finish ARGV... comes last: a command with
    its arguments, which is told of every run and of the report.
    """
    rest, told = take_command(session)
    for_report, for_both = list[str](), list[str]()
    for options, words in ((("--gate", "--against", "--out"), for_report), (("--history", "--history-key"), for_both)):
        for option in options:
            value, rest = take_option(rest, option)
            words += [option, value] if value else []
    if "--history" not in for_both:
        # Where other tools look for the status, whichever folder the records are in.
        for_both += ["--history", str(RESULTS / "history.sqlite")]
    given, rest = take_option(rest, "--results")
    # Of its own: a report on what lies in results/ would be one on every run since the last clean-up.
    folder = Path(given or RESULTS / f"qualify-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}").absolute()
    _, same = take_option(session.posargs, "--results")
    again = ["nox", "-s", "qualify", "--", "--results", os.path.relpath(folder), *same]
    session.log(f"if it is cut off, go on with: {shlex.join(again)}")
    folder.mkdir(parents=True, exist_ok=True)
    found = machine.cells()
    print(machine.table(found), flush=True)
    # One string for pytest, words for the report, which has it last too.
    hook = ("--on-finish", shlex.join(told)) if told else ()
    try:
        plan(session, found, "memory-soak", "memory-sweep", words=[*rest, "--results", str(folder), *for_both, *hook])
    finally:
        # After the cells, and also where none can run: then it says so.
        last = ("--on-finish", *told) if told else ()
        session.notify("report", [str(folder), *for_report, *for_both, *last])


@nox.session(reuse_venv=True, tags=["checks"])
def report(session: nox.Session) -> None:
    """Make the report from records, and judge by a gate. After --: folders with records, and what --help shows."""
    install(session, DEVELOPMENT, groups(*CELL_GROUPS), [])
    session.run("python", "-m", "qualification", "report", *session.posargs)


@nox.session(python=False, tags=["checks"])
def doctor(session: nox.Session) -> None:
    """Say what this machine can qualify, what that takes, and what to type next. Installs nothing."""
    session.run(sys.executable, "-m", "qualification.doctor", *session.posargs, external=True)


@nox.session(name="ci-matrix", python=False, tags=["checks"])
def ci_matrix(session: nox.Session) -> None:
    """Print the job matrix of a CI system, one job for each cell, as JSON on standard output. Installs nothing.

    Arguments after -- are its options: -- --help shows them. What nox says goes to standard error.
    """
    # Its own errors go there too: nox would put them on standard output.
    session.run(sys.executable, "-m", "qualification.ci_matrix", *session.posargs, external=True, stderr=None)


@nox.session(reuse_venv=True, tags=["checks"])
def tests(session: nox.Session) -> None:
    """Test the backends, the protection and the qualification itself. Arguments after -- go to pytest."""
    install(session, DEVELOPMENT, groups("tests"), without_accelerator(DEVELOPMENT))
    pytest = ("python", "-m", "pytest", "-c", "pytest_memory.ini")
    if session.posargs:
        folders = () if selects_tests(session.posargs) else ("tests/unit", "tests/meta")
        session.run(*pytest, *folders, *session.posargs)
    else:
        # Much of either is waiting for processes.
        run_both(session, [*pytest, "tests/unit"], [*pytest, "tests/meta"])


def run_both(session: nox.Session, first: Sequence[str], second: Sequence[str]) -> None:
    """Run two commands at the same time. What the second says is shown after the first; either fails the session."""
    if session.run("python", "--version", log=False, silent=True) is None:
        return  # nox --install-only runs nothing
    env = {name: value for name, value in {**os.environ, **session.env}.items() if value is not None}
    env["PATH"] = os.pathsep.join([*(session.bin_paths or ()), env.get("PATH", os.defpath)])
    program = nox.command.which(second[0], session.bin_paths)
    with tempfile.TemporaryFile() as said:
        session.log(f"{' '.join(second)}, at the same time and shown afterwards")
        beside = subprocess.Popen(
            [program, *second[1:]], env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
        failed = []
        try:
            try:
                session.run(*first)
            except nox.command.CommandFailed:
                failed.append(" ".join(first))
            if beside.poll() is None:
                session.log(f"waiting for {' '.join(second)}")
            if beside.wait() != 0:
                failed.append(" ".join(second))
        finally:
            end(beside)
            said.seek(0)
            sys.stdout.flush()
            shutil.copyfileobj(said, sys.stdout.buffer)
            sys.stdout.flush()
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs after Ctrl-C, in order if it does so within seconds."""
    try:
        # At a terminal it has had its SIGINT, and another would cut off how it ends.
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def without_extras(environment: str) -> list[str]:
    """Give what the headers ask for with extras, without them: the CUDA builds of runtimes alone, and not CUDA."""
    own = [requirement for backend in backends_of(environment) for requirement in backend.needs[environment].own]
    return [re.sub(r"\[.*?]", "", requirement) for requirement in own if "[" in requirement]


def add_refusals(environment: str) -> None:
    """Define the session that tests what an environment's runtimes refuse where there is no accelerator."""

    def run(session: nox.Session) -> None:
        pins = CONSTRAINTS / f"{environment}.txt"
        session.install("-c", str(pins), *without_extras(environment), *groups("qualification"))
        session.run(
            *("python", "-m", "pytest", "-c", "pytest_memory.ini", "tests/unit/test_cuda_refusals.py"),
            *session.posargs,
            env={"PLIMSOLL_ENVIRONMENT": environment},
        )

    names = ", ".join(map(package, without_extras(environment)))
    run.__doc__ = f"Test what {names} of {environment} refuses without a card. Arguments after -- go to pytest."
    nox.session(name=f"refusals-{environment}", reuse_venv=True, tags=["checks", "refusals"])(run)


for name in ENVIRONMENTS:
    if without_extras(name):
        add_refusals(name)


@nox.session(reuse_venv=True, tags=["checks"])
def lint(session: nox.Session) -> None:
    """Check style, formatting and types, and the workflows against GitHub's schema."""
    install(session, DEVELOPMENT, groups(*DEVELOPMENT_GROUPS), without_accelerator(DEVELOPMENT))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    folders = ("backends", "protection", "qualification", "tests", "benchmarks")
    session.run("mypy", "--strict", "noxfile.py", *(name for name in folders if any((ROOT / name).rglob("*.py"))))
    # The schema comes with the package: nothing is downloaded.
    workflows = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


@nox.session(reuse_venv=True, tags=["bench"])
def bench(session: nox.Session) -> None:
    """Measure what the worker process and the protection cost. Arguments after -- go to benchmarks.engine_cost."""
    install(session, DEVELOPMENT, groups("tests"), without_accelerator(DEVELOPMENT))
    session.run("python", "-m", "benchmarks.engine_cost", *session.posargs)


@nox.session(name="bench-leaks", reuse_venv=True, tags=["bench"])
def bench_leaks(session: nox.Session) -> None:
    """Measure how often the verdict on leaks is wrong: well over an hour, and minutes with -- --quick.

    It writes docs/leaks-measured.md. Arguments after -- go to benchmarks.leaks instead. What was cut off goes on.
    """
    install(session, DEVELOPMENT, groups(*LEAKS_BENCH_GROUPS), without_accelerator(DEVELOPMENT))
    session.run("python", "-m", "benchmarks.leaks", *(session.posargs or ["--out", "docs/leaks-measured.md"]))


def generated(body: str) -> str:
    """Put the first line on a file of pins: it tells an edit by hand, without asking an index."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"# Generated by `nox -s lock`: do not edit. sha256 of the rest: {digest}\n{body}"


def resolve(session: nox.Session, environment: str, prefer: str) -> str:
    """Resolve for every supported Python, keeping the versions of ``prefer`` where they still fit.

    From metadata alone: no wheel is downloaded.
    """
    backends = backends_of(environment)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(prefer, encoding="utf-8")
        sources = {
            backend.module.replace(".", "/") + ".py": Path(folder) / f"{backend.name}.in" for backend in backends
        }
        for backend, source in zip(backends, sources.values(), strict=True):
            source.write_text("\n".join(backend.needs[environment].dependencies), encoding="utf-8")
        oldest = ".".join(map(str, MINIMUM_PYTHON))
        every = dict.fromkeys((*DEVELOPMENT_GROUPS, *LEAKS_BENCH_GROUPS))
        chosen = every if environment == DEVELOPMENT else CELL_GROUPS
        session.run(
            *("uv", "pip", "compile", *map(str, sources.values()), *(f"--group={group}" for group in chosen)),
            *("--universal", "--python-version", oldest, "--no-header", "--quiet"),
            *("--no-emit-index-url", "--no-emit-find-links", "--output-file", str(pins)),
            silent=True,
        )
        text = pins.read_text(encoding="utf-8")
        for header, source in sources.items():
            text = text.replace(f"-r {source}", header)
    return generated(with_reasons(text, environment))


def with_reasons(text: str, environment: str) -> str:
    """Say beside a pin why it is one, and leave out what the builds that are installed do not require.

    The index that pins are resolved from knows PyTorch's CUDA build alone. Of that, the CPU build requires less.
    """
    light = without_accelerator(environment)
    needs = light or [backend.needs[environment] for backend in backends_of(environment)]
    reasons = {package(requirement): each.reason for each in needs for requirement in each.own if each.reason}
    kept = []
    for entry in re.split(r"(?m)^(?=\S)", text):
        if light and entry.startswith(ONLY_CUDA):
            continue
        pin, _, rest = entry.partition("\n")
        if reason := reasons.get(package(pin)):
            lines = textwrap.wrap(f"why: {reason}", 110, break_long_words=False, break_on_hyphens=False)
            pin = "\n    # ".join([pin, *lines])
        kept.append(f"{pin}\n{rest}" if pin else rest)
    return "".join(kept)


@nox.session(reuse_venv=True, tags=["pins"])
def lock(session: nox.Session) -> None:
    """Generate constraints/ from the headers and groups; -- --upgrade takes newer versions, -- --check compares."""
    if unknown := set(session.posargs) - {"--check", "--upgrade"}:
        session.error(f"unknown argument {', '.join(sorted(unknown))}: expected --check or --upgrade")
    check, upgrade = "--check" in session.posargs, "--upgrade" in session.posargs
    session.install(*groups("lock"))
    stale = []
    for name in (*ENVIRONMENTS, DEVELOPMENT):
        pins = CONSTRAINTS / f"{name}.txt"
        before = pins.read_text(encoding="utf-8") if pins.is_file() else ""
        after = resolve(session, name, prefer="" if upgrade else before)
        if not check:
            CONSTRAINTS.mkdir(exist_ok=True)
            pins.write_text(after, encoding="utf-8")
        elif before != after:
            stale.append(f"constraints/{pins.name}")
            lines = before.splitlines(), after.splitlines()
            print(*difflib.unified_diff(*lines, stale[-1], "regenerated", lineterm=""), sep="\n", flush=True)
    if stale:
        session.error(f"not what the headers and groups ask for: {', '.join(stale)}. Run nox -s lock")
