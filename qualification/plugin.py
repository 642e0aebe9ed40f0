"""The pytest plugin: what is qualified, the fixtures of the tests, the verdicts, the records, and how a failure looks.

Everything is done only once a qualification test is collected, one that uses the ``judge``: our own unit tests run
under the same configuration and pay for none of it.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import shlex
import sysconfig
import time
import traceback
import unittest
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backends.contract import Backend, Capability, ModelError, Unsupported
from backends.faults.cuda import ALLOW_DEVICE_FAULTS
from backends.faults.interposer import refusal as interposer_refusal
from backends.model import DEFAULT_MODEL, SAMPLE_RATE_HZ, read_onnx
from qualification import history
from qualification.criteria import DEVICE_LIMIT, Criterion
from qualification.host import MB, Hosted, Job
from qualification.judge import Judge
from qualification.observe import sampler_of
from qualification.plot import run_times
from qualification.progress import Progress
from qualification.quoting import is_ours, place
from qualification.records import SHARES_MAX, RecordError
from qualification.resume import TAKEN, TestByTest
from qualification.run import (
    DEFAULT_AUDIO,
    DEFAULT_RESULTS,
    ROOT,
    SWEEP_MODEL,
    Refused,
    Run,
    device_faults_allowed,
    prepare,
)
from qualification.sampling import Sampler
from qualification.stream import Stream
from qualification.subject import DEFAULT_SUBJECT, Result, Subject, SubjectContext, absolute
from qualification.survival import Unfinished
from qualification.sweep.campaign import Campaign, Ledger
from qualification.sweep.points import Point, PointError, Sweep, parse
from qualification.sweep.stage import Setting

#: A quick test that takes longer hangs. The sustained one, and the slow ones, have the two hours of the configuration.
QUICK_TIMEOUT_S = 300
#: Property of a report: why the test was not run.
_NOT_RUN = "not run"
_RUN = pytest.StashKey["Run"]()
_JUDGE = pytest.StashKey[Judge]()
_SEEN = pytest.StashKey["_Seen"]()
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
#: Errors with words of ours, where we raised them; and those that the suite declares itself.
_OUR_ERRORS = (AssertionError, pytest.fail.Exception, Unsupported)
_OWN_TESTS = (ROOT / "tests" / "unit", ROOT / "tests" / "meta")


# Options and configuration.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what a run can be told."""
    group = parser.getgroup("plimsoll", "qualification (Plimsoll)")
    group.addoption("--backend", metavar="NAME", help="backend to qualify on (default: the first that is available)")
    group.addoption("--device", metavar="NAME", help="device of the backend, such as cuda:1 (default: its first)")
    group.addoption("--subject", metavar="MODULE:FACTORY", default=DEFAULT_SUBJECT, help="application to qualify")
    group.addoption(
        "--model",
        metavar="FILE",
        type=Path,
        default=DEFAULT_MODEL,
        help="acoustic model: FILE.onnx, or FILE.pt2 on torch",
    )
    group.addoption("--audio", metavar="FILE.wav", type=Path, default=DEFAULT_AUDIO, help="speech, 16 kHz mono 16-bit")
    group.addoption("--criteria", metavar="FILE.toml", type=Path, help="limits and parameters other than the defaults")
    group.addoption("--results", metavar="FOLDER", type=Path, default=DEFAULT_RESULTS, help="folder for the records")
    group.addoption(
        "--lock-wait", metavar="SECONDS", type=_seconds, default=0.0, help="queue behind another run so long"
    )
    group.addoption(
        "--allow-shared-gpu",
        action="store_true",
        help="exhaust a GPU that other processes use, or that drives a display",
    )
    group.addoption(
        "--allow-device-faults",
        action="store_true",
        help="let kernels trap on the GPU: its driver logs Xids, which monitors act on",
    )

    group.addoption(
        "--resume",
        action="store_true",
        help="go on where an earlier run of the same was cut off, test by test",
    )
    group.addoption(
        "--history", metavar="FILE", type=Path, help=f"SQLite file for how runs ended (default: {history.FILE} there)"
    )
    group.addoption(
        "--history-key", metavar="KEY", default=history.KEY, help="key in it, by which other tools look the status up"
    )
    group.addoption(
        "--on-finish",
        metavar="COMMAND",
        type=_command,
        default=[],
        help="command that gets the run's summary as JSON on its standard input; split into words, no shell",
    )
    group.addoption(
        "--point", metavar="NAME", type=_point, help="repeat one point of the sweep, and nothing else of it"
    )
    group.addoption(
        "--shard", metavar="K/N", type=_shard, default=(1, 1), help="sweep the Kth of N shares: for several machines"
    )


