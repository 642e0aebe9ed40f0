"""A worker that is forked is what one that is started is, sooner; what it is forked from is never in the way."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import protection.template
import protection.worker_process
from backends.contract import Share
from backends.cpu import Cpu
from backends.errors import ErrorKind, RuntimeFailure, Shortage
from backends.model import DEFAULT_MODEL
from backends.process import NO_ACCELERATOR
from protection.template import STATUS_UNKNOWN, Template, TemplateLost, template_for
from protection.worker_engine import WorkerEngine
from protection.worker_process import WorkerLost
from tests.unit.descriptors import changes_since, open_descriptors
from tests.unit.waiting import until

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)

#: What a worker says of itself before it serves, on its standard output.
PROBE = """
import ctypes, gc, json, os, random, resource, signal, tempfile, threading
from protection import worker

def load():
    serve = worker._Worker.serve
    def described(self):
        print(json.dumps(describe()), flush=True)
        serve(self)
    worker._Worker.serve = described

def describe():
    opened = {}
    for each in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            opened[each] = os.readlink(f"/proc/self/fd/{each}").partition("[")[0]
        except FileNotFoundError:
            pass  # the listing's own
    signals = [line for line in open("/proc/self/status").read().splitlines() if line.startswith("Sig")]
    dies_by = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(dies_by))
    return {
        "like a started one": {
            "descriptors": opened,
            "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
            "signals": [line for line in signals if not line.startswith("SigQ")],
            "dies by": dies_by.value,
            "session": os.getsid(0) == os.getpid(),
            "oom score": open("/proc/self/oom_score_adj").read(),
            "core, files": [resource.getrlimit(each) for each in (resource.RLIMIT_CORE, resource.RLIMIT_NOFILE)],
            "threads": threading.active_count(),
        },
        "parent": os.getppid(),
        "frozen": gc.get_freeze_count(),
        "random": [random.random(), next(tempfile._get_candidate_names())],
    }
"""
Preload = Callable[..., str]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    descriptors, threads = open_descriptors(), set(threading.enumerate())
    yield
    protection.template.end_all()
    protection.template._templates.clear()
    until(lambda: set(threading.enumerate()) <= threads, "its thread ends")
    left = psutil.Process().children(recursive=True)
    assert not left, f"processes left behind: {left}"
    left_open = open_descriptors() - descriptors
    assert not left_open, f"descriptors left behind: {left_open}"


@pytest.fixture
def preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preload:
    """Give a maker of what to import first, from the text of its module; each has a template of its own."""
    numbers = itertools.count()
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(text: str = "def load(): pass") -> str:
        name = f"preloaded_{os.getpid()}_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return f"{name}:load"

    return make


class Launched:
    """A worker without a host's side that asks it anything."""

    def __init__(
        self, preload: str | None, hidden: Mapping[str, str] | None = None, descriptors: tuple[int, ...] = ()
    ) -> None:
        self.work, self.side, self.stderr, process, template = protection.worker_process._launch(
            Share({}, descriptors, preload), hidden or {}
        )
        self.process, self.template = process, template

    def said(self) -> Any:
        """Wait for what it says of itself."""
        until(lambda: b"\n" in os.pread(self.stderr, 1 << 16, 0), "it says what it is")
        text = os.pread(self.stderr, 1 << 16, 0).decode()
        assert text.startswith("{"), f"it said {text}"
        return json.loads(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.work.close()
        self.side.close()
        os.close(self.stderr)


@pytest.fixture
def launch() -> Iterator[Callable[..., Launched]]:
    with ExitStack() as launched:

        def make(*arguments: Any, **named: Any) -> Launched:
            made = Launched(*arguments, **named)
            launched.callback(made.close)
            return made

        yield make


@pytest.fixture
def start(preload: Preload, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerEngine]]:
    """Give a maker of engines on cpu whose workers are forked."""
    monkeypatch.setattr(Cpu, "preload", preload())
    monkeypatch.setattr(Cpu, "is_slow_to_import", True)
    with ExitStack() as opened:

        def make(**named: Any) -> WorkerEngine:
            engine = WorkerEngine(Cpu(), DEFAULT_MODEL, owns_backend=True, **named)
            opened.callback(engine.close)
            return engine

        yield make


