"""One qualification: what is judged, on what, against which criteria, and where it is written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import backends
from backends.contract import Backend, BackendError
from backends.faults.cuda import ALLOW_DEVICE_FAULTS, DriverError, NoDriver
from qualification import __version__, gpu, identity
from qualification.audio import AudioError, load_wav
from qualification.criteria import CRITERIA, PROFILES, Criteria, CriteriaError, profile_of
from qualification.lock import DeviceLock, LockBusy
from qualification.platform_check import disk_refusal, refusal
from qualification.records import OUTCOMES, VERDICTS, RecordError, RecordWriter, cut_off, name_of, now
from qualification.subject import Subject, SubjectContext, SubjectError, load_factory

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_AUDIO = ROOT / "tests" / "data" / "speech.wav"
DEFAULT_RESULTS = ROOT / "results"
#: What the sweep runs unless a model is named: the ends of the acoustic model, and no layer between them. A load of it
#: makes a quarter of the allocations, and each of them is swept.
SWEEP_MODEL = ROOT / "tests" / "data" / "small.onnx"
SUMMARY_VERSION = 1
_SUMMARISED = ("test", "criterion", "value", "relation", "limit", "unit", "provenance", "reason")
#: The matrix sets it to the name of the environment that is installed.
_ENVIRONMENT = "PLIMSOLL_ENVIRONMENT"


class Refused(ValueError):
    """A run cannot begin. The message says why, and what was expected."""


@dataclass
class Run:
    """Everything that a run was given, checked."""

    backend: type[Backend]
    #: The device's name, and the card behind it where that is one.
    device: str
    card: gpu.Card | None
    environment: str
    runtime: str
    subject_spec: str
    factory: Callable[[SubjectContext], Subject]
    model: Path
    audio: Path
    samples: Any
    criteria: Criteria
    #: Whether a card may be exhausted that others use as well.
    allow_shared_gpu: bool = False
    lock: DeviceLock | None = None
    records: RecordWriter | None = None
    tests: list[str] = field(default_factory=list)
    #: Said at the end of the run.
    notes: list[str] = field(default_factory=list)
    #: How many criteria got which verdict, and how many tests ended how.
    verdicts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Those that failed, as they were written, without their series.
    failed: list[dict[str, Any]] = field(default_factory=list)
    began: str = ""
    #: Criteria that were not run, though the backend can.
    left_out: int = 0
    #: Whether of the sweep only a share or a point is tried.
    only_part: bool = False
    #: What it is, where it is none of the profiles: the stress harness.
    own_profile: str = ""

    def header(self) -> list[str]:
        """Say what is being qualified."""
        seconds = len(self.samples) / 16_000
        changed = ", ".join(f"{name} = {value:g}" for name, value in self.criteria.overridden.items())
        return [
            f"plimsoll {__version__}: qualifying {self.subject_spec}",
            f"  on backend {self.backend.name} in environment {self.environment} ({self.runtime}, "
            f"Python {platform.python_version()})",
            *self._about_the_card(),
            f"  model {self.model.name} (sha256 {_digest(self.model)[:12]}), audio {self.audio.name} "
            f"({seconds:.1f} s, sha256 {_digest(self.audio)[:12]})",
            f"  criteria: {self.criteria.source}" + (f" with {changed}" if changed else ""),
            f"  records: {self.records.path if self.records else 'none'}",
        ]

    def _about_the_card(self) -> list[str]:
        card = self.card
        if card is None:
            return []
        driver = f"driver {card.driver or 'unknown'} for CUDA {card.driver_cuda}"
        line = f"  device {self.device}: {card.name}, {card.total_bytes / 1e9:.1f} GB, {driver}, {card.uuid}"
        return [line, *([f"  not all of it can be read: {card.message}"] if card.message else [])]

    def new_backend(self) -> Backend:
        """Make the backend on the device that is qualified. Raises BackendError."""
        return self.backend(self.device)

    def take_device(self, wait_s: float, say: Callable[[str], None] | None = None) -> None:
        """Have the device to ourselves, queueing at most ``wait_s`` seconds, and saying so; load the model once.

        Raises Refused: another qualification or other programs use it, or the model does not load.
        """
        try:
            self.lock = DeviceLock(self.card.uuid if self.card else self.backend.name, wait_s, say=say)
        except LockBusy as error:
            raise Refused(str(error)) from error
        # Behind the lock, so that another qualification is waited for; and before a process of ours has the card.
        if self.card and (shared := gpu.refuse_shared(self.card.uuid, self.allow_shared_gpu)):
            raise Refused(shared)
        self._try_model()

    def _try_model(self) -> None:
        """A model that does not load is refused now, and not a failure of every test."""
        try:
            with contextlib.closing(self.new_backend()) as backend:
                backend.load(self.model).close()
        except Exception as error:
            raise Refused(f"--model {self.model}: {error}") from error

    def begin_records(self, folder: Path, *, resumes: bool = False, **more: Any) -> Path:
        """Write the first line of the records, with ``more`` in it; give their file. Raises Refused.

        With ``resumes`` it names the records of the runs that were cut off, and that this one goes on with.
        """
        path = folder / name_of(self.environment, self.backend.name)
        self.began = now()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            about = {**self._about(), **more}
            self.only_part = about.get("point") is not None or about.get("shard", [1, 1])[1] > 1
            about["resumes"] = cut_off(folder, about, self.tests) if resumes else []
            self.records = RecordWriter(path, about)
        except (OSError, RecordError) as error:
            raise Refused(f"--results {folder}: the records cannot be written: {error}") from error
        return path

    def write(self, **fields: Any) -> None:
        """Write a criterion's verdict to the records."""
        self.verdicts[fields["verdict"]] += 1
        self.left_out += fields["verdict"] == "not_run" and not fields["capability"]
        if fields["verdict"] == "fail":
            self.failed.append({name: fields[name] for name in _SUMMARISED})
        if self.records is not None:
            self.records.criterion(backend=self.backend.name, environment=self.environment, **fields)

    def write_sweep(self, **fields: Any) -> None:
        """Write what became of a sweep's points to the records."""
        if self.records is not None:
            self.records.sweep(backend=self.backend.name, environment=self.environment, **fields)

    def write_test(self, **fields: Any) -> None:
        """Write how a test ended to the records."""
        self.outcomes[fields["outcome"]] += 1
        if self.records is not None:
            self.records.test(backend=self.backend.name, environment=self.environment, **fields)

    def end_records(self) -> None:
        """Write the last line; a run that was cut off has none, and counts as damaged."""
        if self.records is not None:
            self.records.close()

    def summary(self, exit_status: int) -> dict[str, Any]:
        """Say how the run ended, for other tools: what was qualified where, and what became of it.

        It is a pass only where a whole profile was run, and nothing was left out but what the backend cannot.
        """
        ended, collected = self.outcomes, len(self.tests)
        profiles = self._profiles()
        if exit_status or self.failed or ended["failed"]:
            verdict, reason = "fail", f"{ended['failed']} tests failed, exit status {exit_status}"
        elif ended.total() < collected:
            verdict, reason = "fail", f"{ended.total()} of {collected} tests came to their end"
        elif not profiles:
            verdict, reason = "not_run", f"{collected} tests: no whole profile ({', '.join(PROFILES)})"
        elif self.criteria.overridden:
            verdict, reason = "not_run", f"{', '.join(self.criteria.overridden)} set otherwise than by default"
        elif self.left_out:
            verdict, reason = "not_run", f"{self.left_out} criteria were not run"
        else:
            verdict, reason = "pass", ""
        return {
            "schema_version": SUMMARY_VERSION,
            "kind": "run",
            "began": self.began,
            "finished": now(),
            "verdict": verdict,
            "reason": reason,
            "exit_status": exit_status,
            "profiles": profiles,
            "overridden": self.criteria.overridden,
            **self.identity(),
            "machine": identity.machine(),
            "record": str(self.records.path.resolve()) if self.records else None,
            "tests": {"collected": collected, **{each: ended[each] for each in OUTCOMES}},
            "criteria": {each: self.verdicts[each] for each in VERDICTS},
            "failed": self.failed,
        }

    def _profiles(self) -> list[str]:
        """Name the profiles of which every test was collected, and whole."""
        if self.own_profile or self.only_part:
            return [self.own_profile] if self.own_profile else []
        there = {each.rpartition("::")[2].partition("[")[0] for each in self.tests}
        tests: dict[str, set[str]] = {}
        for each in CRITERIA:
            tests.setdefault(profile_of(each.test), set()).add(each.test)
        return [profile for profile in PROFILES if tests[profile] <= there]

    def release_lock(self) -> None:
        """Let the next run in."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @functools.cached_property
    def _subject(self) -> dict[str, Any]:
        # As it was when the run began, whatever is edited meanwhile; and it hashes sources and asks git.
        return identity.subject(self.factory)

    def identity(self) -> dict[str, Any]:
        """Give what has to be the same for two runs to be parts of one."""
        return {
            **identity.suite(),
            "subject": self.subject_spec,
            **self._subject,
            "backend": self.backend.name,
            "device": {"name": self.device, "card": asdict(self.card) if self.card else None},
            "environment": self.environment,
            "runtime": self.runtime,
        }

    def resume_key(self) -> dict[str, Any]:
        """Give what has to be the same for a run to go on where another was cut off: all that its verdicts rest on."""
        return {
            **self.identity(),
            "python": platform.python_version(),
            "sources_sha256": _sources_digest(self.factory),
            "model_sha256": _digest(self.model),
            "audio_sha256": _digest(self.audio),
            "overridden": self.criteria.overridden,
        }

    def _about(self) -> dict[str, Any]:
        pins = ROOT / "constraints" / f"{self.environment}.txt"
        gpus, no_gpus = gpu.machine_gpus()
        return {
            **self.identity(),
            "machine": {
                **identity.machine(),
                "gpus": gpus,
                "gpus_unread": no_gpus or None,
            },
            "driver": next((each["driver"] for each in gpus), None),
            "allowed": {"shared_gpu": self.allow_shared_gpu, "device_faults": device_faults_allowed()},
            "versions": _versions(),
            "pins_sha256": _digest(pins) if pins.is_file() else None,
            "model_sha256": _digest(self.model),
            "audio_sha256": _digest(self.audio),
            "criteria": {"source": self.criteria.source, "overridden": self.criteria.overridden},
            "cannot": {each.value: its.reason for each, its in self.backend.capabilities.items() if not its.yes},
            "collected": self.tests,
            "began": self.began,
        }


def prepare(
    *,
    backend: str | None,
    device: str | None,
    subject: str,
    model: Path,
    audio: Path,
    criteria: Path | None = None,
    allow_shared_gpu: bool = False,
) -> Run:
    """Check everything that was given, before anything runs; the device is not touched. Raises Refused."""
    refused = refusal() or disk_refusal(ROOT)
    if refused:
        raise Refused(refused)
    chosen, runtime = _choose_backend(backend)
    needs = _environment_of(chosen)
    its_device, card = _choose_device(chosen, device, needs.cuda is not None)
    if not model.is_file():
        raise Refused(f"--model {model}: there is no such file; expected an acoustic model for the backend")
    try:
        return Run(
            backend=chosen,
            device=its_device,
            card=card,
            environment=needs.name,
            runtime=runtime,
            subject_spec=subject,
            factory=load_factory(subject),
            model=model,
            audio=audio,
            samples=load_wav(audio),
            criteria=Criteria.load(criteria) if criteria else Criteria(),
            allow_shared_gpu=allow_shared_gpu,
        )
    except (SubjectError, AudioError, CriteriaError) as error:
        raise Refused(str(error)) from error


def device_faults_allowed() -> bool:
    """Whether the processes below this one may bring about faults that poison a card's context."""
    return os.environ.get(ALLOW_DEVICE_FAULTS) == "1"