def _point(text: str) -> Point:
    try:
        return parse(text)
    except PointError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shard(text: str) -> tuple[int, int]:
    share, _, of = text.partition("/")
    # Of more digits Python makes no number.
    numbers = [int(each) if each.isdecimal() and len(each) < 10 else 0 for each in (share, of)]
    if not 1 <= numbers[0] <= numbers[1] <= SHARES_MAX:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: expected K/N, a share from 1 to N and their number, at most {SHARES_MAX}, such as 1/4"
        )
    return numbers[0], numbers[1]


def _command(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not words:
        raise argparse.ArgumentTypeError("it is empty: expected a command and its arguments")
    return words


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds of at least 0")
    return value


def _is_judged(item: pytest.Item) -> bool:
    """Whether a test is part of the qualification: it uses the judge of this plugin, and not another of that name."""
    info = getattr(item, "_fixtureinfo", None)
    definitions: Sequence[Any] = info.name2fixturedefs.get("judge", ()) if info is not None else ()
    return bool(definitions) and definitions[-1].func.__module__ == __name__


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Prepare the run once there is something to qualify."""
    judged = [item for item in items if _is_judged(item)]
    if not judged:
        return
    run = config.stash.get(_RUN, None)
    if run is None:
        run = config.stash[_RUN] = _prepare(config)
    for item in judged:
        timeout_s = _timeout_s(item, run)
        if timeout_s is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(timeout_s))
        for mark in item.iter_markers("needs"):
            _expect_failure(item, run, [Capability(name) for name in mark.args])


def _timeout_s(item: pytest.Item, run: Run) -> float | None:
    """Give a test's own timeout in seconds, or None for the configuration's two hours."""
    duration_s = run.criteria.duration_s(_name_of(item))
    if duration_s is None:
        return None if item.get_closest_marker("slow") else QUICK_TIMEOUT_S
    # A test that lasts as long as it is told to must not be ended by a shorter timeout.
    needed_s = 1.2 * duration_s + 600
    return needed_s if needed_s > float(item.config.getini("timeout")) else None


def _expect_failure(item: pytest.Item, run: Run, needed: Sequence[Capability]) -> None:
    """Run what the backend cannot do all the same, as a strict expected failure: a stale "no" turns red."""
    for capability in needed:
        support = run.backend.capabilities[capability]
        if not support.yes:
            reason = f"{run.backend.name}: {support.reason} ({support.link})"
            item.add_marker(pytest.mark.xfail(raises=Unsupported, strict=True, reason=reason))


def _prepare(config: pytest.Config) -> Run:
    """Check everything that was given, before anything runs."""
    option = config.getoption
    if option("--allow-device-faults"):
        # For the processes below: it is in one of them that a device fault is brought about.
        os.environ[ALLOW_DEVICE_FAULTS] = "1"
    try:
        return prepare(
            backend=option("--backend"),
            device=option("--device"),
            subject=option("--subject"),
            model=option("--model"),
            audio=option("--audio"),
            criteria=option("--criteria"),
            allow_shared_gpu=option("--allow-shared-gpu"),
        )
    except Refused as error:
        raise pytest.UsageError(str(error)) from error


class _LogFile(logging.FileHandler):
    """The log beside the records. A full disk is the records' to report, once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Say nothing."""

    def close(self) -> None:
        """Close, whatever could not be written."""
        with suppress(OSError):
            super().close()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the device's lock and begin the records, unless tests are only listed."""
    config = session.config
    run = config.stash.get(_RUN, None)
    if run is None or config.option.collectonly:
        return
    run.tests = [item.nodeid for item in session.items if _is_judged(item)]
    if not run.tests:
        return
    own = [item for item in session.items if any(item.path.is_relative_to(folder) for folder in _OWN_TESTS)]
    if own:
        raise pytest.UsageError(
            f"tests of Plimsoll itself are collected together with the qualification ({own[0].nodeid}): the runs that "
            "they start would wait for the lock that this one holds. Run nox -s tests, or name their folder alone"
        )
    try:
        run.take_device(config.getoption("--lock-wait"), partial(_say, config))
        point = config.getoption("--point")
        path = run.begin_records(
            config.getoption("--results"),
            resumes=config.getoption("--resume"),
            point=point.name if point else None,
            shard=list(config.getoption("--shard")),
        )
    except Refused as error:
        raise pytest.UsageError(str(error)) from error
    if config.getoption("--resume"):
        kept = Unfinished(
            Path(config.getoption("--results")) / f"unfinished-{run.environment}-{run.backend.name}-tests.json",
            run.resume_key(),
        )
        config.pluginmanager.register(
            TestByTest(kept, run.tests, path.name, lambda item: item.stash.get(_JUDGE, None), CriterionFailed)
        )
    log = path.with_suffix(".log")
    # As private as the records.
    log.touch(mode=0o600)
    handler = _LogFile(log, encoding="utf-8")
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter(config.getini("log_format"), config.getini("log_date_format")))
    logger = logging.getLogger("plimsoll")
    logger.addHandler(handler)
    config.add_cleanup(handler.close)
    config.add_cleanup(partial(logger.removeHandler, handler))


