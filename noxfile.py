"""The matrix: which cells there are, what each installs, and what is run in it.

Environments and backends come from the headers of ``backends/*.py``; this file names none of them. It needs nothing
but nox: ``nox --list`` shows the sessions, ``nox -s doctor`` what this machine can host.
"""

from __future__ import annotations

import difflib
import hashlib
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # nox loads this file by its path: its folder is not there yet

from backends import Declared, declared  # noqa: E402  (needs the path above)
from qualification import doctor as machine  # noqa: E402
from qualification.platform_check import MINIMUM_PYTHON, python_refusal  # noqa: E402

if refusal := python_refusal():
    sys.exit(f"Plimsoll cannot run here: {refusal}")  # headers are read with tomllib, which an older Python lacks

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["memory-quick"]
# virtualenv comes with nox, so `pip install nox` is all that anyone needs, and its pip reads the configuration (index,
# proxy, certificates) that the machine already has.
nox.options.default_venv_backend = "virtualenv"

PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ROOT / "constraints"
QUALIFICATION = ("tests/test_memory_protection.py", "tests/test_oom_recovery.py")
BACKENDS = declared()
ENVIRONMENTS = tuple(dict.fromkeys(environment for backend in BACKENDS for environment in backend.environments))
#: What the sessions that need no cell install: pinned like an environment.
DEVELOPMENT = "dev"
SELECT_QUICK = "not slow"
#: Options whose value may be a path, and is no selection of tests.
VALUED = ("--audio", "--backend", "--criteria", "--model", "--results", "--subject", "-c", "-k", "-m", "-o", "-p")
CELL_GROUPS = ("qualification", "optional")
DEVELOPMENT_GROUPS = ("tests", "lint")


def groups(*names: str) -> list[str]:
    """Give the requirements of these dependency groups."""
    return list(nox.project.dependency_groups(PYPROJECT, *names))


def backends_of(environment: str) -> list[Declared]:
    """Give the backends that are declared for this environment."""
    return [backend for backend in BACKENDS if environment in backend.environments]


def install(
    session: nox.Session, environment: str, requirements: Sequence[str], download_mb: int | None = None
) -> None:
    """Install at the environment's pins, or do nothing while pins, requirements and Python are what they were."""
    pins = CONSTRAINTS / f"{environment}.txt"
    if not pins.is_file():
        session.error(f"constraints/{pins.name} is missing: nox -s lock makes it")
    if session.venv_backend == "none":
        session.log("nothing is installed: --no-venv takes what is there")
        return
    wanted = "\n".join([sys.base_prefix, platform.python_version(), *requirements, pins.read_text(encoding="utf-8")])
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    folder = Path(session.virtualenv.location)
    stamp = folder / "installed-pins"
    installed = stamp.read_text(encoding="utf-8") if stamp.is_file() else None
    if installed == digest:
        session.log(f"environment {environment}: its pins are unchanged, nothing to install")
        return
    if installed is not None:
        # Made anew, not updated: what the old pins brought along would hide a requirement that is missing.
        session.run_install(sys.executable, "-m", "virtualenv", "--clear", str(folder), external=True, silent=True)
    size = "" if download_mb is None else f", about {download_mb} MB to download unless pip has them cached"
    session.log(f"environment {environment}: installing {len(requirements)} requirements{size}")
    session.install("-c", str(pins), *requirements)
    # As an installation step, so that `nox --no-install` does not claim what it did not do.
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    session.run_install("python", "-c", write, str(stamp), digest, log=False, silent=True)


def selects_tests(arguments: Sequence[str]) -> bool:
    """Whether arguments for pytest name tests: a file or a folder, with or without ``::`` and what is in it."""
    before = ["", *arguments]
    return any(
        not argument.startswith("-") and argument and previous not in VALUED
        for previous, argument in zip(before, arguments, strict=False)
        if (ROOT / argument.split("::")[0]).exists()
    )