def _choose_backend(name: str | None) -> tuple[type[Backend], str]:
    if name is not None:
        try:
            chosen = backends.create(name)
        except backends.UnknownBackend as error:
            raise Refused(f"--backend {name}: {error}") from error
        availability = chosen.probe()
        if not availability.available:
            raise Refused(f"--backend {name} cannot run here: {availability.reason}")
        return chosen, availability.runtime
    found = backends.available()
    for declared, availability in found:
        if availability.available:
            return backends.create(declared.name), availability.runtime
    reasons = "; ".join(f"{declared.name}: {availability.reason}" for declared, availability in found)
    raise Refused(f"no backend can run here, so nothing can be qualified: {reasons}")


def _choose_device(backend: type[Backend], asked: str | None, is_card: bool) -> tuple[str, gpu.Card | None]:
    """Give the device's name, and its card where it is one. Raises Refused for one that the backend does not have."""
    try:
        with contextlib.closing(backend(asked)) as made:
            return made.device, gpu.card_of(made.device) if is_card else None
    except (BackendError, NoDriver, DriverError) as error:
        raise Refused(f"--device {asked}: {error}" if asked else str(error)) from error


def _environment_of(backend: type[Backend]) -> backends.Environment:
    """Give the environment that this runs in: the one that nox names, or else what is installed. Raises Refused."""
    declared = next(each.needs for each in backends.declared() if each.name == backend.name)
    asked = os.environ.get(_ENVIRONMENT)
    if not asked:
        return next(iter(declared.values())) if len(declared) == 1 else _installed(backend, declared)
    if asked not in declared:
        raise Refused(f"{_ENVIRONMENT} is {asked!r}: backend {backend.name} is declared for {', '.join(declared)}")
    return declared[asked]