def _features() -> Any:
    return np.random.RandomState(3).standard_normal((4, 150, 80)).astype(np.float32)


def _gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _stop(template: Template) -> psutil.Process:
    process = psutil.Process(template.process_id)
    process.suspend()
    until(lambda: process.status() == psutil.STATUS_STOPPED, "it is stopped")
    return process


def _template(worker: Launched) -> Template:
    assert worker.template is not None, "it was started, and not forked"
    return worker.template


# What a forked worker is.


def test_a_forked_worker_is_what_a_started_one_is(
    preload: Preload, launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = preload(PROBE)
    module, _, _ = probe.partition(":")

    def boot(*numbers: int) -> list[str]:
        arguments = protection.worker.boot(*numbers)
        program = arguments.index("-c") + 1
        begin = "from protection.worker import main"
        arguments[program] = arguments[program].replace(begin, f"import {module}; {module}.load(); {begin}")
        return arguments

    monkeypatch.setattr(protection.worker_process, "boot", boot)
    monkeypatch.setenv("PLIMSOLL_GOES", "1")
    with (tmp_path / "board").open("wb") as board, (tmp_path / "audio").open("wb"):
        # Numbers in each other's way where the template has few descriptors, and far from them.
        given = tuple(fcntl.fcntl(board, fcntl.F_DUPFD, least) for least in (7, 203, 200))
        first = launch(probe, {}, given)
        # The template was started before: what has changed since reaches a worker as well.
        monkeypatch.setenv("PLIMSOLL_COMES", "2")
        monkeypatch.delenv("PLIMSOLL_GOES")
        found = [launch(each, NO_ACCELERATOR, given) for each in (probe, None)]
        forked, started = (each.said() for each in found)
        for each in given:
            os.close(each)
    about = "like a started one"
    for each in (forked[about], started[about]):
        # Those of the connections are new each time.
        numbers = {number: kind for number, kind in each["descriptors"].items() if kind != "socket:"}
        each["descriptors"] = numbers, len(each["descriptors"]) - len(numbers)
    differ = [name for name, what in started[about].items() if forked[about][name] != what]
    assert not differ, f"forked and started: {[(name, forked[about][name], started[about][name]) for name in differ]}"
    environment = forked[about]["environment"]
    hidden = {name: environment[name] for name in NO_ACCELERATOR}
    assert hidden == NO_ACCELERATOR and environment["PLIMSOLL_COMES"] == "2", f"its environment is {environment}"
    assert "PLIMSOLL_GOES" in first.said()[about]["environment"], "what was there at first did not reach the first"
    assert (forked[about]["dies by"], forked[about]["oom score"]) == (signal.SIGKILL, "1000\n"), f"it is {forked}"
    numbers, sockets = forked[about]["descriptors"]
    assert numbers["0"] == "/dev/null" and {*map(str, given)} < {*numbers}, f"its descriptors are {numbers}"
    assert sockets == 2, f"it has {sockets} sockets: one for work, one beside it"
    assert (forked["parent"], started["parent"]) == (_template(first).process_id, os.getpid()), "their parents"


def test_forks_share_what_was_imported_and_not_their_random_numbers(
    preload: Preload, launch: Callable[..., Launched]
) -> None:
    probe = preload(PROBE)
    one, two = (launch(probe).said() for _ in range(2))
    assert one["frozen"] > 1000, f"{one['frozen']} objects are out of the collector's way"
    assert not set(one["random"]) & set(two["random"]), f"random numbers and names: {one['random']}, {two['random']}"


def test_a_template_has_one_thread_and_goes_after_its_workers(
    preload: Preload, launch: Callable[..., Launched]
) -> None:
    worker = launch(preload("import numpy\ndef load(): numpy.ones((64, 64)) @ numpy.ones((64, 64))"))
    process = psutil.Process(_template(worker).process_id)
    scores = [int(Path(f"/proc/{each}/oom_score_adj").read_text()) for each in (process.pid, worker.process.pid)]
    assert process.num_threads() == 1, f"it has {process.num_threads()} threads"
    # The worker says it of itself once it has begun.
    until(lambda: Path(f"/proc/{worker.process.pid}/oom_score_adj").read_text() == "1000\n", "the worker goes first")
    assert 0 < scores[0] < 1000, f"the OOM killer's scores of template and worker: {scores}"
    assert os.getsid(process.pid) == process.pid, "it is in another session than its own"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_descriptors_that_are_in_each_others_way_all_arrive(order: tuple[int, ...]) -> None:
    files = [os.memfd_create(f"plimsoll-test-{number}") for number in range(3)]
    inodes = [os.fstat(each).st_ino for each in files]
    # Each goes to where another of them, or none, is now.
    spare = os.dup(files[0])
    os.close(spare)
    places = [*files[:2], spare]
    wanted = [places[each] for each in order]
    protection.template._renumber(list(files), wanted)
    found = [os.fstat(each).st_ino for each in wanted]
    for each in wanted:
        os.close(each)
    assert found == inodes, f"from {files} to {wanted} arrived {found}, not {inodes}"


def test_an_environment_that_is_too_large_to_tell_means_a_plain_start(
    preload: Preload, launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = preload()
    template = _template(launch(probe))
    monkeypatch.setenv("PLIMSOLL_LARGE", "x" * 100_000)
    assert launch(probe).template is None, "it was forked"
    assert "the environment has changed by 100" in caplog.text, f"logged: {caplog.text}"
    monkeypatch.delenv("PLIMSOLL_LARGE")
    assert launch(probe).template is template, "the template was given up"


# How a worker ended.


def test_how_a_worker_ended_is_told_to_every_thread_that_asks(
    preload: Preload, launch: Callable[..., Launched]
) -> None:
    probe = preload()
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM):
        worker, other = launch(probe), launch(probe)
        assert worker.process.poll() is None, f"it is said to have ended with {worker.process.poll()}"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.process.wait(0.05)
        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(worker.process.wait, 60.0) for _ in range(8)]
            os.kill(worker.process.pid, number)
            found = {each.result() for each in asking}
        assert found == {-number} and worker.process.poll() == -number, f"after {number!r} it is {found}"
        worker.process.kill()
        assert other.process.poll() is None, "another one ended too"


