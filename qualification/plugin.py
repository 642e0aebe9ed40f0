"""The pytest plugin: what is qualified, the fixtures of the tests, the verdicts, the records, and how a failure looks.

Everything is done only once a qualification test is collected, one that uses the ``judge``: our own unit tests run under
the same configuration and pay for none of it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import backends
from backends.contract import Backend, Capability, Unsupported
from backends.model import DEFAULT_MODEL
from qualification import __version__
from qualification.audio import AudioError, load_wav
from qualification.criteria import DEVICE_LIMIT, Criteria, CriteriaError, Criterion
from qualification.host import MB, Hosted, Job
from qualification.judge import Judge
from qualification.lock import DeviceLock, LockBusy
from qualification.platform_check import disk_refusal, refusal
from qualification.progress import Progress
from qualification.records import RecordError, RecordWriter
from qualification.stream import Stream
from qualification.subject import DEFAULT_SUBJECT, Result, Subject, SubjectContext, SubjectError, load_factory

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_AUDIO = ROOT / "tests" / "data" / "speech.wav"
#: A quick test that takes longer hangs. The sustained one, and the slow ones, have the two hours of the configuration.
QUICK_TIMEOUT_S = 120
_RUN = pytest.StashKey["Run"]()
_JUDGE = pytest.StashKey[Judge]()
_log = logging.getLogger("plimsoll")


@dataclass
class Run:
    """One qualification: what is judged, on what, against which criteria, and where it is written."""

    backend: type[Backend]
    environment: str
    runtime: str
    subject_spec: str
    factory: Callable[[SubjectContext], Subject]
    model: Path
    audio: Path
    samples: Any
    criteria: Criteria
    lock: DeviceLock | None = None
    records: RecordWriter | None = None
    tests: list[str] = field(default_factory=list)

    def header(self) -> list[str]:
        """Say what is being qualified."""
        seconds = len(self.samples) / 16_000
        changed = ", ".join(f"{name} = {value:g}" for name, value in self.criteria.overridden.items())
        return [
            f"plimsoll {__version__}: qualifying {self.subject_spec}",
            f"  on backend {self.backend.name} in environment {self.environment} ({self.runtime}, "
            f"Python {platform.python_version()})",
            f"  model {self.model.name} (sha256 {_digest(self.model)[:12]}), audio {self.audio.name} "
            f"({seconds:.1f} s, sha256 {_digest(self.audio)[:12]})",
            f"  criteria: {self.criteria.source}" + (f" with {changed}" if changed else ""),
            f"  records: {self.records.path if self.records else 'none'}",
        ]

    def write(self, **fields: Any) -> None:
        """Write a criterion's verdict to the records."""
        if self.records is not None:
            self.records.criterion(backend=self.backend.name, environment=self.environment, **fields)


# Options and configuration.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a run can be told."""
    group = parser.getgroup("plimsoll", "qualification (Plimsoll)")
    group.addoption("--backend", metavar="NAME", help="backend to qualify on (default: the first that is available)")
    group.addoption("--subject", metavar="MODULE:FACTORY", default=DEFAULT_SUBJECT, help="application to qualify")
    group.addoption("--model", metavar="FILE.onnx", type=Path, default=DEFAULT_MODEL, help="acoustic model to load")
    group.addoption("--audio", metavar="FILE.wav", type=Path, default=DEFAULT_AUDIO, help="speech, 16 kHz mono 16-bit")
    group.addoption("--criteria", metavar="FILE.toml", type=Path, help="limits and parameters other than the defaults")
    group.addoption("--results", metavar="FOLDER", type=Path, default=ROOT / "results", help="folder for the records")
    group.addoption("--lock-wait", metavar="SECONDS", type=float, default=0.0, help="queue behind another run so long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Prepare the run once there is something to qualify."""
    judged = [item for item in items if "judge" in getattr(item, "fixturenames", ())]
    if not judged:
        return
    run = config.stash.get(_RUN, None)
    if run is None:
        run = config.stash[_RUN] = _prepare(config)
    for item in judged:
        if item.get_closest_marker("slow") is None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(QUICK_TIMEOUT_S))
        for mark in item.iter_markers("needs"):
            _expect_failure(item, run, [Capability(name) for name in mark.args])


