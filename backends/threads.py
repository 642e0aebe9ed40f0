"""Threads that begin or fail to: where memory is short, Python's own may do neither.

``threading.Thread.start`` waits, without limit, for a thread that had no memory to begin and is gone.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from backends.process import name_thread

T = TypeVar("T")
#: One that is there, and waits for a processor.
_PATIENCE_S = 20.0
_LOOK_EVERY_S = 0.05


class _Begun(threading.Event):
    """Set once a thread does what it is for; whoever waits for one that is gone gets MemoryError."""

    def __init__(self, before: set[str]) -> None:
        super().__init__()
        self._before, self._begun, self._over = before, False, threading.Lock()
        self._over.acquire()

    def set(self) -> None:
        """Do nothing: Python says so while the thread may still end for want of memory."""

    def begin(self) -> None:
        """Be set. Takes no memory."""
        self._begun = True
        self._over.release()

    def is_set(self) -> bool:
        return self._begun

    def wait(self, timeout: float | None = None) -> bool:
        for _ in range(int((timeout or _PATIENCE_S) / _LOOK_EVERY_S)):
            if self._begun or self._over.acquire(timeout=_LOOK_EVERY_S):
                return True
            if not _tasks() - self._before:
                break
        if self._begun:
            return True
        raise MemoryError("a thread had no memory to begin")


def _tasks() -> set[str]:
    """Give the threads of this process as the kernel numbers them. Raises MemoryError, or OSError."""
    try:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        raise


class Thread(threading.Thread):
    """A daemon thread whose ``start`` raises MemoryError where it had no memory to begin."""

    def __init__(self, target: Callable[[], object], name: str) -> None:
        """Have ``start`` run ``target``, known to the kernel by this name too."""
        super().__init__(name=name, daemon=True)
        self._act = target
        self._claim = threading.Lock()

    def start(self) -> None:
        """Begin, or raise and never begin.

        Raises MemoryError, RuntimeError where there may be no more threads, or OSError without a descriptor.
        """
        # What start waits for, under this name in every version so far.
        self._started = begun = _Begun(_tasks())
        try:
            super().start()
        except (MemoryError, OSError, RuntimeError):
            if self._claim.acquire(blocking=False):
                # Python keeps a thread that did not begin: not what it was for, too.
                del self._act
                with contextlib.suppress(AttributeError):
                    threading._limbo.pop(self, None)  # type: ignore[attr-defined]  # where it keeps it
                raise
            # It is there all the same: only looking for it failed.
            begun.wait()

    def run(self) -> None:
        """Do what it is for."""
        name_thread(self.name)
        if self._claim.acquire(blocking=False):
            self._started.begin()
            self._act()


class _Task(Generic[T]):
    """Something to do, and what came of it. Nothing here needs memory once it was made."""

    def __init__(self, act: Callable[[], T]) -> None:
        self.act = act
        self.result: T | None = None
        self.error: BaseException | None = None
        self.over = threading.Lock()
        self.over.acquire()


class OneThread:
    """A thread that does what it is given, one thing after another. It begins with the first, and lives until closed.

    The kernel ends a child with the thread that started it: what has to outlive its starter is started here.
    """

    def __init__(self, name: str) -> None:
        """Name the thread; nothing is started yet."""
        self._name = name
        self._tasks: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        self._thread: Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def do(self, act: Callable[[], T]) -> T:
        """Have it done there, and give the result. Raises what it raises, or MemoryError without a thread."""
        task = _Task(act)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the thread {self._name} was closed: it does no more")
            if self._thread is None:
                thread = Thread(self._serve, self._name)
                thread.start()
                self._thread = thread
            # Before it can be closed: else nobody would do it.
            self._tasks.put(task)
        task.over.acquire()
        if task.error is not None:
            try:
                raise task.error
            finally:
                # Its frames hold this one: a cycle that would keep what failed.
                del task
        return cast("T", task.result)

    def do_last(self, act: Callable[[], object]) -> None:
        """Have it do this, and end then; nobody waits for it, and what it raises is lost. ``do`` comes before."""
        with self._lock:
            self._thread = None
            self._tasks.put(_Task(act))
            self._tasks.put(None)

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            # In this frame: another might not be had, and whoever waits has to be told all the same.
            try:
                task.result = task.act()
            except BaseException as error:
                task.error = error
            finally:
                task.over.release()
            # Kept, it would keep what it gave until the next comes.
            del task

    def close(self) -> None:
        """End the thread once it has done what it was given. A second call does nothing."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
            if thread is not None:
                self._tasks.put(None)
        if thread is not None:
            thread.join()