def split_marks(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Take ``-m EXPRESSION`` out of arguments for pytest: a second one would take the place of ours."""
    expression, rest = "", []
    left = iter(arguments)
    for argument in left:
        if argument == "-m":
            expression = next(left, "")
        elif argument.startswith("-m"):
            expression = argument[2:].removeprefix("=")
        else:
            rest.append(argument)
    return expression, rest


def run_cells(session: nox.Session, environment: str, *selection: str) -> None:
    """Qualify each backend of an environment in turn; one that fails does not keep the next from being judged."""
    found = [cell for cell in machine.cells() if cell.environment == environment]
    able = [cell.backend for cell in found if cell.obstacle is None]
    for cell in found:
        if cell.obstacle:
            session.warn(f"not run: {cell.backend.name} in {environment}: {cell.obstacle}")
    if not able:
        session.error(f"{session.name} cannot run here: {found[0].obstacle}")

    requirements = [requirement for backend in able for requirement in backend.dependencies]
    requirements = sorted({*requirements, *groups(*CELL_GROUPS)})
    install(session, environment, requirements, sum(backend.download_mb for backend in able))

    chosen = any(argument.split("=")[0] == "--backend" for argument in session.posargs)
    files = () if selects_tests(session.posargs) else QUALIFICATION
    rest = session.posargs
    if selection:
        expression, rest = split_marks(rest)
        selection = ("-m", f"({expression}) and {SELECT_QUICK}") if expression else selection
    failed = []
    for options in [[]] if chosen else [["--backend", backend.name] for backend in able]:
        try:
            session.run(
                *("python", "-m", "pytest", "-c", "pytest_memory.ini", *files, "-v", *selection, *options),
                *rest,
                env={"PLIMSOLL_ENVIRONMENT": environment},
            )
        except nox.command.CommandFailed:
            failed.append(options[-1] if options else "the backend asked for")
    if failed:
        session.error(f"not qualified in {environment}: {', '.join(failed)}")


def add_cell_session(kind: str, environment: str, doc: str, *selection: str) -> None:
    """Define one session over an environment's backends."""

    def run(session: nox.Session) -> None:
        run_cells(session, environment, *selection)

    run.__doc__ = f"{doc} Backends: {', '.join(backend.name for backend in backends_of(environment))}."
    tags = dict.fromkeys([kind, environment, *(tag for backend in backends_of(environment) for tag in backend.tags)])
    nox.session(name=f"{kind}-{environment}", reuse_venv=True, tags=list(tags))(run)


@nox.session(name="memory-quick", python=False, tags=["memory"])
def memory_quick(session: nox.Session) -> None:
    """Qualify every cell that this machine can host, quick tests only. Arguments after -- go to pytest."""
    found = machine.cells()
    print(machine.table(found), flush=True)
    runnable = dict.fromkeys(cell.environment for cell in found if cell.obstacle is None)
    if not runnable:
        session.error("no cell can run on this machine: the reasons are above")
    for environment in runnable:
        session.notify(f"memory-quick-{environment}", posargs=session.posargs)


for name in ENVIRONMENTS:
    add_cell_session("memory-quick", name, f"Qualify the {name} environment, quick tests only.", "-m", SELECT_QUICK)
    add_cell_session("memory-soak", name, f"Qualify the {name} environment, the one-hour tests included.")


@nox.session(python=False, tags=["checks"])
def doctor(session: nox.Session) -> None:
    """Say what this machine can qualify, what that takes, and what to type next. Installs nothing."""
    session.run(sys.executable, "-m", "qualification.doctor", *session.posargs, external=True)


@nox.session(reuse_venv=True, tags=["checks"])
def tests(session: nox.Session) -> None:
    """Test the backends, the protection and the qualification itself. Arguments after -- go to pytest."""
    install(session, DEVELOPMENT, groups("tests"))
    folders = () if selects_tests(session.posargs) else ("tests/unit", "tests/meta")
    session.run("python", "-m", "pytest", "-c", "pytest_memory.ini", *folders, *session.posargs)


@nox.session(reuse_venv=True, tags=["checks"])
def lint(session: nox.Session) -> None:
    """Check style, formatting and types."""
    install(session, DEVELOPMENT, groups(*DEVELOPMENT_GROUPS))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    folders = ("backends", "protection", "qualification", "tests", "benchmarks")
    session.run("mypy", "--strict", "noxfile.py", *(name for name in folders if any((ROOT / name).rglob("*.py"))))


@nox.session(reuse_venv=True, tags=["bench"])
def bench(session: nox.Session) -> None:
    """Measure what the worker process and the protection cost. Arguments after -- go to benchmarks.engine_cost."""
    install(session, DEVELOPMENT, groups("tests"))
    session.run("python", "-m", "benchmarks.engine_cost", *session.posargs)


def generated(body: str) -> str:
    """Put the first line on a file of pins: it tells an edit by hand, without asking an index."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f"# Generated by `nox -s lock`: do not edit. sha256 of the rest: {digest}\n{body}"


def resolve(session: nox.Session, sources: Sequence[str], prefer: str) -> str:
    """Resolve for every supported Python, keeping the versions of ``prefer`` where they still fit."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(prefer, encoding="utf-8")
        oldest = ".".join(map(str, MINIMUM_PYTHON))
        session.run(
            *("uv", "pip", "compile", *sources, "--universal", "--python-version", oldest, "--no-header", "--quiet"),
            *("--no-emit-index-url", "--no-emit-find-links", "--output-file", str(pins)),
            silent=True,
        )
        return generated(pins.read_text(encoding="utf-8"))


@nox.session(reuse_venv=True, tags=["pins"])
def lock(session: nox.Session) -> None:
    """Generate constraints/ from the headers and groups; -- --upgrade takes newer versions, -- --check compares."""
    if unknown := set(session.posargs) - {"--check", "--upgrade"}:
        session.error(f"unknown argument {', '.join(sorted(unknown))}: expected --check or --upgrade")
    check, upgrade = "--check" in session.posargs, "--upgrade" in session.posargs
    headers = {name: [f"{b.module.replace('.', '/')}.py" for b in backends_of(name)] for name in ENVIRONMENTS}
    sources = {name: [*files, *(f"--group={group}" for group in CELL_GROUPS)] for name, files in headers.items()}
    sources[DEVELOPMENT] = [f"--group={group}" for group in DEVELOPMENT_GROUPS]

    session.install(*groups("lock"))
    stale = []
    for name, arguments in sources.items():
        pins = CONSTRAINTS / f"{name}.txt"
        before = pins.read_text(encoding="utf-8") if pins.is_file() else ""
        after = resolve(session, arguments, prefer="" if upgrade else before)
        if not check:
            CONSTRAINTS.mkdir(exist_ok=True)
            pins.write_text(after, encoding="utf-8")
        elif before != after:
            stale.append(f"constraints/{pins.name}")
            lines = before.splitlines(), after.splitlines()
            print(*difflib.unified_diff(*lines, stale[-1], "regenerated", lineterm=""), sep="\n", flush=True)
    if stale:
        session.error(f"not what the headers and groups ask for: {', '.join(stale)}. Run nox -s lock")
