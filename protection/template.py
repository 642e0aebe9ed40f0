"""A process that has imported a runtime already, and of which workers are forked: in milliseconds, not in seconds.

Importing torch takes more than a second, and each worker would pay for it, in the middle of a recovery. A template does
it once. It runs no model, has no device and one thread, so that a fork of it is safe; its workers share its memory.
It is started when the first worker is, serves all engines of the process, and ends some seconds after the last worker,
or with the process.

    python -c … CONTROL_DESCRIPTOR PARENT_PROCESS_ID MODULE:FUNCTION

Messages are JSON, one a packet; a request carries descriptors.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from backends.process import begin_as_child, python_arguments
from protection.channel import AwakeClock, until

_PACKET_BYTES = 1 << 16
_MOST_DESCRIPTORS = 16
_READY_S = 30.0
_FORK_S = 3.0
#: A template without workers waits so long for the next.
_LINGER_S = 10.0
_ABOVE = 200


class TemplateLost(Exception):
    """The template ended, hung, or could not be started. The message says which."""


class Forked:
    """A worker process, as much of ``subprocess.Popen`` as is asked of one; its parent is the template."""

    def __init__(self, template: Template, process_id: int) -> None:
        """Watch the process of this id, which the template has not reaped yet."""
        self.pid = process_id
        self.returncode: int | None = None
        self._template = template
        self._descriptor = os.pidfd_open(process_id)

    def poll(self) -> int | None:
        """Give its exit status, negative for a signal, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and give the exit status. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._descriptor, select.POLLIN)
            if not ended.poll(None if timeout is None else timeout * 1e3):
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            # Killed with its template, where that cannot tell any more.
            self.returncode = self._template.status_of(self.pid, -signal.SIGKILL)
            os.close(self._descriptor)
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL. Nothing happens to a process that has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)