def test_a_worker_that_ends_at_once_is_no_trouble(preload: Preload, launch: Callable[..., Launched]) -> None:
    probe = preload("import os\ndef load(): os.register_at_fork(after_in_child=lambda: os._exit(7))")
    workers = [launch(probe) for _ in range(30)]
    found = [each.process.wait(60.0) for each in workers]
    assert found == [7] * 30, f"they ended with {found}"
    assert len({_template(each).process_id for each in workers}) == 1, "the template was replaced"


def test_what_a_worker_died_of_is_in_its_last_words(preload: Preload, launch: Callable[..., Launched]) -> None:
    worker = launch(preload("from protection import worker\ndef load(): worker.main = lambda: 1 // 0"))
    assert worker.process.wait(60.0) == 1, f"it ended with {worker.process.returncode}"
    text = os.pread(worker.stderr, 10_000, 0).decode()
    assert "ZeroDivisionError" in text, f"it said {text!r}"


def test_threads_that_launch_at_once_each_get_their_own(preload: Preload) -> None:
    probe = preload()
    with ThreadPoolExecutor(8) as threads:
        workers = list(threads.map(lambda _: Launched(probe), range(24)))
        # Ended from other threads while more are launched.
        ended = [threads.submit(each.close) for each in workers[::2]]
        more = list(threads.map(lambda _: Launched(probe), range(8)))
        for end in ended:
            end.result(60.0)
    kept = [*workers[1::2], *more]
    alive = [each.process.poll() for each in kept]
    ids = {each.process.pid for each in kept}
    for each in kept:
        each.close()
    assert alive == [None] * len(kept) and len(ids) == len(kept), f"their states are {alive}, their ids {ids}"
    assert len({_template(each).process_id for each in kept}) == 1, "there was more than one template"
    statuses = [each.process.returncode for each in (*workers, *more)]
    assert set(statuses) == {-signal.SIGKILL}, f"they ended with {statuses}"
    assert not _template(kept[0])._statuses and not _template(kept[0])._running, "something is still noted of them"