def _expect_failure(item: pytest.Item, run: Run, needed: Sequence[Capability]) -> None:
    """Run what the backend cannot do all the same, as a strict expected failure: a stale "no" turns red."""
    for capability in needed:
        support = run.backend.capabilities[capability]
        if not support.yes:
            reason = f"{run.backend.name}: {support.reason} ({support.link})"
            item.add_marker(pytest.mark.xfail(raises=Unsupported, strict=True, reason=reason))


def _prepare(config: pytest.Config) -> Run:
    """Check everything that was given, before anything runs."""
    refused = refusal() or disk_refusal(ROOT)
    if refused:
        raise pytest.UsageError(refused)
    option = config.getoption
    backend, runtime = _choose_backend(option("--backend"))
    try:
        criteria_path = option("--criteria")
        run = Run(
            backend=backend,
            environment=os.environ.get("PLIMSOLL_ENVIRONMENT") or _environment_of(backend.name),
            runtime=runtime,
            subject_spec=option("--subject"),
            factory=load_factory(option("--subject")),
            model=_checked_model(option("--model")),
            audio=option("--audio"),
            samples=load_wav(option("--audio")),
            criteria=Criteria.load(criteria_path) if criteria_path else Criteria(),
        )
    except (SubjectError, AudioError, CriteriaError) as error:
        raise pytest.UsageError(str(error)) from error
    _try_model(run)
    return run


def _choose_backend(name: str | None) -> tuple[type[Backend], str]:
    if name is not None:
        try:
            chosen = backends.create(name)
        except backends.UnknownBackend as error:
            raise pytest.UsageError(f"--backend {name}: {error}") from error
        availability = chosen.probe()
        if not availability.available:
            raise pytest.UsageError(f"--backend {name} cannot run here: {availability.reason}")
        return chosen, availability.runtime
    found = backends.available()
    for declared, availability in found:
        if availability.available:
            return backends.create(declared.name), availability.runtime
    reasons = "; ".join(f"{declared.name}: {availability.reason}" for declared, availability in found)
    raise pytest.UsageError(f"no backend can run here, so nothing can be qualified: {reasons}")


def _environment_of(name: str) -> str:
    return next(each.environments[0] for each in backends.declared() if each.name == name)


def _checked_model(path: Path) -> Path:
    if not path.is_file():
        raise pytest.UsageError(f"--model {path}: there is no such file; expected an acoustic model for the backend")
    return path