def _installed(backend: type[Backend], declared: Mapping[str, backends.Environment]) -> backends.Environment:
    """Find the environment that is installed: the backend itself compares it with what a name promises."""
    reasons = []
    try:
        for name, found in declared.items():
            os.environ[_ENVIRONMENT] = name
            availability = backend.probe()
            if availability.available:
                return found
            reasons.append(f"{name}: {availability.reason}")
    finally:
        del os.environ[_ENVIRONMENT]
    raise Refused(f"what is installed is none of {backend.name}'s environments: {'; '.join(reasons)}")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sources_digest(factory: Callable[..., Any]) -> str:
    """Hash our own sources, and those beside the subject's factory."""
    folders = {ROOT / name for name in ("backends", "protection", "qualification", "tests")}
    digest = hashlib.sha256()
    files = {path for folder in folders for ending in ("py", "c", "onnx") for path in folder.rglob(f"*.{ending}")}
    with contextlib.suppress(TypeError, OSError):
        files |= set(Path(inspect.getfile(factory)).resolve().parent.glob("*.py"))
    for path in sorted(files):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """Give the installed versions of what matters, NVIDIA's libraries included: they say which CUDA it is."""
    names = ("numpy", "onnxruntime", "onnxruntime-gpu", "psutil", "pytest", "torch")
    # The first on the path is the one that is imported.
    there = reversed([*metadata.distributions()])
    found = {(each.name or "").lower().replace("_", "-"): each.version for each in there}
    return {name: found[name] for name in sorted(found) if name in names or name.startswith("nvidia-")}