def _say(config: pytest.Config, line: str) -> None:
    """Write a line to the terminal, at once."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.ensure_newline()
        reporter.write(f"{line}\n", flush=True)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Say what is being qualified, before the first test."""
    run = config.stash.get(_RUN, None)
    return run.header() if run is not None else []


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the next run in."""
    run = config.stash.get(_RUN, None)
    if run is not None:
        run.release_lock()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
    """Close the records, and say how the run ended.

    After Ctrl-C they are whole too, with fewer criteria than the collected tests have. A run that was killed has no
    last line, and counts as damaged.
    """
    config = session.config
    run = config.stash.get(_RUN, None)
    if run is None or run.records is None:
        return
    try:
        run.records.close()
    except RecordError as error:
        # What has no end counts as damaged, however good it looked.
        run.notes.append(f"the records have no end: {error}")
        session.exitstatus = exitstatus = int(exitstatus) or 1
    file = config.getoption("--history") or Path(config.getoption("--results")) / history.FILE
    summary = run.summary(int(exitstatus))
    run.notes += history.publish(summary, file, config.getoption("--history-key"), config.getoption("--on-finish"))


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
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give what was not measured its verdict, and put the four lines first."""
    skips = call.excinfo is not None and call.excinfo.errisinstance((pytest.skip.Exception, unittest.SkipTest))
    # Now: pytest makes a skip of its own of one that is unittest's.
    skipped_by_subject = skips and call.excinfo is not None and not _raised_by_us(call.excinfo.value, item.path)
    report = yield
    run = item.config.stash.get(_RUN, None)
    if run is None or run.records is None or not _is_judged(item):
        return report
    _give_verdicts(item, run, call, report, skipped_by_subject=skipped_by_subject)
    seen = item.stash.setdefault(_SEEN, _Seen())
    seen.add(call, report)
    if call.when == "teardown":
        _write_test(item, run, seen)
    return report