def _try_model(run: Run) -> None:
    """A model that does not load is a usage error now, and not a failure of every test."""
    backend = run.backend()
    try:
        backend.load(run.model).close()
    except Exception as error:
        raise pytest.UsageError(f"--model {run.model}: {error}") from error
    finally:
        backend.close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the device's lock and begin the records, unless tests are only listed."""
    config = session.config
    run = config.stash.get(_RUN, None)
    if run is None or config.option.collectonly:
        return
    run.tests = [item.nodeid for item in session.items if "judge" in getattr(item, "fixturenames", ())]
    if not run.tests:
        return
    try:
        run.lock = DeviceLock(run.backend.name, config.getoption("--lock-wait"))
    except LockBusy as error:
        raise pytest.UsageError(str(error)) from error
    folder = config.getoption("--results")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{run.environment}-{run.backend.name}-{stamp}-{os.getpid()}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.records = RecordWriter(path, _about(config, run))
    except (OSError, RecordError) as error:
        raise pytest.UsageError(f"--results {folder}: the records cannot be written: {error}") from error
    handler = logging.FileHandler(path.with_suffix(".log"), encoding="utf-8")
    handler.setFormatter(logging.Formatter(config.getini("log_format"), config.getini("log_date_format")))
    logger = logging.getLogger("plimsoll")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    config.add_cleanup(lambda: (logger.removeHandler(handler), handler.close())[0])


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Say what is being qualified, before the first test."""
    run = config.stash.get(_RUN, None)
    return run.header() if run is not None else []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the next run in."""
    run = config.stash.get(_RUN, None)
    if run is not None and run.lock is not None:
        run.lock.release()
        run.lock = None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Close the records; a run that was cut off has no last line, and counts as damaged."""
    run = session.config.stash.get(_RUN, None)
    if run is not None and run.records is not None:
        run.records.close()


def _about(config: pytest.Config, run: Run) -> dict[str, Any]:
    """The first line of the records."""
    pins = ROOT / "constraints" / f"{run.environment}.txt"
    names = ("onnxruntime", "torch", "numpy", "psutil", "pytest")
    return {
        "suite_version": __version__,
        "suite_commit": _commit(),
        "subject": run.subject_spec,
        "backend": run.backend.name,
        "environment": run.environment,
        "runtime": run.runtime,
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
        },
        "driver": None,
        "versions": {name: _version(name) for name in names if _version(name)},
        "pins_sha256": _digest(pins) if pins.is_file() else None,
        "model_sha256": _digest(run.model),
        "audio_sha256": _digest(run.audio),
        "criteria": {"source": run.criteria.source, "overridden": run.criteria.overridden},
        "collected": run.tests,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# Verdicts.


class CriterionFailed(AssertionError):
    """At least one promise was not kept."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test passes once each of its criteria was measured and holds."""
    outcome = yield
    judge = pyfuncitem.stash.get(_JUDGE, None)
    if judge is not None:
        forgotten = [criterion.name for criterion in judge.unjudged]
        if forgotten:
            raise CriterionFailed(f"never measured: {', '.join(forgotten)}")
        if judge.failed:
            broken = "; ".join(f"{each.criterion.promise}" for each in judge.failed)
            raise CriterionFailed(judge.complaint or f"not kept: {broken}")
    return outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Give what was not measured its verdict, and put the four lines first."""
    report: pytest.TestReport = yield  # type: ignore[assignment, misc]  # the wrapper's result is the report
    judge = item.stash.get(_JUDGE, None)
    run = item.config.stash.get(_RUN, None)
    if run is None or "judge" not in getattr(item, "fixturenames", ()):
        return report  # type: ignore[return-value]
    if judge is None:
        if call.excinfo is None:
            return report  # type: ignore[return-value]
        # It failed before its own judge was made.
        judge = item.stash[_JUDGE] = _judge_for(item, run)
    if call.excinfo is not None:
        text = f"{call.excinfo.typename}: {call.excinfo.value}".split("\n")[0][:300]
        if report.skipped:
            reason = getattr(report, "wasxfail", "") or (report.longrepr[2] if isinstance(report.longrepr, tuple) else text)
            judge.end("not_run", str(reason).removeprefix("reason: "))
        else:
            judge.end("fail", f"the test ended before this was measured: {text}")
            # The promise says more than the traceback of the line that compared two numbers.
            rest = f"AssertionError: {call.excinfo.value}" if call.excinfo.errisinstance(CriterionFailed) else report.longrepr
            report.longrepr = _with_four_lines(item, run, judge, rest)
    elif call.when == "call" and report.failed:
        # A strict expected failure that passed: the backend's "no" is stale.
        report.longrepr = f"{report.longrepr}\nthe backend can do this now: correct its capability statement"
    return report  # type: ignore[return-value]


def _with_four_lines(item: pytest.Item, run: Run, judge: Judge, longrepr: Any) -> str:
    repeat = _repeat_command(item, run)
    lines: list[str] = []
    for verdict in judge.failed:
        lines += [*verdict.lines(repeat), ""]
    if judge.evidence:
        lines += [*judge.evidence, ""]
    return "\n".join(lines) + f"\n{longrepr}"


def _repeat_command(item: pytest.Item, run: Run) -> str:
    option = item.config.getoption
    words = ["python", "-m", "pytest", item.nodeid, "--backend", run.backend.name]
    for name, default in (("--subject", DEFAULT_SUBJECT), ("--model", DEFAULT_MODEL), ("--audio", DEFAULT_AUDIO)):
        if option(name) != default:
            words += [name, str(option(name))]
    if option("--criteria"):
        words += ["--criteria", str(option("--criteria"))]
    return shlex.join(words)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show what the backend cannot do as what it is: not run."""
    if report.when == "call" and report.skipped and hasattr(report, "wasxfail"):
        return "not run", "n", "NOT RUN"
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what was not run, each with its reason, and where the records are."""
    for report in terminalreporter.stats.get("not run", []):
        terminalreporter.write_line(f"NOT RUN {report.nodeid} - {report.wasxfail.removeprefix('reason: ')}")
    run = terminalreporter.config.stash.get(_RUN, None)
    if run is not None and run.records is not None:
        terminalreporter.write_line(f"records: {run.records.path}")


# Fixtures.


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Take the measured value of each of the test's criteria."""
    return request.node.stash.setdefault(_JUDGE, _judge_for(request.node, request.config.stash[_RUN]))


def _judge_for(item: pytest.Item, run: Run) -> Judge:
    name = getattr(item, "originalname", item.name)
    criteria: list[Criterion] = run.criteria.of(name)
    return Judge(name, criteria, run.write)