class Template:
    """The template, from its host's side. Any thread may ask; they wait for each other."""

    def __init__(self, preload: str) -> None:
        """Start it, and wait until it has imported. Raises TemplateLost."""
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        self._running: set[int] = set()
        self._idle_since_s = time.monotonic()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                arguments = python_arguments("protection.template", theirs.fileno(), os.getpid(), preload)
                self._process = subprocess.Popen(
                    [sys.executable, *arguments],
                    stdin=subprocess.DEVNULL,
                    # Its host's standard output has one reader, and it is not this.
                    stdout=2,
                    pass_fds=(theirs.fileno(),),
                    # One thread, of NumPy's library as well.
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            self._receive(_READY_S)
        except (OSError, subprocess.SubprocessError, TemplateLost) as error:
            self.end()
            raise TemplateLost(f"no template could be started: {error}") from error

    @property
    def process_id(self) -> int:
        """Its process id."""
        return int(self._process.pid)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def launch(
        self, arguments: list[str], descriptors: tuple[int, ...], stderr: int, environment: Mapping[str, str]
    ) -> Forked:
        """Fork a worker with these descriptors, which keep their numbers, and this on top of its environment.

        ``arguments`` are those of ``protection.worker``, after the parent's id. Raises TemplateLost.
        """
        request = {"arguments": arguments, "descriptors": descriptors, "environment": dict(environment)}
        with self._lock:
            try:
                socket.send_fds(self._control, [json.dumps(request).encode()], [stderr, *descriptors])
                process_id = int(self._receive(_FORK_S, "forked")["forked"])
                self._running.add(process_id)
                return Forked(self, process_id)
            except (OSError, TemplateLost) as error:
                self.end()
                raise TemplateLost(str(error)) from error

    def status_of(self, process_id: int, unknown: int) -> int:
        """Give the exit status of a worker that has ended, or ``unknown`` where the template is gone as well."""
        with self._lock:
            with contextlib.suppress(OSError, TemplateLost):
                while process_id not in self._statuses:
                    self._receive(1.0)
            self._running.discard(process_id)
            self._idle_since_s = time.monotonic()
            status = self._statuses.pop(process_id, unknown)
        if not self._running:
            timer = threading.Timer(_LINGER_S, self._end_if_idle)
            timer.daemon = True
            timer.start()
        return status

    def _receive(self, timeout_s: float, wanted: str = "") -> dict[str, Any]:
        """Take in what it tells of, until the wanted answer comes. Raises TemplateLost."""
        clock = AwakeClock()
        while True:
            while not until(self._control, False, AwakeClock.STEP_S):
                if clock.read_s() > timeout_s:
                    raise TemplateLost(f"the template gave no answer within {timeout_s:g} s")
            data = self._control.recv(_PACKET_BYTES)
            if not data:
                raise TemplateLost("the template ended")
            message: dict[str, Any] = json.loads(data)
            if "ended" in message:
                self._statuses[message["ended"]] = message["status"]
            if not wanted or wanted in message:
                return message

    def _end_if_idle(self) -> None:
        with self._lock:
            if not self._running and time.monotonic() - self._idle_since_s >= _LINGER_S * 0.9:
                self.end()

    def end(self) -> None:
        """End it, and its workers with it. A second call does nothing."""
        self._control.close()
        process = getattr(self, "_process", None)
        if process is not None and process.returncode is None:
            process.kill()
            process.wait()


_templates: dict[str, Template] = {}
_starting = threading.Lock()
# The kernel ends a template with the thread that started it: this one lives as long as the process.
_launcher = ThreadPoolExecutor(1, "plimsoll-template")


def template_for(preload: str) -> Template:
    """Give the template that has called this ``module:function``, started now where there is none. Raises TemplateLost.

    A fork of this process has none of its parent's.
    """
    with _starting:
        key = f"{os.getpid()} {preload}"
        template = _templates.get(key)
        if template is None or not template.alive:
            template = _templates[key] = _launcher.submit(Template, preload).result()
        return template


@atexit.register
def _end_all() -> None:
    for template in _templates.values():
        template.end()


def main() -> None:
    """Import what the workers need, and fork one for each request until the host is gone."""
    control, parent, preload = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    begin_as_child(parent)
    module, _, function = preload.partition(":")
    getattr(importlib.import_module(module), function)()
    importlib.import_module("protection.worker")
    importlib.import_module("protection.channel")
    # What is there now is never garbage: a collection in a worker would copy every page of it.
    gc.collect()
    gc.freeze()
    end = socket.socket(fileno=control)
    end.send(json.dumps({"ready": os.getpid()}).encode())
    workers: dict[int, int] = {}
    ready = select.poll()
    ready.register(end, select.POLLIN)
    while True:
        for descriptor, _ in ready.poll():
            if descriptor in workers:
                process_id = workers.pop(descriptor)
                ready.unregister(descriptor)
                os.close(descriptor)
                _, status = os.waitpid(process_id, 0)
                message = {"ended": process_id, "status": os.waitstatus_to_exitcode(status)}
            else:
                data, descriptors, _, _ = socket.recv_fds(end, _PACKET_BYTES, _MOST_DESCRIPTORS)
                if not data:
                    os._exit(0)
                process_id = _fork(json.loads(data), descriptors, [end.fileno(), *workers])
                workers[watched := os.pidfd_open(process_id)] = process_id
                ready.register(watched, select.POLLIN)
                message = {"forked": process_id}
            try:
                end.send(json.dumps(message).encode())
            except OSError:
                os._exit(0)


def _fork(request: Mapping[str, Any], descriptors: list[int], own: list[int]) -> int:
    template = os.getpid()
    with warnings.catch_warnings():
        # Python warns where a process has several threads. Those of libraries that are here sleep, and handle a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        process_id = os.fork()
    if process_id:
        for descriptor in descriptors:
            os.close(descriptor)
        return process_id
    try:
        _become_worker(request, descriptors, own, template)
    finally:
        os._exit(1)


def _become_worker(request: Mapping[str, Any], descriptors: list[int], own: list[int], template: int) -> None:
    from protection import worker

    os.setsid()
    for descriptor in own:
        os.close(descriptor)
    # To where they are not in each other's way first, and then to the numbers that they had.
    stderr, *moved = [fcntl.fcntl(each, fcntl.F_DUPFD, _ABOVE) for each in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for standard in (1, 2):
        os.dup2(stderr, standard)
    os.close(stderr)
    for number, descriptor in zip(request["descriptors"], moved, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["environment"])
    sys.argv[2:] = [str(template), *request["arguments"]]
    worker.main()
