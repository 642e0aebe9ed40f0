"""The criteria: a named limit with a unit for each promise of each test, and what a run may set otherwise.

The promise is the sentence that the test's docstring and the README carry; a test compares the three. A TOML file
given as ``--criteria FILE`` overrides limits and parameters by test and name:

    [test_sustained_high_memory_usage]
    growth_rate = 0.5     # MB/s
    duration_s = 120
"""

from __future__ import annotations

import difflib
import math
import operator
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Criterion:
    """One promise of one test: a value passes that stands in relation ``relation`` to ``limit``."""

    test: str
    name: str
    relation: str
    limit: float
    unit: str
    promise: str

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the promise. NaN never does."""
        return _OPERATORS[self.relation](value, self.limit)

    @property
    def limit_text(self) -> str:
        """The limit as it is shown: ``< 1 MB/s``."""
        return f"{self.relation} {self.limit:g} {self.unit}".strip()


@dataclass(frozen=True)
class Parameter:
    """How hard a test tries: a number that a run may set, within bounds."""

    test: str
    name: str
    value: float
    least: float
    most: float
    meaning: str


class CriteriaError(ValueError):
    """A criteria file cannot be used. The message says where, what was found, and what was expected."""


def _for(test: str, *rows: tuple[str, str, float, str, str]) -> list[Criterion]:
    return [Criterion(test, *row) for row in rows]


#: What is promised of a disk that fails, whatever it is that fails.
_KEPT = (
    ("notifications", ">=", 1, "events", "User notified"),
    ("samples_lost", "==", 0, "samples", "Nothing acknowledged lost"),
    ("samples_different", "==", 0, "samples", "Every stored sample bit for bit"),
    ("gaps_and_overlaps", "==", 0, "places", "Results tile what was stored"),
)

#: For every test: the device's memory, in MB (1e6 bytes). The full batch of the model that ships needs a third of it.
DEVICE_LIMIT = "device_limit_mb"

_FIRST_ANSWERS = (
    ("first_answer_median", "<", 5.0, "s", "First right result after a worker's death within 5 s (median)"),
    ("first_answer_worst", "<", 30.0, "s", "First right result after a worker's death within 30 s (worst)"),
)
_KILLS = (
    ("samples_lost", "==", 0, "samples", "Nothing acknowledged lost"),
    ("samples_unexplained", "==", 0, "samples", "At most the one call in flight stored beyond"),
    ("samples_different", "==", 0, "samples", "Every stored sample bit for bit"),
    ("gaps_and_overlaps", "==", 0, "places", "Results tile what was stored"),
    ("answers_wrong", "==", 0, "answers", "Every answer right"),
    ("orphans", "==", 0, "processes", "No process left behind"),
    ("hosts_failed", "==", 0, "recordings", "No host fails by itself"),
    *_FIRST_ANSWERS,
)

#: What is promised after each point of a sweep.
_SWEPT = (
    ("scenarios_unswept", "==", 0, "scenarios", "A fault fires in every scenario"),
    ("samples_lost", "==", 0, "points", "Nothing acknowledged lost"),
    ("samples_different", "==", 0, "points", "Every stored sample bit for bit"),
    ("gaps_and_overlaps", "==", 0, "points", "Results tile what was accepted"),
    ("answers_wrong", "==", 0, "points", "Every answer that of the undisturbed run"),
    ("untold", "==", 0, "points", "User told of everything that was degraded"),
    ("hangs", "==", 0, "points", "No hang"),
    ("livelocks", "==", 0, "points", "Retries bounded"),
    ("hosts_lost", "==", 0, "points", "No disorderly death of the host"),
    ("memory_kept", "==", 0, "points", "Memory back at its baseline"),
    ("clean_runs_wrong", "==", 0, "points", "The next run right"),
    ("feeds_not_durable", "==", 0, "points", "No feed returns without a sync since its write"),
)

CRITERIA: tuple[Criterion, ...] = tuple(
    _for(
        "test_sustained_high_memory_usage",
        ("growth_rate", "<", 1.0, "MB/s", "Memory growth rate < 1 MB/s"),
        ("leak_detected", "==", 0, "leaks", "No leak detected after 60s"),
        ("stability", "<=", 10.0, "%", "Stable memory within ±10%"),
        ("answers_wrong", "==", 0, "answers", "Every answer right under load"),
    )
    + _for(
        "test_memory_allocation_stress",
        ("allocations_failed", "==", 0, "allocations", "All allocations complete"),
        ("baseline_excess", "<=", 16.0, "MB", "Memory returns to baseline (within 16 MB)"),
        ("growth_per_cycle", "<", 4.0, "kB", "Memory growth < 4 KB per cycle"),
        ("leak_detected", "==", 0, "leaks", "No leak detected from cycle to cycle"),
        ("fragmentation", "<=", 5.0, "%", "No fragmentation (largest block at most 5% smaller than at the start)"),
    )
    + _for(
        "test_continuous_recording_memory_leak",
        ("leak_detected", "==", 0, "leaks", "No leak detected"),
        ("total_growth", "<", 100.0, "MB", "Total growth < 100 MB"),
        ("crashes_and_ooms", "==", 0, "incidents", "No crash or OOM"),
        ("samples_unanswered", "==", 0, "samples", "Every sample answered"),
    )
    + _for(
        "test_gpu_to_cpu_fallback_on_oom",
        ("ooms_undetected", "==", 0, "OOMs", "OOM detected correctly"),
        ("fallbacks", ">=", 1, "fallbacks", "CPU fallback succeeds"),
        ("answers_wrong", "==", 0, "answers", "Processing continues"),
        ("notifications", ">=", 1, "events", "User notified"),
        ("first_answer", "<", 30.0, "s", "First right result within 30 s of the OOM"),
        ("real_time_factor", "<", 1.0, "s/s", "Real-time factor after the fallback < 1"),
    )
    + _for(
        "test_rapid_toggle_with_fallback",
        ("toggles_failed", "==", 0, "toggles", "All toggles complete"),
        ("transitions_missing", "==", 0, "cycles", "Every cycle goes to the CPU and back"),
        ("answers_wrong", "==", 0, "answers", "Every answer right"),
        ("memory_excess", "<=", 16.0, "MB", "Memory cleaned between toggles (within 16 MB)"),
        ("leak_detected", "==", 0, "leaks", "No leak detected from cycle to cycle"),
        ("resources_left", "==", 0, "descriptors and threads", "No resource leaks"),
    )
    + _for(
        "test_cuda_error_recovery",
        ("errors_undetected", "==", 0, "errors", "Error detected"),
        ("recoveries", ">=", 1, "recoveries", "Recovery attempted"),
        ("workers_kept", "==", 0, "errors", "A new worker after a sticky error"),
        ("device_healthy", "==", 1, "probes", "GPU returns to operational state"),
    )
    + _for(
        "test_repeated_cuda_errors",
        ("errors_unhandled", "==", 0, "errors", "All errors handled"),
        ("workers_kept", "==", 0, "errors", "A new worker after each sticky error"),
        ("cpu_mode", "==", 1, "fallbacks", "CPU mode after three errors in a row"),
        ("device_healthy", "==", 1, "probes", "GPU remains available"),
        ("answers_wrong", "==", 0, "answers", "No permanent damage"),
    )
    + _for(
        "test_emergency_shutdown_trigger",
        ("pressure_at_shutdown", ">", 98.0, "%", "Shutdown triggered at threshold (above 98%)"),
        ("left_behind", "==", 0, "processes, files and locks", "Resources cleaned up"),
        ("exit_status", "==", 75, "", "Clean process exit (status 75)"),
    )
    + _for(
        "test_data_preservation_on_shutdown",
        ("samples_unsaved", "==", 0, "samples", "All buffered audio saved"),
        ("samples_different", "==", 0, "samples", "No sample loss"),
        ("samples_unanswered", "==", 0, "samples", "Recovery possible"),
    )
    + _for(
        "test_oom_detection",
        ("ooms_undetected", "==", 0, "OOMs", "OOM detected on impossible allocation"),
        ("errors_misclassified", "==", 0, "errors", "Appropriate error raised"),
        ("ooms_uncounted", "==", 0, "OOMs", "Counter incremented"),
    )
    + _for(
        "test_oom_notification_system",
        ("ooms_untold", "==", 0, "OOMs", "User notified of every OOM"),
        (
            "notifications_incomplete",
            "==",
            0,
            "events",
            "Each notification says what happened, what was done, what it means",
        ),
        ("notification_delay", "<", 1.0, "s", "Notified within 1 s of the OOM"),
    )
    + _for(
        "test_progressive_recovery_strategies",
        ("out_of_order", "==", 0, "strategies", "Strategies tried in order"),
        ("not_needed", "==", 0, "strategies", "Each further strategy needed once"),
        ("unrecovered", "==", 0, "OOMs", "Recovery succeeds"),
        ("answers_wrong", "==", 0, "answers", "System operational"),
    )
    + _for(
        "test_buffer_reduction_on_pressure",
        ("reductions", ">=", 1, "reductions", "Buffer reduced at 90% pressure"),
        ("fallbacks", "==", 0, "fallbacks", "No fallback while a smaller buffer is enough"),
        ("ooms", "==", 0, "OOMs", "No OOM on the way"),
        ("answers_wrong", "==", 0, "answers", "Processing continues"),
    )
    + _for(
        "test_cpu_fallback_activation",
        ("fallbacks", ">=", 1, "fallbacks", "CPU fallback at 95% pressure"),
        ("returns", ">=", 1, "returns", "Back on the device when the pressure is over"),
        ("answers_wrong", "==", 0, "answers", "Processing continues"),
    )
    + _for(
        "test_audio_buffer_preservation",
        ("samples_lost", "==", 0, "samples", "All samples saved"),
        ("samples_unanswered", "==", 0, "samples", "No data loss"),
        ("samples_different", "==", 0, "samples", "Audio quality maintained (bit for bit)"),
    )
    + _for(
        "test_transcription_state_preservation",
        ("gaps", "==", 0, "gaps", "No gap after resume"),
        ("overlaps", "==", 0, "overlaps", "No duplicate after resume"),
        ("answers_wrong", "==", 0, "answers", "Answers as without the interruption"),
    )
    + _for("test_kill_during_recording", *_KILLS)
    + _for("test_kill_during_recording_soak", *_KILLS)
    + _for(
        "test_worker_hang",
        ("hangs_undetected", "==", 0, "hangs", "Hang detected"),
        ("notifications", ">=", 1, "events", "User notified"),
        ("first_answer", "<", 30.0, "s", "First right result within 30 s of the hang"),
        ("answers_wrong", "==", 0, "answers", "Every answer right"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was accepted"),
    )
    + _for(
        "test_suspend_and_resume",
        ("workers_replaced", "==", 0, "workers", "No worker replaced for having slept with its host"),
        ("sleepers_undetected", "==", 0, "workers", "A worker that alone does not wake up is replaced"),
        ("samples_lost", "==", 0, "samples", "Nothing acknowledged lost"),
        ("answers_wrong", "==", 0, "answers", "Every answer right"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was accepted"),
    )
    + _for(
        "test_oom_killer",
        ("workers_spared", "==", 0, "workers", "The worker dies each time"),
        ("host_deaths", "==", 0, "processes", "The host never dies"),
        ("samples_lost", "==", 0, "samples", "Nothing acknowledged lost"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was stored"),
        ("answers_wrong", "==", 0, "answers", "Every answer right"),
        *_FIRST_ANSWERS,
    )
    + _for(
        "test_poison_chunk",
        ("not_poisoned", "==", 0, "chunks", "Only the answer about the poisoned audio set aside"),
        ("samples_different", "==", 0, "samples", "Its audio kept, bit for bit"),
        ("answers_wrong", "==", 0, "answers", "Everything else answered, and right"),
        ("notifications", ">=", 1, "events", "User notified"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was accepted"),
    )
    + _for(
        "test_library_missing_at_first_inference",
        ("answers_wrong", "==", 0, "answers", "Every sample answered, by the fallback"),
        ("set_aside", "==", 0, "chunks", "Nothing set aside"),
        ("notifications", ">=", 1, "events", "User notified"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was accepted"),
    )
    + _for(
        "test_consecutive_oom_recovery",
        ("ooms_undetected", "==", 0, "OOMs", "All OOMs detected"),
        ("recoveries_missing", "==", 0, "recoveries", "Recovery attempted for each"),
        ("cpu_mode", "==", 1, "fallbacks", "Eventually falls back to CPU"),
    )
    + _for(
        "test_oom_during_recovery",
        ("attempts", "<=", 12, "attempts", "Attempts bounded (at most 12)"),
        ("recovery_time", "<", 30.0, "s", "No livelock (an end within 30 s)"),
        ("exit_status", "==", 75, "", "Orderly end when even the fallback finds no memory (status 75)"),
        ("samples_lost", "==", 0, "samples", "Nothing accepted lost"),
    )
    + _for(
        "test_recovery_success_rate",
        ("success_rate", ">=", 95.0, "%", "Recovery success rate >= 95%"),
        ("recovery_time", "<", 5.0, "s", "Slowest recovery < 5 s"),
        ("miscounted", "==", 0, "counts", "Metrics agree with the faults that fired"),
    )
    + _for(
        "test_full_disk_while_recording",
        ("refusals", ">=", 1, "feeds", "Feeding refused while the disk is full"),
        ("refusals_unclear", "==", 0, "refusals", "Each refusal says that the disk is full"),
        *_KEPT,
        ("samples_missing", "==", 0, "samples", "Recording goes on once there is room"),
        ("exit_status", "==", 0, "", "Process lives to its orderly end (status 0)"),
    )
    + _for(
        "test_file_size_limit_while_recording",
        ("refusals", ">=", 1, "feeds", "Feeding refused while the limit is there"),
        ("refusals_unclear", "==", 0, "refusals", "Each refusal names the file-size limit"),
        *_KEPT,
        ("samples_missing", "==", 0, "samples", "Recording goes on once the limit is raised"),
        ("exit_status", "==", 0, "", "Process lives to its orderly end (status 0)"),
    )
    + _for(
        "test_read_only_remount_while_recording",
        ("refusals", ">=", 1, "feeds", "Feeding refused while the file system is read-only"),
        ("refusals_unclear", "==", 0, "refusals", "Each refusal says that it is read-only"),
        *_KEPT,
        ("samples_missing", "==", 0, "samples", "Recording goes on after the repair"),
        ("exit_status", "==", 0, "", "Process lives to its orderly end (status 0)"),
    )
    + _for("test_fault_sweep_sample", *_SWEPT)
    + _for("test_fault_sweep", *_SWEPT)
    + _for("test_device_fault_sweep", *_SWEPT)
)

#: What the criteria are about: each test belongs to one group, and the groups are the columns of a report's matrix.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "memory stress": (
        "test_sustained_high_memory_usage",
        "test_memory_allocation_stress",
        "test_continuous_recording_memory_leak",
    ),
    "fallback": ("test_gpu_to_cpu_fallback_on_oom", "test_rapid_toggle_with_fallback"),
    "CUDA errors": ("test_cuda_error_recovery", "test_repeated_cuda_errors"),
    "emergency shutdown": ("test_emergency_shutdown_trigger", "test_data_preservation_on_shutdown"),
    "detection": ("test_oom_detection", "test_oom_notification_system"),
    "degradation": (
        "test_progressive_recovery_strategies",
        "test_buffer_reduction_on_pressure",
        "test_cpu_fallback_activation",
    ),
    "data preservation": ("test_audio_buffer_preservation", "test_transcription_state_preservation"),
    "process loss": (
        "test_kill_during_recording",
        "test_kill_during_recording_soak",
        "test_worker_hang",
        "test_suspend_and_resume",
        "test_oom_killer",
        "test_poison_chunk",
        "test_library_missing_at_first_inference",
    ),
    "repeated OOMs": ("test_consecutive_oom_recovery", "test_oom_during_recovery"),
    "metrics": ("test_recovery_success_rate",),
    "storage": (
        "test_full_disk_while_recording",
        "test_file_size_limit_while_recording",
        "test_read_only_remount_while_recording",
    ),
    "sweep": ("test_fault_sweep_sample", "test_fault_sweep", "test_device_fault_sweep"),
}
#: Which tests are run when; what is named in none is quick.
QUICK = "quick"
SLOW_PROFILES: Mapping[str, tuple[str, ...]] = {
    "soak": ("test_continuous_recording_memory_leak", "test_kill_during_recording_soak"),
    "sweep": ("test_fault_sweep", "test_device_fault_sweep"),
}
PROFILES = (QUICK, *SLOW_PROFILES)
#: The capabilities of a backend that a test needs: without one it cannot be run. The same as its marks.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "test_cuda_error_recovery": ("device_error",),
    "test_repeated_cuda_errors": ("device_error",),
    "test_worker_hang": ("runtime_crash",),
    "test_poison_chunk": ("runtime_crash",),
    "test_library_missing_at_first_inference": ("runtime_crash",),
    "test_device_fault_sweep": ("device_allocation_faults",),
}
#: The criteria that say how long a recovery takes, in seconds.
RECOVERY_TIMES = ("first_answer", "first_answer_median", "first_answer_worst", "recovery_time", "notification_delay")


def profile_of(test: str) -> str:
    """Say which profile a test belongs to."""
    return next((profile for profile, tests in SLOW_PROFILES.items() if test in tests), QUICK)


def group_of(test: str) -> str | None:
    """Say which group a test belongs to; None for one that is not of the qualification, such as the stress harness."""
    return next((group for group, tests in GROUPS.items() if test in tests), None)


_ANY_TEST = "every_test"
PARAMETERS: tuple[Parameter, ...] = (
    Parameter(_ANY_TEST, DEVICE_LIMIT, 100, 16, 1e6, "device memory that the subject may use, MB"),
    Parameter("test_sustained_high_memory_usage", "duration_s", 60, 15, 86_400, "how long"),
    Parameter("test_sustained_high_memory_usage", "held_mb", 500, 1, 1e6, "device memory held and worked on, MB"),
    Parameter("test_memory_allocation_stress", "cycles", 100, 96, 1e6, "allocations, each freed again"),
    Parameter("test_memory_allocation_stress", "block_mb", 50, 1, 1e6, "size of each, MB"),
    Parameter("test_continuous_recording_memory_leak", "duration_s", 3600, 60, 864_000, "how long"),
    Parameter("test_continuous_recording_memory_leak", "seed", 11, 0, 2**31, "seed of the lengths of what is spoken"),
    Parameter("test_rapid_toggle_with_fallback", "cycles", 50, 24, 1e5, "toggles, each with a fallback"),
    Parameter("test_kill_during_recording", "kills", 10, 1, 1e5, "kills of worker or host at random moments"),
    Parameter("test_kill_during_recording", "seed", 6, 0, 2**31, "seed of the random moments"),
    Parameter("test_kill_during_recording_soak", "kills", 1000, 1, 1e6, "kills of worker or host at random moments"),
    Parameter("test_kill_during_recording_soak", "seed", 2, 0, 2**31, "seed of the random moments"),
    Parameter("test_oom_killer", "kills", 20, 1, 1e4, "kills by the OOM killer"),
    *(
        Parameter(test, *row)
        for test in ("test_fault_sweep_sample", "test_fault_sweep", "test_device_fault_sweep")
        for row in (
            (DEVICE_LIMIT, 12, 12, 1e6, "device memory that the subject may use, MB"),
            ("seed", 5, 0, 2**31, "seed of the order of the points"),
            (
                "jobs",
                3 if test != "test_fault_sweep_sample" else 2,
                1,
                64,
                "processes that try points at the same time",
            ),
        )
    ),
    Parameter("test_consecutive_oom_recovery", "ooms", 5, 1, 1e4, "out-of-memory errors, one after another"),
    Parameter("test_recovery_success_rate", "ooms", 12, 1, 1e4, "out-of-memory errors, of every kind in turn"),
)


class Criteria:
    """The criteria and parameters of one run."""

    def __init__(
        self,
        criteria: Iterable[Criterion] = CRITERIA,
        parameters: Iterable[Parameter] = PARAMETERS,
        source: str = "defaults",
    ) -> None:
        """Take the defaults, or what a file made of them; ``source`` is shown in the header."""
        self._criteria = {(each.test, each.name): each for each in criteria}
        self._parameters = {(each.test, each.name): each for each in parameters}
        self.source = source
        self.overridden: dict[str, float] = {}

    def of(self, test: str) -> list[Criterion]:
        """Give the criteria of a test, in order."""
        return [each for each in self._criteria.values() if each.test == test]

    def parameter(self, test: str, name: str) -> float:
        """Give a parameter of a test, or of every test. Raises KeyError for one that is not declared."""
        found = self._parameters.get((test, name)) or self._parameters[_ANY_TEST, name]
        return found.value

    def duration_s(self, test: str) -> float | None:
        """Give how long a test lasts, for one that is told."""
        found = self._parameters.get((test, "duration_s"))
        return found.value if found else None

    @classmethod
    def load(cls, path: Path) -> Criteria:
        """Read overrides from a TOML file. Raises CriteriaError with the nearest names for what does not exist."""
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CriteriaError(f"the criteria file {path} cannot be read: {error}") from error
        made = cls(source=str(path))
        tests = sorted({test for test, _ in [*made._criteria, *made._parameters]})
        for test, table in tables.items():
            if test not in tests:
                raise CriteriaError(f"{path}: there is no test {test!r}: {nearest(test, tests)}")
            if not isinstance(table, dict):
                raise CriteriaError(f"{path}: {test} is {table!r}: expected a table [{test}] of names and numbers")
            for name, value in table.items():
                made._override(path, test, name, value)
        return made

    def _override(self, path: Path, test: str, name: str, value: object) -> None:
        key = (test, name)
        where = f"{path}: {test}.{name}"
        names = sorted(n for t, n in [*self._criteria, *self._parameters] if t == test)
        if name not in names:
            raise CriteriaError(f"{path}: {test} has no criterion or parameter {name!r}: {nearest(name, names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CriteriaError(f"{where} is {value!r}: expected a finite number")
        if key in self._criteria:
            if value < 0:
                raise CriteriaError(f"{where} is {value}: expected a limit of at least 0 {self._criteria[key].unit}")
            self._criteria[key] = replace(self._criteria[key], limit=float(value))
        else:
            parameter = self._parameters[key]
            if not parameter.least <= value <= parameter.most:
                raise CriteriaError(
                    f"{where} is {value}: expected from {parameter.least:g} to {parameter.most:g} ({parameter.meaning})"
                )
            self._parameters[key] = replace(parameter, value=float(value))
        self.overridden[f"{test}.{name}"] = float(value)


def nearest(name: str, names: Sequence[str]) -> str:
    """Say which of some names was meant, or all of them where none is near."""
    near = difflib.get_close_matches(name, names, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"
