"""What a product allows: every choice of the pipeline in one frozen object."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_type_hints

#: The recovery rungs, in the order in which they are tried.
RUNGS = ("cache_clear", "garbage_collect", "reduce_buffer", "restart_worker", "cpu_fallback", "emergency_shutdown")


#: Where inference happens: a process that the host can lose, or this one.
ENGINES = ("worker", "in_process")

#: Halved to one within the attempts of one recovery, with some left for the fallback.
_MOST_BATCH = 128


class PolicyError(ValueError):
    """A policy option does not exist or has an absurd value. The message says what was expected."""


@dataclass(frozen=True)
class Policy:
    """Choices of the pipeline. Shares are of the memory that may be used, 0.0 to 1.0."""

    #: Rungs that may be used; without ``cpu_fallback`` a product stops rather than answer slowly.
    rungs: tuple[str, ...] = RUNGS
    #: ``worker`` survives whatever kills the runtime; ``in_process`` is for embedders who want one process.
    engine: str = "worker"
    #: A worker that has not answered for so long is ended and replaced.
    infer_deadline_s: float = 10.0
    start_deadline_s: float = 30.0
    #: The same for one that gives no sign of life while it is at work.
    heartbeat_s: float = 5.0
    #: From the second loss in a row on a replacement waits so long, then twice as long, at most 5 s.
    restart_backoff_s: float = 0.1
    #: Fork workers from a process that has imported the runtime: it costs that process's memory, and a lost worker is
    #: replaced sooner (None: where the runtime is slow to import).
    fork_workers: bool | None = None
    #: Keep a loaded worker for the fallback: it costs memory, and the fallback is immediate.
    standby: bool = False
    #: End the workers after so long without work (None: never). The next audio starts them again.
    unload_after_idle_s: float | None = None
    #: Chunks computed at once at most; ``reduce_buffer`` halves it.
    max_batch: int = 16
    warning: float = 0.80
    critical: float = 0.90
    emergency: float = 0.95
    shutdown: float = 0.98
    #: Device memory has to stay below this share for ``return_after_s`` before the model goes back to the device.
    return_below: float = 0.60
    return_after_s: float = 0.3
    pressure_interval_s: float = 0.1
    #: How far below a threshold the share has to fall before its level ends.
    hysteresis: float = 0.03
    #: So many device errors in a row mean CPU mode; a success in between resets the count.
    device_errors_in_a_row: int = 3
    #: Bounds on one recovery: it ends, one way or the other.
    max_attempts: int = 12
    recovery_deadline_s: float = 30.0
    #: Successful batches after which a reduced batch may double again.
    batches_before_growth: int = 8
    #: A chunk that fails so often for a reason that is not memory, by killing its worker for instance, is set aside: a
    #: declared failure.
    attempts_per_chunk: int = 3
    shutdown_deadline_s: float = 5.0
    #: Answered audio is deleted after so long (None: kept until the spool is deleted).
    retention_s: float | None = None
    #: The spool refuses to grow beyond this (None: the disk is the limit).
    spool_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        unknown = [rung for rung in self.rungs if rung not in RUNGS]
        if unknown or len(set(self.rungs)) != len(self.rungs):
            raise PolicyError(f"rungs {list(self.rungs)}: expected some of {', '.join(RUNGS)}, each once")
        if self.engine not in ENGINES:
            raise PolicyError(f"engine is {self.engine!r}: expected one of {', '.join(ENGINES)}")
        if not isinstance(self.standby, bool):
            raise PolicyError(f"standby is {self.standby!r}: expected true or false")
        if self.fork_workers is not None and not isinstance(self.fork_workers, bool):
            raise PolicyError(f"fork_workers is {self.fork_workers!r}: expected true, false, or None")
        # The order is the ladder's, whatever order they are given in.
        object.__setattr__(self, "rungs", tuple(rung for rung in RUNGS if rung in self.rungs))
        shares = (self.return_below, self.warning, self.critical, self.emergency, self.shutdown)
        if not (shares[0] > 0 and all(a < b for a, b in pairwise(shares)) and shares[-1] <= 1):
            raise PolicyError(
                f"return_below, warning, critical, emergency, shutdown are {shares}: expected rising shares in (0, 1]"
            )
        if not 0 <= self.hysteresis < self.warning - self.return_below:
            raise PolicyError(f"hysteresis is {self.hysteresis}: expected from 0 to less than warning - return_below")
        at_least = {
            "max_batch": 1,
            "device_errors_in_a_row": 1,
            "max_attempts": 1,
            "batches_before_growth": 1,
            "attempts_per_chunk": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise PolicyError(f"{name} is {value}: expected a whole number of at least {least}")
        if self.max_batch > _MOST_BATCH:
            raise PolicyError(f"max_batch is {self.max_batch}: expected at most {_MOST_BATCH} chunks")
        seconds = (
            *("return_after_s", "pressure_interval_s", "recovery_deadline_s", "shutdown_deadline_s"),
            *("infer_deadline_s", "start_deadline_s", "heartbeat_s", "restart_backoff_s"),
        )
        for name in seconds:
            if not 0 < getattr(self, name) < 1e6:
                raise PolicyError(f"{name} is {getattr(self, name)}: expected more than 0 seconds")
        idle_s = self.unload_after_idle_s
        if idle_s is not None and not 0 < idle_s < 1e6:
            raise PolicyError(f"unload_after_idle_s is {idle_s}: expected more than 0 seconds, or None for never")
        if self.retention_s is not None and not self.retention_s >= 0:
            raise PolicyError(f"retention_s is {self.retention_s}: expected at least 0 seconds, or None to keep all")
        limit_bytes: Any = self.spool_limit_bytes
        if limit_bytes is not None and (not isinstance(limit_bytes, int) or limit_bytes < 64 << 10):
            raise PolicyError(f"spool_limit_bytes is {limit_bytes}: expected a whole number of at least 65536, or None")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Policy:
        """Make a policy from options by name. Raises PolicyError with the nearest names for one that does not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 3)
                hint = f"did you mean {', '.join(near)}?" if near else f"expected one of {', '.join(sorted(known))}"
                raise PolicyError(f"there is no policy option {name!r}: {hint}")
        hints = get_type_hints(cls)
        values = dict(options)
        for name, value in values.items():
            if hints[name] in (int, float, int | None, float | None) and (
                isinstance(value, bool) or not isinstance(value, int | float | None)
            ):
                raise PolicyError(f"policy option {name} is {value!r}: expected a number")
            if value is None and hints[name] in (int, float):
                raise PolicyError(f"policy option {name} is None: expected a number")
        if "rungs" in values:
            values["rungs"] = tuple(values["rungs"])
        return cls(**values)
