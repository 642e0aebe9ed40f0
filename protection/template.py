"""A process that has imported a runtime already, and of which workers are forked: in milliseconds, not in seconds.

Importing torch takes more than a second, and each worker would pay for it, in the middle of a recovery. A template does
it once. It runs no model, has no device and one thread, so that a fork of it is safe; its workers share its memory.
It is started when the first worker is, serves all engines of the process, and ends some seconds after the last worker,
or with the process. One that does not answer is not asked again, and lives on for the workers that it has.

    python -c … CONTROL_DESCRIPTOR PARENT_PROCESS_ID MODULE:FUNCTION LINGER_SECONDS

Messages are JSON, one a packet. A request carries the worker's descriptors, its answer one by which the worker is
watched: the process's number may be another's by the time that it is read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

from backends.process import begin_as_child, python_arguments
from backends.threads import OneThread
from protection.channel import AwakeClock, until

_PACKET_BYTES = 1 << 16
_MOST_DESCRIPTORS = 16
_READY_S = 30.0
_ANSWER_S = 3.0
#: A template without workers waits so long for the next.
_LINGER_S = 10.0
#: The OOM killer takes a worker first: with the template all of them go.
_OOM_SCORE = 900
#: One thread, of NumPy's library as well.
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
#: A worker's exit status where its template lives and does not tell.
STATUS_UNKNOWN = -(1 << 16)


class TemplateLost(Exception):
    """The template ended, hung, or could not be started, or it could not fork. The message says which."""


class Forked:
    """A worker process, as much of ``subprocess.Popen`` as is asked of one; its parent is the template.

    Any thread may ask.
    """

    def __init__(self, template: Template, process_id: int, descriptor: int) -> None:
        """Watch a process by this descriptor (pidfd), which is taken over."""
        self.pid = process_id
        self.returncode: int | None = None
        self._reaping = threading.Lock()
        # Last: whoever gave it closes it where this object could not be made.
        self._template, self._descriptor = template, descriptor

    def poll(self) -> int | None:
        """Give its exit status, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait ``timeout`` seconds for its end and give the exit status. Raises subprocess.TimeoutExpired."""
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        if not ended.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        with self._reaping:
            if self.returncode is None:
                self.returncode = self._template.status_of(self.pid)
            return self.returncode

    def kill(self) -> None:
        """Send SIGKILL. Nothing happens to a process that has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def __del__(self) -> None:
        # Not before: another thread may be waiting on it.
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Template:
    """The template, from its host's side. Any thread may ask; they wait for each other."""

    def __init__(self, preload: str) -> None:
        """Start it, and wait until it has imported. Raises TemplateLost."""
        self._lock = threading.RLock()
        self._statuses: dict[int, int] = {}
        self._running: set[int] = set()
        self._silent = False
        self._environment = {**os.environ, **_ONE_THREAD}
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The kernel ends a process with the thread that started it: this one waits for its end.
        keeper = OneThread("plimsoll-template")
        with theirs:
            arguments = python_arguments("protection.template", theirs.fileno(), os.getpid(), preload, _LINGER_S)
            try:
                self._process = keeper.do(lambda: self._start(arguments, theirs.fileno()))
            except (OSError, RuntimeError, MemoryError, subprocess.SubprocessError) as error:
                self._control.close()
                keeper.close()
                raise TemplateLost(f"no template could be started: {error}") from error
        try:
            keeper.do_last(self._watch)
            with self._lock:
                self._receive(_READY_S, "ready")
        except (OSError, MemoryError, TemplateLost) as error:
            self.end()
            raise TemplateLost(f"no template could be started: {error}") from error

    def _start(self, arguments: list[str], control: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            # Its host's standard output has one reader, and it is not this.
            stdout=2,
            pass_fds=(control,),
            env=self._environment,
            start_new_session=True,
        )

    def _watch(self) -> None:
        # It is reaped below: who asks meanwhile whether it runs is not kept waiting.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.end()

    @property
    def process_id(self) -> int:
        """Its process id."""
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs, and answers."""
        return not self._silent and self._process.poll() is None

    def launch(
        self, arguments: list[str], descriptors: tuple[int, ...], stderr: int, environment: Mapping[str, str]
    ) -> Forked:
        """Fork a worker with these descriptors, which keep their numbers, and this process's environment and this.

        ``arguments`` are those of ``protection.worker``, after the parent's id. Raises TemplateLost.
        """
        wanted = {**os.environ, **environment}
        changed = {
            name: wanted.get(name)
            for name in wanted.keys() | self._environment.keys()
            if wanted.get(name) != self._environment.get(name)
        }
        request = json.dumps(
            {
                "arguments": arguments,
                "descriptors": descriptors,
                "environment": changed,
                "most_descriptors": resource.getrlimit(resource.RLIMIT_NOFILE),
            }
        ).encode()
        if len(request) > _PACKET_BYTES:
            raise TemplateLost(f"the environment has changed by {len(request)} bytes since the template was started")
        with self._lock:
            try:
                socket.send_fds(self._control, [request], [stderr, *descriptors])
                answer, given = self._receive(_ANSWER_S, "forked")
                if answer["forked"] and not given:
                    # The worker finds nobody at its connections, and ends.
                    raise TemplateLost("there was no descriptor to watch a worker by")
            except (OSError, MemoryError, TemplateLost) as error:
                self._give_up()
                raise TemplateLost(str(error)) from error
            if not answer["forked"]:
                raise TemplateLost(f"the template could not fork: {answer['why']}")
            try:
                self._running.add(answer["forked"])
                return Forked(self, answer["forked"], given[0])
            except MemoryError:
                os.close(given[0])
                raise

    def status_of(self, process_id: int) -> int:
        """Give the exit status of a worker that has ended, or STATUS_UNKNOWN."""
        with self._lock:
            try:
                while process_id not in self._statuses:
                    self._receive(_ANSWER_S, "ended")
                status = self._statuses.pop(process_id)
            except (OSError, TemplateLost):
                # The kernel kills workers with their template.
                status = STATUS_UNKNOWN if self._process.poll() is None else -signal.SIGKILL
                self._silent = True
            self._running.discard(process_id)
            if self._silent:
                self._give_up()
            return status

    def _give_up(self) -> None:
        """Ask it no more; end it once it has no workers."""
        self._silent = True
        if not self._running:
            self.end()

    def _receive(self, timeout_s: float, wanted: str) -> tuple[dict[str, Any], list[int]]:
        """Take in what it tells of, until what is wanted comes; give that and its descriptors. Raises TemplateLost."""
        clock = AwakeClock()
        while True:
            if self._control.fileno() < 0:
                raise TemplateLost("the template ended")
            while not until(self._control, False, min(timeout_s, AwakeClock.STEP_S)):
                if clock.read_s() >= timeout_s:
                    raise TemplateLost(f"the template gave no answer within {timeout_s:g} s")
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, _PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                # It left something unread behind.
                data = b""
            if not data:
                # It closes its end when it ends, and not before.
                self._process.wait()
                raise TemplateLost("the template ended")
            message: dict[str, Any] = json.loads(data)
            # A late word about a worker that nobody asks about any more is not kept: its number may be another's.
            if message.get("ended") in self._running:
                self._statuses[message["ended"]] = message["status"]
            if wanted in message:
                return message, descriptors
            for descriptor in descriptors:
                os.close(descriptor)

    def end(self) -> None:
        """End it, and its workers with it. A second call does nothing."""
        self._process.kill()
        self._process.wait()
        with self._lock:
            # How its workers ended, as far as it told.
            with contextlib.suppress(OSError, TemplateLost):
                while True:
                    self._receive(0.0, "ended")
            self._control.close()

    def forsake(self) -> None:
        """Forget it, in a fork of the process that started it."""
        self._control.close()
        # Not a child of this process: then there is nothing to wait for, and nothing is killed.
        self._process.poll()


_templates: dict[str, Template] = {}
_starting = threading.Lock()


def template_for(preload: str) -> Template:
    """Give the template that has called this ``module:function``; start it where there is none. Raises TemplateLost."""
    with _starting:
        template = _templates.get(preload)
        if template is None or not template.alive:
            template = _templates[preload] = Template(preload)
        return template


@atexit.register
def end_all() -> None:
    """End the templates of this process, and their workers."""
    for template in list(_templates.values()):
        template.end()


def _begin_anew() -> None:
    """Have no template, in a fork of this process: they are its parent's."""
    global _starting
    _starting = threading.Lock()
    for template in _templates.values():
        template.forsake()
    _templates.clear()