def _give_verdicts(
    item: pytest.Item, run: Run, call: pytest.CallInfo[None], report: pytest.TestReport, *, skipped_by_subject: bool
) -> None:
    judge = item.stash.get(_JUDGE, None)
    if judge is None:
        if call.excinfo is None:
            return
        # It failed before its own judge was made.
        judge = item.stash[_JUDGE] = _judge_for(item, run)
    if call.excinfo is not None:
        if report.skipped and skipped_by_subject:
            # It is not for a subject to say what is not run.
            report.outcome, report.longrepr = "failed", f"the subject skipped the test: {call.excinfo.value}"
        if report.skipped:
            reason = getattr(report, "wasxfail", "") or (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else call.excinfo.typename
            )
            for word in ("reason: ", "Skipped: ", "not run: "):
                reason = str(reason).removeprefix(word)
            if call.excinfo.errisinstance(Unsupported):
                needed = [Capability(name) for mark in item.iter_markers("needs") for name in mark.args]
                judge.lacking = next((each.value for each in needed if not run.backend.capabilities[each].yes), None)
            judge.end("not_run", reason)
            report.user_properties.append((_NOT_RUN, reason))
        else:
            judge.end("fail", f"the test ended before this was measured: {_why(item, call.excinfo)}")
            # The promise says more than the traceback of the line that compared two numbers.
            rest = (
                f"AssertionError: {call.excinfo.value}"
                if call.excinfo.errisinstance(CriterionFailed)
                else report.longrepr
            )
            report.longrepr = _with_four_lines(item, run, judge, rest)
    elif call.when == "call" and report.failed:
        # A strict expected failure that passed: the backend's "no" is stale.
        report.longrepr = f"{report.longrepr}\nthe backend can do this now: correct its capability statement"