# A template that fails.


@pytest.mark.parametrize(
    "text",
    ["def load(): raise ImportError('no runtime')", "import nothing_of_the_kind", "import os; os._exit(3)", "x = 1"],
    ids=["raises", "does-not-import", "ends", "has-no-such-function"],
)
def test_a_template_that_cannot_begin_means_a_plain_start(
    preload: Preload, launch: Callable[..., Launched], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    before = open_descriptors()
    worker = launch(preload(text))
    assert worker.template is None and worker.process.poll() is None, f"it ended with {worker.process.returncode}"
    assert "no template could be started: the template ended" in caplog.text, f"logged: {caplog.text}"
    # Two connections and what it says.
    new = open_descriptors() - before
    assert len(new) == 3, f"opened for it: {new}"


def test_a_template_that_hangs_as_it_begins_is_not_waited_for_without_end(
    preload: Preload, launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protection.template, "_READY_S", 0.5)
    assert launch(preload("import signal\ndef load(): signal.pause()")).template is None, "it was forked"
    assert "gave no answer within 0.5 s" in caplog.text, f"logged: {caplog.text}"


def test_without_a_thread_for_it_there_is_no_template(
    preload: Preload, launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        worker = launch(preload())
    assert worker.template is None and worker.process.poll() is None, "no plain worker was started"


def test_a_template_without_descriptors_goes_on(preload: Preload, launch: Callable[..., Launched]) -> None:
    probe = preload()
    first = launch(probe)
    template = _template(first)
    limit = resource.prlimit(template.process_id, resource.RLIMIT_NOFILE)
    ends, told = [], set()
    for most in range(3, 16):
        resource.prlimit(template.process_id, resource.RLIMIT_NOFILE, (most, limit[1]))
        work, theirs = socket.socketpair()
        with work, theirs, Path("/dev/null").open("wb") as stderr:
            number = str(theirs.fileno())
            try:
                ends.append(template.launch([number, number], (theirs.fileno(),), stderr.fileno(), {}))
            except TemplateLost as error:
                told.add(str(error).partition(":")[0])
    resource.prlimit(template.process_id, resource.RLIMIT_NOFILE, limit)
    assert told == {"the template could not fork"} and len(ends) > 2, f"{len(ends)} were forked; told: {told}"
    assert launch(probe).template is template and first.process.poll() is None, "the template, or its worker, was lost"
    for each in ends:
        assert each.wait(60.0) == 0, f"a worker whose host hung up ended with {each.returncode}"


def test_a_stopped_template_costs_a_recovery_a_moment_and_no_other_worker(
    start: Callable[..., WorkerEngine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protection.template, "_ANSWER_S", 2.0)
    engine = start(standby=True)
    expected = engine.infer(_features())
    device, standby = engine._device, engine._fallback
    assert device is not None and standby is not None and standby._template is not None, "there are no two workers"
    template = standby._template
    stopped = _stop(template)
    os.kill(device.process_id, signal.SIGSEGV)
    with pytest.raises(WorkerLost, match="the process that it was forked from does not say how"):
        engine.infer(_features())
    began_s = time.monotonic()
    engine.restart()
    took_s = time.monotonic() - began_s
    assert np.array_equal(engine.infer(_features()), expected), "the scores differ"
    assert engine._device is not None and engine._device._template is not template, "it is of the stopped template"
    assert standby.alive and not _gone(stopped), "a worker in good health was ended"
    # Once more with one that did not tell before that it is stopped.
    second = engine._device._template
    assert second is not None, "the next worker was not forked from another template"
    _stop(second)
    began_s = time.monotonic()
    engine._drop(engine._device)
    engine.restart()
    late_s = time.monotonic() - began_s
    assert engine._device._template is not second and np.array_equal(engine.infer(_features()), expected), "the scores"
    assert max(took_s, late_s) < 20.0, f"the restarts took {took_s:.1f} and {late_s:.1f} s"
    # With its last worker the stopped one goes as well, whatever it still had to say.
    engine._drop(standby)
    until(lambda: _gone(stopped), "it is ended")


def test_what_a_template_says_too_late_leaves_nothing(
    preload: Preload, launch: Callable[..., Launched], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = preload()
    first = launch(probe)
    template = _template(first)
    stopped = _stop(template)
    with monkeypatch.context() as patched:
        patched.setattr(protection.template, "_ANSWER_S", 0.3)
        second = launch(probe)
    assert second.template is None, "a stopped template forked"
    assert "gave no answer within 0.3 s" in caplog.text, f"logged: {caplog.text}"
    stopped.resume()
    # It forks now, for nobody: that one finds its host's ends closed.
    third = launch(probe)
    assert third.template not in (None, template) and first.process.poll() is None, "the late one is asked again"
    until(lambda: [each.pid for each in stopped.children()] == [first.process.pid], "the late worker has ended")
    before = open_descriptors()
    first.process.kill()
    assert first.process.wait(60.0) == -signal.SIGKILL, f"it ended with {first.process.returncode}"
    assert _gone(stopped), "it was kept without workers"
    until(lambda: len(open_descriptors()) == len(before) - 1, "its connection is closed")


def test_a_template_that_is_killed_takes_its_workers_along_and_the_next_is_another(
    start: Callable[..., WorkerEngine],
) -> None:
    engine = start(standby=True)
    expected = engine.infer(_features())
    _, *ids = engine.process_ids()
    assert engine._device is not None and engine._device._template is not None, "there is no template"
    template = engine._device._template
    assert template.process_id in ids and len(ids) == 3, f"processes {ids}, the template {template.process_id}"
    os.kill(template.process_id, signal.SIGKILL)
    workers = [psutil.Process(each) for each in ids if psutil.pid_exists(each)]
    until(lambda: all(map(_gone, workers)), "they all end")
    with pytest.raises(WorkerLost, match="was killed by SIGKILL"):
        engine.infer(_features())
    assert np.array_equal(engine.infer(_features()), expected), "the scores differ"
    assert engine._device._template not in (None, template), "the next worker is of no template"
    engine.fall_back()
    assert np.array_equal(engine.infer(_features()), expected), "the fallback's scores differ"


def test_a_status_that_nobody_told_is_none_of_a_signal() -> None:
    text = protection.worker_process._how(STATUS_UNKNOWN)
    assert text == "ended, and the process that it was forked from does not say how", f"it is {text!r}"


# Its life.


def test_a_template_without_workers_ends_and_leaves_nothing(preload: Preload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection.template, "_LINGER_S", 0.4)
    probe = preload()
    descriptors, threads = open_descriptors(), set(threading.enumerate())
    ids = set()
    for _ in range(2):
        workers = [Launched(probe) for _ in range(5)]
        process = psutil.Process(_template(workers[0]).process_id)
        ids.add(process.pid)
        assert "0.4" in process.cmdline(), f"it stays for longer than 0.4 s: {process.cmdline()}"
        for each in workers[1:]:
            each.close()
        # One is enough for it to stay.
        threading.Event().wait(0.8)
        assert not _gone(process) and workers[0].process.poll() is None, "it went before its last worker"
        assert len(set(threading.enumerate()) - threads) == 1, f"threads {threading.enumerate()}"
        workers[0].close()
        until(lambda: set(threading.enumerate()) == threads, "its thread ends")
        assert not psutil.Process().children(), f"left: {psutil.Process().children()}"
        workers.clear()
        del each
        assert not (changes := changes_since(descriptors)), changes
    assert len(ids) == 2, f"the templates were {ids}"


def test_engines_share_one_template(start: Callable[..., WorkerEngine]) -> None:
    one, two = start(), start()
    templates = {each.process_ids()[-1] for each in (one, two)}
    assert len(templates) == 1, f"the templates are {templates}"
    one.close()
    assert two.infer(_features()).shape == (4, 50, 32), "the other's worker is gone"


HOST = """
import json, os, signal, sys, threading, time
import numpy as np
from backends.cpu import Cpu
from backends.model import DEFAULT_MODEL
import protection.template
from protection.template import template_for
from protection.worker_engine import WorkerEngine

def say(*what):
    print(json.dumps(what), flush=True)

features = np.random.RandomState(3).standard_normal((4, 150, 80)).astype(np.float32)
Cpu.preload, Cpu.is_slow_to_import = "protection.events:Events", True
# Ignored where the tests run in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


@pytest.fixture
def host() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    with ExitStack() as hosts:

        def make(program: str) -> subprocess.Popen[str]:
            made = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", HOST + program],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            hosts.callback(made.communicate)
            hosts.callback(made.kill)
            return made

        yield make


def _hear(host: subprocess.Popen[str]) -> list[Any]:
    assert host.stdout is not None and host.stderr is not None
    line = host.stdout.readline()
    assert line, f"the host said nothing more: {host.stderr.read()[-2000:]}"
    found: list[Any] = json.loads(line)
    return found


def _ended(host: subprocess.Popen[str]) -> str:
    """Tell it to go on, wait for its end, and give what it complained of."""
    _, errors = host.communicate("\n", timeout=100.0)
    assert host.returncode == 0, f"the host ended with {host.returncode}: {errors[-2000:]}"
    return errors


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_a_host_that_is_killed_takes_template_and_workers_along(
    host: Callable[[str], subprocess.Popen[str]], state: str
) -> None:
    # Once they have answered they have begun.
    parent = host("""
engine = WorkerEngine(Cpu(), DEFAULT_MODEL, standby=True)
engine.infer(features)
engine.fall_back()
say(*engine.process_ids())
input()
""")
    processes = [psutil.Process(each) for each in _hear(parent)[1:]]
    assert len(processes) == 3, f"they are {processes}"
    if state == "stopped":
        for each in processes:
            each.suspend()
    parent.kill()
    until(lambda: all(map(_gone, processes)), f"of {processes}, {state}, none outlives the host")


@pytest.mark.parametrize("close", ["", "engine.close()"], ids=["without-closing", "closed"])
def test_a_host_ends_without_a_word_and_without_waiting(
    host: Callable[[str], subprocess.Popen[str]], close: str
) -> None:
    parent = host(f"""
# Whoever waited for a template that stays would wait for long.
protection.template._LINGER_S = 300.0
engine = WorkerEngine(Cpu(), DEFAULT_MODEL)
engine.infer(features)
say(*engine.process_ids())
input()
{close}
""")
    processes = [psutil.Process(each) for each in _hear(parent)[1:]]
    began_s = time.monotonic()
    errors = _ended(parent)
    took_s = time.monotonic() - began_s
    until(lambda: all(map(_gone, processes)), "none outlives it")
    # An engine that is not closed leaves its own connections, streams, to the collector. The template's is none.
    theirs = [line for line in errors.splitlines() if f"type={int(socket.SOCK_STREAM)}," not in line]
    assert not theirs and took_s < 20.0, f"it took {took_s:.1f} s, and said {theirs}"


def test_an_interrupt_from_the_keyboard_reaches_neither(host: Callable[[str], subprocess.Popen[str]]) -> None:
    parent = host("""
engine = WorkerEngine(Cpu(), DEFAULT_MODEL)
before = engine.process_ids()
try:
    say(*before)
    threading.Event().wait(60.0)
except KeyboardInterrupt:
    pass
engine.infer(features)
say(before == engine.process_ids(), engine.lost)
engine.close()
""")
    _hear(parent)
    os.killpg(parent.pid, signal.SIGINT)
    found = _hear(parent)
    assert found == [True, False], f"the same processes, and whether one was lost: {found}"
    assert not _ended(parent), "it complained"


def test_a_fork_of_the_host_has_its_own_and_leaves_its_parents_alone(
    host: Callable[[str], subprocess.Popen[str]],
) -> None:
    parent = host("""
import protection.template
engine = WorkerEngine(Cpu(), DEFAULT_MODEL)
expected = engine.infer(features)
mine = engine.process_ids()
# Another thread may be at it at that moment.
protection.template._starting.acquire()
child = os.fork()
if not child:
    theirs = WorkerEngine(Cpu(), DEFAULT_MODEL)
    say("child", bool(np.array_equal(theirs.infer(features), expected)), *theirs.process_ids())
    theirs.close()
    # In order, with all that is done at an exit.
    sys.exit(0)
protection.template._starting.release()
_, status = os.waitpid(child, 0)
engine.infer(features)
say("parent", status, mine == engine.process_ids(), *mine)
engine.restart()
say(engine.process_ids()[-1])
input()
engine.close()
""")
    name, right, *theirs = _hear(parent)
    assert (name, right) == ("child", True), f"the child said {name}, right {right}"
    name, status, same, *mine = _hear(parent)
    assert (name, status, same) == ("parent", 0, True), f"the child's status {status}, the same processes {same}"
    assert len(theirs) == len(mine) == 3 and not set(theirs) & set(mine), f"child {theirs}, parent {mine}"
    assert _hear(parent) == mine[2:], "the parent's template was replaced"
    _ended(parent)


# With torch.

needs_torch = pytest.mark.skipif(util.find_spec("torch") is None, reason="torch is not installed")


@needs_torch
def test_torch_in_a_forked_worker_answers_and_counts_as_in_a_started_one(
    preload: Preload, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.torch_cpu import TorchCpu

    found = []
    for forked in (True, False):
        if not forked:
            monkeypatch.setattr(TorchCpu, "preload", None)
        with contextlib.closing(TorchCpu()) as backend:
            backend.limit_memory(192 * MIB)
            with contextlib.closing(WorkerEngine(backend, DEFAULT_MODEL)) as engine:
                assert len(engine.process_ids()) == (3 if forked else 2), f"processes {engine.process_ids()}"
                scores = engine.infer(_features())
                used = backend.memory().used_bytes
                held = backend.allocate(64 * MIB)
                grown = backend.memory().used_bytes - used
                with pytest.raises(RuntimeFailure) as caught:
                    backend.allocate(192 * MIB)
                held.free()
                found.append((scores, used, grown, caught.value))
                assert np.array_equal(engine.infer(_features()), scores), "after an OOM the scores differ"
    (scores, used, grown, error), (scores_started, used_started, grown_started, error_started) = found
    assert scores.tobytes() == scores_started.tobytes(), "the scores differ"
    assert abs(used - used_started) < 2 * MIB, f"the model holds {used} bytes forked, {used_started} started"
    assert abs(grown - 64 * MIB) < MIB > abs(grown_started - 64 * MIB), f"64 MiB are {grown} and {grown_started} bytes"
    kinds = [(each.kind, each.shortage) for each in (error, error_started)]
    assert kinds == [(ErrorKind.DEVICE_OOM, Shortage.CAPPED)] * 2, f"forked and started it is {kinds}"


@needs_torch
def test_the_template_of_torch_has_one_thread_and_the_fallback_of_a_capped_device_is_not_capped(
    preload: Preload,
) -> None:
    from backends.torch_cpu import TorchCpu

    with contextlib.closing(TorchCpu()) as backend:
        backend.limit_memory(128 * MIB)
        with contextlib.closing(WorkerEngine(backend, DEFAULT_MODEL)) as engine:
            expected = engine.infer(_features())
            assert engine._device is not None and engine._device._template is not None, "it was not forked"
            template = engine._device._template
            assert psutil.Process(template.process_id).num_threads() == 1, "it has more threads than one"
            engine.fall_back()
            assert np.array_equal(engine.infer(_features()), expected), "the fallback's scores differ"
            assert engine._fallback is not None and engine._fallback._template is template, "it is of another template"
            limits = [
                resource.prlimit(each.process_id, resource.RLIMIT_DATA)[0]
                for each in (engine._device, engine._fallback, template)
            ]
    free = resource.getrlimit(resource.RLIMIT_DATA)[0]
    assert limits[0] != free and limits[1:] == [free, free], f"device, fallback and template are capped at {limits}"


def test_a_template_is_found_by_what_it_has_imported(preload: Preload) -> None:
    one, two = preload(), preload()
    assert template_for(one) is template_for(one) is not template_for(two), "they are mixed up"
