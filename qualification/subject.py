"""The subject protocol: all that the qualification knows of the application under test.

A subject takes *blocks* of a stream and gives *results* about ranges of it. For audio a position is a sample; for
anything else (pages, requests) item k covers [k, k + 1).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from backends.contract import Backend

#: The subject that ships, unless ``--subject`` names another.
DEFAULT_SUBJECT = "protection.pipeline:factory"

#: What a user can be told: the closed set of event kinds. The rungs of the ladder are kinds themselves, so that
#: the order in which they were tried can be seen from outside.
EVENT_KINDS = frozenset(
    {
        "oom_detected",
        "device_error",
        "worker_lost",
        "cache_clear",
        "garbage_collect",
        "reduce_buffer",
        "restart_worker",
        "cpu_fallback",
        "emergency_shutdown",
        "recovered",
        "returned_to_device",
        "pressure_warning",
        "pressure_critical",
        "pressure_emergency",
        "pressure_normal",
        "storage_failed",
        "chunk_set_aside",
    }
)
#: The recovery strategies, in the order in which a subject has to try them.
STRATEGIES = (
    "cache_clear",
    "garbage_collect",
    "reduce_buffer",
    "restart_worker",
    "cpu_fallback",
    "emergency_shutdown",
)

#: Names in ``metrics()`` that the tests read.
METRIC_OOMS = "oom_total"
METRIC_DEVICE_ERRORS = "device_errors_total"
METRIC_RECOVERIES_ATTEMPTED = "recoveries_attempted"
METRIC_RECOVERIES_SUCCEEDED = "recoveries_succeeded"
METRIC_RECOVERY_LATENCY_MAX = "recovery_latency_max_s"


class Event(Protocol):
    """What the user was told: what happened, what was done about it, and what it means for them."""

    @property
    def kind(self) -> str:
        """One of EVENT_KINDS."""

    @property
    def time_s(self) -> float:
        """When, in seconds since the epoch."""

    @property
    def message(self) -> str:
        """What happened."""

    @property
    def action(self) -> str:
        """What was done."""

    @property
    def meaning(self) -> str:
        """What it means for the user."""


class Result(Protocol):
    """The answer for positions [start, stop). An output of None declares a failure: it tiles, but answers nothing."""

    @property
    def start(self) -> int:
        """First position answered for."""

    @property
    def stop(self) -> int:
        """First position after those answered for."""

    @property
    def output(self) -> Any:
        """What the application made of it."""

    @property
    def device(self) -> str:
        """Where it was made."""

    @property
    def degraded(self) -> bool:
        """Whether it was made by a fallback."""


class Subject(Protocol):
    """The application under qualification. Tests use nothing else of it.

    Optional, and named as not run where absent: ``quiesce()`` for drained samples, ``equivalent(a, b)`` for outputs,
    ``recovered()`` for what a user could get back by hand (float32 [samples] from position 0). Optional too:
    ``workers_heap_bytes()``, what its other processes have taken from their heaps and not freed; it may raise while
    that cannot be read. Without it, what is known of them is what the system says.
    """

    def feed(self, start: int, block: Any) -> int:
        """Take a block; idempotent by position. Everything before the returned position is durably accepted."""

    def drain(self, timeout_s: float) -> None:
        """Wait until every accepted position is answered. Raises TimeoutError."""

    def results(self) -> Sequence[Result]:
        """Give every result so far, by position."""

    def toggle(self) -> bool:
        """Stop or start recording; return whether it records now."""

    def device(self) -> str:
        """Say where the next result would be made."""

    def process_ids(self) -> Sequence[int]:
        """Give its own process and its workers."""

    def events(self) -> Sequence[Event]:
        """Give what the user was told, in order."""

    def metrics(self) -> Mapping[str, float]:
        """Give counters and latencies."""

    def shutdown(self, reason: str) -> None:
        """End in order, within the policy's deadline."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class SubjectContext:
    """What a subject is made with. A ``workdir`` with unfinished work in it means: resume."""

    workdir: Path
    backend: Backend | None
    device: str
    model_path: Path
    limits: Mapping[str, int] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)


Factory = Callable[[SubjectContext], Subject]


class SubjectError(ValueError):
    """``--subject`` does not name a usable factory. The message says why, and what was expected."""


def absolute(spec: str) -> str:
    """Give a factory's name so that it is found from any folder: the path of a file is made absolute."""
    module_name, _, name = spec.rpartition(":")
    return f"{Path(module_name).resolve()}:{name}" if module_name.endswith(".py") else spec


def load_factory(spec: str) -> Factory:
    """Find a factory by ``package.module:name`` or ``path/to/file.py:name``. Raises SubjectError."""
    expected = "expected package.module:factory or path/to/file.py:factory"
    if spec.startswith("cmd:"):
        raise SubjectError(f"--subject {spec}: programs behind a command line are not supported yet; {expected}")
    module_name, colon, name = spec.rpartition(":")
    if not colon or not module_name or not name.isidentifier():
        raise SubjectError(f"--subject {spec}: {expected}")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name).resolve()
            if not path.is_file():
                raise SubjectError(f"--subject {spec}: there is no file {path}; {expected}")
            alias = f"plimsoll_subject_{path.stem}"
            loader_spec = importlib.util.spec_from_file_location(alias, path)
            if loader_spec is None or loader_spec.loader is None:
                raise SubjectError(f"--subject {spec}: {path} cannot be imported; {expected}")
            module = importlib.util.module_from_spec(loader_spec)
            sys.modules[alias] = module
            loader_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except SubjectError:
        raise
    except Exception as error:
        raise SubjectError(
            f"--subject {spec}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        there = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))[:8])
        raise SubjectError(f"--subject {spec}: {module_name} has no callable {name!r}; it has: {there or 'none'}")
    return cast("Factory", factory)