@pytest.fixture
def parameter(request: pytest.FixtureRequest) -> Callable[[str], float]:
    """Look up one of the test's parameters by name."""
    run = request.config.stash[_RUN]
    return lambda name: run.criteria.parameter(request.node.originalname, name)


@pytest.fixture
def device_limit_bytes(parameter: Callable[[str], float]) -> int:
    """Device memory that the subject may use, unless a test needs more."""
    return int(parameter(DEVICE_LIMIT)) * MB


@pytest.fixture
def new_backend(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Backend]]:
    """Make backends with a proved memory limit in bytes; all are closed at the end."""
    made: list[Backend] = []

    def make(limit_bytes: int) -> Backend:
        backend = request.config.stash[_RUN].backend()
        made.append(backend)
        backend.limit_memory(limit_bytes)
        return backend

    yield make
    for backend in made:
        backend.close()


@pytest.fixture
def backend(new_backend: Callable[[int], Backend], device_limit_bytes: int) -> Backend:
    """The backend, its device limited and the limit proved."""
    return new_backend(device_limit_bytes)


@pytest.fixture
def model_path(request: pytest.FixtureRequest) -> Path:
    """The acoustic model in use."""
    model: Path = request.config.stash[_RUN].model
    return model


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Stream:
    """Real speech, repeated without end."""
    return Stream(request.config.stash[_RUN].samples)


NewSubject = Callable[..., Subject]


@pytest.fixture
def new_subject(
    request: pytest.FixtureRequest, tmp_path: Path, model_path: Path, device_limit_bytes: int
) -> Iterator[NewSubject]:
    """Make subjects: ``new_subject(backend, workdir="a", policy={...})``; all are closed at the end."""
    run = request.config.stash[_RUN]
    made: list[Subject] = []

    def make(backend: Backend | None, workdir: str = "spool", policy: Mapping[str, Any] | None = None) -> Subject:
        context = SubjectContext(
            workdir=tmp_path / workdir,
            backend=backend,
            device=backend.device if backend else "",
            model_path=model_path,
            limits={"device_limit_bytes": device_limit_bytes},
            policy=policy or {},
        )
        made.append(run.factory(context))
        return made[-1]

    yield make
    for subject in made:
        subject.close()


@pytest.fixture
def undisturbed(
    request: pytest.FixtureRequest, new_subject: NewSubject, stream: Stream
) -> Callable[..., Sequence[Result]]:
    """Answer samples fed up to each of some positions by a subject that nothing happens to: what is right."""

    def make(*stops: int, drain_s: float = 60.0) -> Sequence[Result]:
        # Without a limit: a second capped device in one process would take the first one's place.
        backend = request.config.stash[_RUN].backend()
        subject = new_subject(backend, workdir=f"undisturbed-{time.monotonic_ns()}")
        start = 0
        for stop in stops:
            start = stream.feed(subject, start, stop)
            subject.drain(drain_s)
        results = list(subject.results())
        subject.close()
        backend.close()
        return results

    return make


@pytest.fixture
def hosted(
    request: pytest.FixtureRequest, tmp_path: Path, device_limit_bytes: int
) -> Iterator[Callable[..., Hosted]]:
    """Start the subject in a process of its own: ``hosted(workdir, stop=...)``; all are gone at the end."""
    run = request.config.stash[_RUN]
    made: list[Hosted] = []

    def start(workdir: str = "spool", **options: Any) -> Hosted:
        job = Job(
            subject=run.subject_spec,
            workdir=str(tmp_path / workdir),
            backend=run.backend.name,
            model=str(run.model.resolve()),
            audio=str(run.audio.resolve()),
            device_limit_bytes=device_limit_bytes,
            **options,
        )
        made.append(Hosted(job, tmp_path / "host.log"))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def progress(request: pytest.FixtureRequest) -> Iterator[Callable[[float | None], Progress]]:
    """Show live progress, past the capturing of output: ``progress(total_s)``."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    made: list[Progress] = []
    is_terminal = bool(reporter) and reporter.isatty
    fresh = True

    def write(text: str) -> None:
        nonlocal fresh
        if reporter is None or capture is None:
            return
        with capture.global_and_fixture_disabled():
            # The first line must not continue the test's own.
            reporter.write(("\n" if fresh and not is_terminal else "") + text, flush=True)
        fresh = False

    def start(total_s: float | None) -> Progress:
        made.append(Progress(request.node.name, total_s, write, is_terminal))
        return made[-1]

    yield start
    for each in made:
        each.done()