os.register_at_fork(after_in_child=_begin_anew)


def main() -> None:
    """Import what the workers need, and fork one for each request until the host is gone, or has no use for it."""
    control, parent, preload, linger_s = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5])
    begin_as_child(parent, oom_score=_OOM_SCORE)
    module, _, function = preload.partition(":")
    getattr(importlib.import_module(module), function)()
    importlib.import_module("protection.worker")
    importlib.import_module("protection.channel")
    # What is there now is never garbage: a collection in a worker would copy every page of it.
    gc.collect()
    gc.freeze()
    end = socket.socket(fileno=control)
    _tell(end, {"ready": os.getpid()})
    workers: dict[int, int] = {}
    ready = select.poll()
    ready.register(end, select.POLLIN)
    while events := ready.poll(None if workers else linger_s * 1e3):
        for descriptor, _ in events:
            if descriptor in workers:
                ready.unregister(descriptor)
                _, status = os.waitpid(process_id := workers.pop(descriptor), 0)
                os.close(descriptor)
                _tell(end, {"ended": process_id, "status": os.waitstatus_to_exitcode(status)})
                continue
            request, descriptors = _next_request(end)
            try:
                watched, process_id = _fork(request, descriptors, [end.fileno(), *workers])
            except OSError as error:
                _tell(end, {"forked": 0, "why": str(error)})
                continue
            finally:
                for each in descriptors:
                    os.close(each)
            workers[watched] = process_id
            ready.register(watched, select.POLLIN)
            _tell(end, {"forked": process_id}, watched)
    os._exit(0)