def _why(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
    """Say why a test ended early, as it may be recorded: with our own words, or else what failed, and where.

    Any other message may be a subject's. It is below, in the traceback.
    """
    error, text = excinfo.value, str(excinfo.value).split("\n")[0][:300]
    # An assertion without words of its own shows what it compared.
    if _has_our_words(error, item.path) and not text.startswith("assert "):
        return f"{excinfo.typename}: {text}"
    where = place(error, item.path)
    return f"{excinfo.typename} at {where}" if where else excinfo.typename


def _has_our_words(error: BaseException, test: Path) -> bool:
    """Whether it is of a kind that quotes no subject, and was raised by us; a subject can raise what it wants."""
    module = type(error).__module__
    is_kind = isinstance(error, _OUR_ERRORS) or module.startswith(("qualification.", "backends.faults."))
    return is_kind and _raised_by_us(error, test)


def _raised_by_us(error: BaseException, test: Path) -> bool:
    """Whether an error came out of the suite alone: from the test on, nothing of a subject's is on its way."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # pytest's own are around the test, and inside pytest.fail and pytest.skip.
    files = [file for file in files if not {"_pytest", "pluggy"} & {*Path(file).parts}]
    if files and Path(files[-1]).name == "pytest_timeout.py":
        return True  # it strikes wherever the test is, with words of its own
    return all(is_ours(file, test) or _is_pythons(file) for file in files)


def _is_pythons(file: str) -> bool:
    path = Path(file)
    packages = {"site-packages", "dist-packages"}
    return file.startswith("<frozen ") or (path.is_relative_to(_STANDARD_LIBRARY) and not packages & {*path.parts})


class _Seen:
    """What is seen of a test besides its verdicts."""

    def __init__(self) -> None:
        self.outcome = "passed"
        self.duration_s = 0.0
        self.subjects: list[Subject] = []
        #: By the wall clock: where the time of its series begins.
        self.sampled_from_s: float | None = None
        self.device_limit_bytes: int | None = None
        self.events: list[tuple[float, str]] = []
        #: The phase and the type of the first error that is no verdict on a criterion.
        self.failed_in: str | None = None

    def add(self, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
        """Take in one phase of the test: after its call, what its subjects told."""
        self.duration_s += call.duration
        if report.failed:
            self.outcome = "failed"
            if call.excinfo is None or not call.excinfo.errisinstance(CriterionFailed):
                what = call.excinfo.typename if call.excinfo else "XPASS(strict)"
                self.failed_in = self.failed_in or f"{call.when}: {what}"
        elif report.skipped and self.outcome == "passed":
            self.outcome = "not_run"
        if call.when == "call" and self.sampled_from_s is not None:
            for subject in self.subjects:
                # One that is broken has no events; that it is broken is judged elsewhere.
                with suppress(Exception):
                    told = run_times(subject.events(), self.sampled_from_s)
                    self.events += [each for each in told if each[0] >= 0]


def _write_test(item: pytest.Item, run: Run, seen: _Seen) -> None:
    judge, taken = item.stash.get(_JUDGE, None), item.stash.get(TAKEN, None)
    repeat = _repeat_command(item, run)
    try:
        run.write_test(
            test=_name_of(item),
            id=item.nodeid,
            outcome=seen.outcome,
            duration_s=seen.duration_s,
            repeat=repeat,
            evidence=judge.recorded if judge is not None else (),
            events=sorted(seen.events),
            device_limit_bytes=seen.device_limit_bytes,
            taken_from=taken,
            failed_in=seen.failed_in,
        )
    except RecordError as error:
        pytest.exit(f"the records cannot be written: {error}", returncode=1)


def _with_four_lines(item: pytest.Item, run: Run, judge: Judge, longrepr: Any) -> str:
    repeat = _repeat_command(item, run)
    lines: list[str] = []
    for verdict in judge.failed:
        lines += [*verdict.lines(repeat), ""]
    if judge.evidence:
        lines += [*judge.evidence, ""]
    return "\n".join(lines) + f"\n{longrepr}"


def _repeat_command(item: pytest.Item, run: Run, point: str = "") -> str:
    """Give what is typed to run this test again, or one point of its sweep."""
    option = item.config.getoption
    point = point or (option("--point").name if option("--point") else "")
    words = ["python", "-m", "pytest", item.nodeid, "--backend", run.backend.name]
    if option("--device"):
        words += ["--device", option("--device")]
    began_in = item.config.invocation_params.dir
    subject = option("--subject")
    if subject != DEFAULT_SUBJECT:
        file, colon, factory = subject.rpartition(":")
        words += ["--subject", f"{_from_root(began_in, file)}{colon}{factory}" if file.endswith(".py") else subject]
    if point:
        words += ["--point", point]
    for name, default in (("--model", DEFAULT_MODEL), ("--audio", DEFAULT_AUDIO), ("--criteria", None)):
        if option(name) != default:
            words += [name, _from_root(began_in, option(name))]
    allowed = {"--allow-shared-gpu": run.allow_shared_gpu, "--allow-device-faults": device_faults_allowed()}
    words += [name for name, is_allowed in allowed.items() if is_allowed]
    return shlex.join(words)


def _from_root(began_in: Path, path: str | Path) -> str:
    """Give a path as it is typed in the checkout's root, whatever folder the run began in."""
    whole = (began_in / path).resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show what the backend or the machine cannot do as what it is: not run."""
    # A module that is skipped as a whole has a report without properties.
    if report.skipped and _NOT_RUN in dict(getattr(report, "user_properties", ())):
        return "not run", "n", "NOT RUN"
    return None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List what was not run, each with its reason, and where the records are."""
    for report in terminalreporter.stats.get("not run", []):
        terminalreporter.write_line(f"NOT RUN {report.nodeid} - {dict(report.user_properties)[_NOT_RUN]}")
    run = terminalreporter.config.stash.get(_RUN, None)
    for plugin in terminalreporter.config.pluginmanager.get_plugins():
        if isinstance(plugin, TestByTest):
            if plugin.taken:
                terminalreporter.write_line(f"{len(plugin.taken)} tests were not run again: see --resume")
            if plugin.complaint:
                terminalreporter.write_line(plugin.complaint)
    if run is not None and run.records is not None:
        for note in run.notes:
            terminalreporter.write_line(note)
        terminalreporter.write_line(f"records: {run.records.path}")


# Fixtures.


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Take the measured value of each of the test's criteria."""
    judge: Judge = request.node.stash.setdefault(_JUDGE, _judge_for(request.node, request.config.stash[_RUN]))
    return judge


def _judge_for(item: pytest.Item, run: Run) -> Judge:
    name = _name_of(item)
    criteria: list[Criterion] = run.criteria.of(name)

    def write(**fields: Any) -> None:
        try:
            run.write(**fields)
        except RecordError as error:
            # What is not recorded is not qualified: there is no sense in going on.
            pytest.exit(f"the records cannot be written: {error}", returncode=1)

    return Judge(name, criteria, write)


def _name_of(item: pytest.Item) -> str:
    """Give a test's name without its parameters."""
    return str(getattr(item, "originalname", item.name))


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
        request.node.stash.setdefault(_SEEN, _Seen()).device_limit_bytes = limit_bytes
        backend: Backend = request.config.stash[_RUN].new_backend()
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
def new_sampler(request: pytest.FixtureRequest) -> Callable[[Subject], Sampler]:
    """Make samplers of a subject's processes, and of the card that it is on, where it is on one."""
    run, seen = request.config.stash[_RUN], request.node.stash.setdefault(_SEEN, _Seen())

    def make(subject: Subject) -> Sampler:
        sampler = sampler_of(subject, run.card, card_is_ours=not run.allow_shared_gpu)
        # Of several the last is the one that is judged.
        seen.sampled_from_s = time.time()
        return sampler

    return make


@pytest.fixture
def model_path(request: pytest.FixtureRequest) -> Path:
    """The acoustic model in use."""
    model: Path = request.config.stash[_RUN].model
    return model


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> Stream:
    """Real speech, repeated without end."""
    return Stream(request.config.stash[_RUN].samples)


@pytest.fixture
def campaign(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    parameter: Callable[[str], float],
    device_limit_bytes: int,
    progress: Callable[[float | None], Progress],
) -> Iterator[Callable[..., Campaign]]:
    """Make a campaign of the sweep: ``campaign(sweeps, sample=2)``; what it tried goes into the records at the end."""
    run, option = request.config.stash[_RUN], request.config.getoption
    if (refused := interposer_refusal()) is not None:
        pytest.skip(refused)
    # By identity: whoever names the default one wants that.
    model = SWEEP_MODEL if run.model is DEFAULT_MODEL else run.model
    made: list[Campaign] = []
    name = _name_of(request.node)

    def setting(folder: str) -> Setting:
        return Setting(
            subject=absolute(run.subject_spec),
            backend=run.backend.name,
            device=run.device,
            model=str(model.resolve()),
            audio=str(run.audio.resolve()),
            device_limit_bytes=device_limit_bytes,
            block_samples=_block_samples(model),
            folder=folder,
        )

    not_run: dict[str, str] = {}

    def make(sweeps: Sequence[Sweep], sample: int | None = None, without: Mapping[str, str] | None = None) -> Campaign:
        not_run.update(without or {})
        seed, shard = int(parameter("seed")), option("--shard")
        ledger = None
        if sample is None and option("--point") is None:
            ledger = Path(option("--results")) / f"unfinished-{run.environment}-{run.backend.name}-{name}.jsonl"
        key = {**run.resume_key(), "test": name, "seed": seed, "shard": shard, "model": str(model)}
        shown = progress(None)
        found = Campaign(
            *(setting, sweeps, seed, Ledger(ledger, key), tmp_path / "sweep"),
            jobs=int(parameter("jobs")),
            shard=shard,
            sample=sample,
            say=lambda text: shown.update(text=text),
        )
        made.append(found)
        return found

    yield make
    for sweep, reason in not_run.items():
        run.notes.append(f"NOT RUN {sweep} - {reason}")
        run.write_sweep(test=name, sweep=sweep, not_run=reason)
    for each in made:
        each.ledger.close()
        run.notes.append(f"sweep with {model.name}: {each.summary()}")
        for tally in each.tallies.values():
            if tally.tried:
                run.write_sweep(test=name, model=model.name, seed=each.seed, shard=list(each.shard), **tally.plain())


def _block_samples(model: Path) -> int:
    """Give how many samples the model answers at once; a second, where only its runtime could say."""
    try:
        return read_onnx(model)[0].chunk_samples
    except (OSError, ModelError):
        return SAMPLE_RATE_HZ


@pytest.fixture
def point(request: pytest.FixtureRequest) -> Point | None:
    """The one point that is asked for."""
    found: Point | None = request.config.getoption("--point")
    return found


@pytest.fixture
def repeat(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Give the command that repeats one point of the sweep."""
    return functools.partial(_repeat_command, request.node, request.config.stash[_RUN])


NewSubject = Callable[..., Subject]


@pytest.fixture
def new_subject(
    request: pytest.FixtureRequest, tmp_path: Path, model_path: Path, device_limit_bytes: int
) -> Iterator[NewSubject]:
    """Make subjects: ``new_subject(backend, workdir="a", policy={...})``; all are closed at the end."""
    run, seen = request.config.stash[_RUN], request.node.stash.setdefault(_SEEN, _Seen())
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
        seen.subjects.append(made[-1])
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
        backend = request.config.stash[_RUN].new_backend()
        subject = new_subject(backend, workdir=f"undisturbed-{time.monotonic_ns()}")
        start = 0
        for stop in stops:
            start = stream.feed(subject, start, stop)
            subject.drain(drain_s)
        results = list(subject.results())
        subject.close()
        backend.close()
        silent = sum(result.output is None for result in results)
        # Else a subject that never answers would be right about everything.
        if 2 * silent > len(results) or not results:
            pytest.fail(
                f"the subject answers nothing even when nothing happens to it: {silent} of {len(results)} results "
                "have no output"
            )
        return results

    return make


@pytest.fixture
def hosted(request: pytest.FixtureRequest, tmp_path: Path, device_limit_bytes: int) -> Iterator[Callable[..., Hosted]]:
    """Start the subject in a process of its own: ``hosted(workdir, stop=...)``; all are gone at the end."""
    run = request.config.stash[_RUN]
    made: list[Hosted] = []

    def start(workdir: str = "spool", **options: Any) -> Hosted:
        job = Job(
            subject=absolute(run.subject_spec),
            workdir=str(tmp_path / workdir),
            backend=run.backend.name,
            device=run.device,
            model=str(run.model.resolve()),
            audio=str(run.audio.resolve()),
            device_limit_bytes=device_limit_bytes,
            **options,
        )
        made.append(Hosted(job, tmp_path / "host"))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def unfinished(request: pytest.FixtureRequest) -> Callable[..., Unfinished]:
    """Keep the rounds of a long test beside the records: ``unfinished(seed=1)`` takes up what was cut off."""
    run, folder = request.config.stash[_RUN], Path(request.config.getoption("--results"))
    name = _name_of(request.node)
    path = folder / f"unfinished-{run.environment}-{run.backend.name}-{name}.json"
    return lambda **key: Unfinished(path, {**run.resume_key(), "test": name, **key})


@pytest.fixture
def progress(request: pytest.FixtureRequest) -> Iterator[Callable[[float | None], Progress]]:
    """Show live progress, past the capturing of output: ``progress(total_s)``."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    made: list[Progress] = []
    is_terminal = reporter is not None and reporter.isatty
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
