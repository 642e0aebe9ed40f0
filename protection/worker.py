"""The worker: a process that runs the model, and that its host can lose.

Started by ``protection.worker_process``, never by hand. It ends with its host: the kernel kills it (PR_SET_PDEATHSIG),
and a closed connection ends it besides. Exit statuses: 0 the host is gone or asked for the end; 70 one of its threads
failed, for want of memory for instance; 76 the host stopped reading.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.process import begin_as_child, name_thread, python_arguments

if TYPE_CHECKING:
    from backends.contract import Allocation, Backend, Model
    from protection.channel import Channel, Frame

EXIT_HOST_GONE = 0
EXIT_HOST_SILENT = 76
EXIT_THREAD_LOST = 70
_TEXT_MOST = 2000


def main() -> None:
    """Begin as a child and serve until the host is gone."""
    parent, work, side = (int(word) for word in sys.argv[2:5])
    begin_as_child(parent)
    # Whatever a library prints: the host's standard output has one reader, and it is not this.
    os.dup2(2, 1)
    from protection.channel import Channel

    channels = [Channel(socket.socket(fileno=descriptor)) for descriptor in (work, side)]
    _Worker(*channels).serve()


class _Worker:
    """Requests come in on two connections: work in order on one, questions about the device beside it on the other."""

    def __init__(self, work: Channel, side: Channel) -> None:
        self._work, self._side = work, side
        self._backend: Backend | None = None
        self._model: Model | None = None
        self._model_path = Path()
        self._held: dict[int, Allocation] = {}
        self._sending = threading.Lock()
        #: Number of the request at work, or 0.
        self._busy = 0
        self._beat_s = 1.0
        self._host_patience_s = 60.0

    def serve(self) -> None:
        for name, run in (("plimsoll-side", self._serve_side), ("plimsoll-beat", self._beat)):
            threading.Thread(target=_or_end, args=(name, run), name=name, daemon=True).start()
        # Here as well: an interpreter that ends in order, and has no memory to, may not end at all.
        _or_end("", lambda: self._serve(self._work, self._do))

    def _serve(self, channel: Channel, do: Any) -> None:
        from protection.channel import Ended, Kind, TornMessage

        while True:
            try:
                request = channel.receive(self._wait)
            except (Ended, TornMessage, OSError):
                os._exit(EXIT_HOST_GONE)
            number, work = request.number, channel is self._work
            if work:
                self._busy = number
            try:
                meta, body = do(request)
                kind = Kind.ANSWER
            except Exception as error:
                # Classified here, where its type is known; outside this block nothing of it is kept.
                kind, meta, body = Kind.FAILURE, _described(error), b""
            if work:
                self._busy = 0
            # Its features are not kept until the next request.
            del request
            try:
                self._send(channel, kind, number, meta, body)
            except (Ended, OSError):
                os._exit(EXIT_HOST_GONE)

    def _send(self, channel: Channel, kind: Any, number: int, meta: dict[str, Any], body: Any) -> None:
        if channel is self._side:
            channel.send(kind, number, meta, body, self._wait)
            return
        with self._sending:
            channel.send(kind, number, meta, body, self._wait)

    def _wait(self, end: socket.socket, write: bool) -> None:
        """Wait for the host: for its next request as long as it takes, for its reading with a limit."""
        from protection.channel import AwakeClock, until

        clock = AwakeClock()
        while not until(end, write, clock.STEP_S if write else 3600.0):
            if write and clock.read_s() > self._host_patience_s:
                os._exit(EXIT_HOST_SILENT)

    def _beat(self) -> None:
        """Say that this process lives while it is at work. A runtime that holds the interpreter stops it, rightly."""
        from protection.channel import Ended, Kind

        while True:
            time.sleep(self._beat_s)
            number = self._busy
            if number:
                try:
                    self._send(self._work, Kind.BEAT, number, {}, b"")
                except (Ended, OSError):
                    os._exit(EXIT_HOST_GONE)

    def _serve_side(self) -> None:
        self._serve(self._side, self._ask)

    # Work.

    def _do(self, request: Frame) -> tuple[dict[str, Any], Any]:
        import numpy as np

        meta = request.meta
        match meta["do"]:
            case "start":
                import backends
                from backends.faults.limits import declare_expendable

                declare_expendable()
                self._beat_s, self._host_patience_s = meta["beat_s"], meta["host_patience_s"]
                self._model_path = Path(meta["model"])
                self._backend = backends.rebuild(meta["share"])
                return {"device": self._backend.device}, b""
            case "infer":
                model = self._model or self._loaded()
                scores = model.run(np.frombuffer(request.body, np.float32).reshape(meta["shape"]))
                return {"shape": scores.shape}, np.ascontiguousarray(scores).data
            case "load":
                return self._load(), b""
            case "try":
                # The way back to a device: nothing is in use there until it was proved.
                backend = self._require_backend()
                health = backend.healthy()
                if not health.ok:
                    return {"ok": False, "oom": health.out_of_memory}, b""
                model = self._loaded()
                try:
                    model.run(np.zeros((1, model.window_frames, meta["mels"]), np.float32))
                except BaseException:
                    self._unload()
                    raise
                return {"ok": True}, b""
            case "unload":
                self._unload()
                return {"released": self._require_backend().release_cached()}, b""
            case "end":
                os._exit(EXIT_HOST_GONE)
            case other:
                raise ValueError(f"there is no work {other!r}")

    def _require_backend(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("the worker was not started: its first request has to be start")
        return self._backend

    def _loaded(self) -> Model:
        if self._model is None:
            self._model = self._require_backend().load(self._model_path)
        return self._model

    def _load(self) -> dict[str, Any]:
        model = self._loaded()
        return {
            "device": self._require_backend().device,
            "context_frames": model.window_frames - model.chunk_frames,
            "chunk_frames": model.chunk_frames,
        }

    def _unload(self) -> None:
        model, self._model = self._model, None
        if model is not None:
            model.close()

    # The device.

    def _ask(self, request: Frame) -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict

        meta, backend = request.meta, self._require_backend()
        for number in meta["unwanted"]:
            held = self._held.pop(number, None)
            if held is not None:
                held.free()
        match meta["do"]:
            case "memory":
                return asdict(backend.memory()), b""
            case "allocate":
                # The number of the request names it.
                self._held[request.number] = backend.allocate(meta["size_bytes"])
                return {}, b""
            case "free":
                return {}, b""
            case "release":
                return {"released": backend.release_cached()}, b""
            case "collect":
                return {"found": gc.collect()}, b""
            case "heap":
                from backends.host import heap_used_bytes

                return {"used_bytes": heap_used_bytes()}, b""
            case "healthy":
                return asdict(backend.healthy()), b""
            case other:
                raise ValueError(f"there is no question {other!r}")


def _or_end(name: str, run: Callable[[], None]) -> None:
    """Run a thread that this process is nothing without."""
    try:
        if name:
            name_thread(name)
        run()
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        os._exit(EXIT_THREAD_LOST)


def _described(error: Exception) -> dict[str, Any]:
    from backends.contract import BackendError
    from backends.errors import diagnose

    diagnosis = diagnose(error)
    return {
        "kind": diagnosis.kind.value,
        "shortage": None if diagnosis.shortage is None else diagnosis.shortage.value,
        "error": type(error).__name__,
        "refused": isinstance(error, BackendError),
        "text": str(error)[-_TEXT_MOST:],
    }


def boot(parent: int, work: int, side: int) -> list[str]:
    """Give the arguments after the interpreter that start a worker with this process's import path."""
    return python_arguments("protection.worker", parent, work, side)