def _next_request(end: socket.socket) -> tuple[dict[str, Any], list[int]]:
    try:
        data, descriptors, _, _ = socket.recv_fds(end, _PACKET_BYTES, _MOST_DESCRIPTORS)
    except ConnectionResetError:
        # It left something unread behind.
        data = b""
    if not data:
        os._exit(0)
    return json.loads(data), descriptors


def _tell(end: socket.socket, message: dict[str, Any], *descriptors: int) -> None:
    try:
        socket.send_fds(end, [json.dumps(message).encode()], descriptors)
    except OSError:
        os._exit(0)


def _fork(request: Mapping[str, Any], descriptors: list[int], own: list[int]) -> tuple[int, int]:
    """Fork a worker; give the descriptor that it is watched by, and its process id. Raises OSError."""
    if len(descriptors) <= len(request["descriptors"]):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    template = os.getpid()
    with warnings.catch_warnings():
        # Python warns where a process has several threads. Those of libraries that are here sleep, and handle a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        process_id = os.fork()
    if process_id:
        try:
            return os.pidfd_open(process_id), process_id
        except OSError:
            os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
            raise
    try:
        _become_worker(request, descriptors, own, template)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _become_worker(request: Mapping[str, Any], descriptors: list[int], own: list[int], template: int) -> None:
    from protection import worker

    os.setsid()
    for descriptor in own:
        os.close(descriptor)
    stderr, *given = descriptors
    for standard in (1, 2):
        os.dup2(stderr, standard)
    os.close(stderr)
    resource.setrlimit(resource.RLIMIT_NOFILE, request["most_descriptors"])
    _renumber(given, request["descriptors"])
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.argv[2:] = [str(template), *request["arguments"]]
    worker.main()


def _renumber(given: list[int], wanted: list[int]) -> None:
    """Give descriptors other numbers. Where one is in another's place, it makes way first."""
    for place, number in enumerate(wanted):
        for later in range(place + 1, len(given)):
            if given[later] == number:
                given[later] = os.dup(number)
                os.close(number)
        if given[place] != number:
            os.dup2(given[place], number)
            os.close(given[place])
