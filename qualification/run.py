"""One qualification: what is judged, on what, against which criteria, and where it is written."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import backends
from backends.contract import Backend
from qualification import __version__
from qualification.audio import AudioError, load_wav
from qualification.criteria import Criteria, CriteriaError
from qualification.lock import DeviceLock, LockBusy
from qualification.platform_check import disk_refusal, refusal
from qualification.records import RecordError, RecordWriter
from qualification.subject import Subject, SubjectContext, SubjectError, load_factory

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_AUDIO = ROOT / "tests" / "data" / "speech.wav"
DEFAULT_RESULTS = ROOT / "results"


class Refused(ValueError):
    """A run cannot begin. The message says why, and what was expected."""


@dataclass
class Run:
    """Everything that a run was given, checked."""

    backend: type[Backend]
    environment: str
    runtime: str
    subject_spec: str
    factory: Callable[[SubjectContext], Subject]
    model: Path
    audio: Path
    samples: Any
    criteria: Criteria
    lock: DeviceLock | None = None
    records: RecordWriter | None = None
    tests: list[str] = field(default_factory=list)

    def header(self) -> list[str]:
        """Say what is being qualified."""
        seconds = len(self.samples) / 16_000
        changed = ", ".join(f"{name} = {value:g}" for name, value in self.criteria.overridden.items())
        return [
            f"plimsoll {__version__}: qualifying {self.subject_spec}",
            f"  on backend {self.backend.name} in environment {self.environment} ({self.runtime}, "
            f"Python {platform.python_version()})",
            f"  model {self.model.name} (sha256 {_digest(self.model)[:12]}), audio {self.audio.name} "
            f"({seconds:.1f} s, sha256 {_digest(self.audio)[:12]})",
            f"  criteria: {self.criteria.source}" + (f" with {changed}" if changed else ""),
            f"  records: {self.records.path if self.records else 'none'}",
        ]

    def take_lock(self, wait_s: float, say: Callable[[str], None] | None = None) -> None:
        """Have the device to ourselves, queueing at most ``wait_s`` seconds, and saying so. Raises Refused."""
        try:
            self.lock = DeviceLock(self.backend.name, wait_s, say=say)
        except LockBusy as error:
            raise Refused(str(error)) from error

    def begin_records(self, folder: Path, **more: Any) -> Path:
        """Write the first line of the records, with ``more`` in it; give their file. Raises Refused."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        path = folder / f"{self.environment}-{self.backend.name}-{stamp}-{os.getpid()}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.records = RecordWriter(path, {**self._about(), **more})
        except (OSError, RecordError) as error:
            raise Refused(f"--results {folder}: the records cannot be written: {error}") from error
        return path

    def write(self, **fields: Any) -> None:
        """Write a criterion's verdict to the records."""
        if self.records is not None:
            self.records.criterion(backend=self.backend.name, environment=self.environment, **fields)

    def end_records(self) -> None:
        """Write the last line; a run that was cut off has none, and counts as damaged."""
        if self.records is not None:
            self.records.close()

    def release_lock(self) -> None:
        """Let the next run in."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def identity(self) -> dict[str, Any]:
        """Give what has to be the same for two runs to be parts of one."""
        return {
            "suite_version": __version__,
            "suite_commit": _commit(),
            "subject": self.subject_spec,
            "backend": self.backend.name,
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
        names = ("onnxruntime", "torch", "numpy", "psutil", "pytest")
        return {
            **self.identity(),
            "machine": {
                "system": platform.platform(),
                "processors": os.cpu_count(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "python": platform.python_version(),
            },
            "driver": None,
            "versions": {name: _version(name) for name in names if _version(name)},
            "pins_sha256": _digest(pins) if pins.is_file() else None,
            "model_sha256": _digest(self.model),
            "audio_sha256": _digest(self.audio),
            "criteria": {"source": self.criteria.source, "overridden": self.criteria.overridden},
            "collected": self.tests,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def prepare(*, backend: str | None, subject: str, model: Path, audio: Path, criteria: Path | None = None) -> Run:
    """Check everything that was given, before anything runs. Raises Refused."""
    refused = refusal() or disk_refusal(ROOT)
    if refused:
        raise Refused(refused)
    chosen, runtime = _choose_backend(backend)
    if not model.is_file():
        raise Refused(f"--model {model}: there is no such file; expected an acoustic model for the backend")
    try:
        run = Run(
            backend=chosen,
            environment=_environment_of(chosen.name),
            runtime=runtime,
            subject_spec=subject,
            factory=load_factory(subject),
            model=model,
            audio=audio,
            samples=load_wav(audio),
            criteria=Criteria.load(criteria) if criteria else Criteria(),
        )
    except (SubjectError, AudioError, CriteriaError) as error:
        raise Refused(str(error)) from error
    _try_model(run)
    return run


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


def _environment_of(name: str) -> str:
    """Give the environment that this runs in: what nox says, or the backend's first. Raises Refused."""
    declared = next(each.environments for each in backends.declared() if each.name == name)
    asked = os.environ.get("PLIMSOLL_ENVIRONMENT") or declared[0]
    if asked not in declared:
        raise Refused(f"PLIMSOLL_ENVIRONMENT is {asked!r}: backend {name} is declared for {', '.join(declared)}")
    return asked


def _try_model(run: Run) -> None:
    """A model that does not load is refused now, and not a failure of every test."""
    backend = run.backend()
    try:
        backend.load(run.model).close()
    except Exception as error:
        raise Refused(f"--model {run.model}: {error}") from error
    finally:
        backend.close()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sources_digest(factory: Callable[..., Any]) -> str:
    """Hash our own sources, and those beside the subject's factory."""
    folders = {ROOT / name for name in ("backends", "protection", "qualification", "tests")}
    digest = hashlib.sha256()
    files = {path for folder in folders for path in folder.rglob("*.py")}
    with contextlib.suppress(TypeError, OSError):
        files |= set(Path(inspect.getfile(factory)).resolve().parent.glob("*.py"))
    for path in sorted(files):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
