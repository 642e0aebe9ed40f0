"""The interposer from Python's side: compiled on first use, told what to refuse, asked what was counted.

``interposer.c`` is put under a process with LD_PRELOAD. What it refuses is in a file that it, its children and whoever
arms it have mapped. Arming and disarming are one store each: they need no memory, also while none is to be had.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from backends.contract import ArmedFault, BackendError, FaultPlan, FaultRecord, Provenance, Site

SOURCE = Path(__file__).with_name("interposer.c")
#: Names the file that the processes of a run map.
CONTROL = "PLIMSOLL_INTERPOSER"
_PRELOAD = "LD_PRELOAD"
_COMPILE_S = 60

# The layout is struct control's, in interposer.c.
_MAGIC, _VERSION = 0x4D494C50, 1
_FRAMES, _FRAME_BYTES, _PROCESSES = 16, 192, 128
_HEAD = struct.Struct("<II")
_WAKE_AT, _PLAN_AT = 8, 16
#: Deadline (ns), sites, min_bytes, nth, times, process, thread, the thread's name.
_PLAN = struct.Struct("<qQQQQii16s")
_EXECUTABLE_AT, _EXECUTABLE = 80, struct.Struct("<QQ")
_COUNTS_AT, _COUNTS = 96, struct.Struct("<QQ")
_BOUND_AT, _REPORT_AT = 112, 116
_FIRED_AT, _FIRED = 120, struct.Struct("<iiQQI")
_FRAMES_AT = 152
_PROCESSES_AT = _FRAMES_AT + _FRAMES * _FRAME_BYTES
#: Its id, the last report and its heap, then writes and syncs in order, syncs, the main thread's last write and sync.
_PROCESS = struct.Struct("<iIQQQQQ16x")
_SIZE = _PROCESSES_AT + _PROCESSES * _PROCESS.size
_INT = struct.Struct("<i")
_ARMED, _REPORT = 1, 2

_HEAP, _MAP, _DEVICE, _LAUNCH = 1, 2, 4, 8
_BITS = {
    Site.HOST_ALLOCATION: _HEAP | _MAP,
    Site.DEVICE_ALLOCATION: _DEVICE,
    Site.DEVICE_LAUNCH: _LAUNCH,
}
#: Sites that are struck by the interposer, and by nothing else.
INTERPOSED_SITES = frozenset(_BITS)
_ANY_THREAD, _MAIN_THREAD, _OTHER_THREADS, _NAMED_THREAD, _NOT_NAMED_THREAD = range(5)
_NAME_BYTES = 15


class InterposerUnavailable(BackendError):
    """Single allocations cannot be refused here. The message says why, and what to do."""


def library() -> Path:
    """Give the compiled interposer; compile it where this source was not compiled by this user yet.

    Raises InterposerUnavailable: another platform, no C compiler, or no folder to keep it in.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        raise InterposerUnavailable(
            f"single allocations are refused on Linux x86-64 with glibc only, and this is {platform.platform()}"
        )
    compiler = _compiler()
    # A home may be shared by machines: what was compiled for a newer C library does not load with an older one.
    made_of = SOURCE.read_bytes() + repr((compiler, platform.libc_ver())).encode()
    digest = hashlib.sha256(made_of).hexdigest()[:16]
    folder = _private(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "plimsoll")
    compiled = folder / f"interposer-{digest}.so"
    if not compiled.is_file():
        _compile(compiler, compiled)
    if compiled.stat().st_uid != os.geteuid() or compiled.stat().st_mode & 0o022:
        raise InterposerUnavailable(f"{compiled} can be written by others: remove it, and it is compiled anew")
    return compiled


def refusal() -> str | None:
    """Say why single allocations cannot be refused here, or None."""
    try:
        Control.required_of(os.environ)
    except InterposerUnavailable as error:
        return str(error)
    return None


def _compiler() -> str:
    asked = os.environ.get("CC")
    for name in (asked,) if asked else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise InterposerUnavailable(
        f"there is no C compiler ({asked or 'cc, gcc, clang'}) to compile {SOURCE.name} with: install one, or name "
        "it in CC"
    )


def _private(folder: Path) -> Path:
    """Make the folder, for this user alone: what is in it is loaded into processes."""
    try:
        if set(str(folder)) & set(": "):
            raise OSError("LD_PRELOAD takes no path with a space or a colon")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            folder.chmod(0o700)
            return folder
        why = "it is not a folder of yours"
    except OSError as error:
        why = str(error)
    raise InterposerUnavailable(
        f"the interposer cannot be kept in {folder} ({why}): name a folder of yours in XDG_CACHE_HOME"
    )


def _compile(compiler: str, compiled: Path) -> None:
    try:
        # Beside it, and then moved: two runs that begin at once do not see half of it.
        with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
            made = Path(folder) / compiled.name
            command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S, check=False)
            if done.returncode:
                raise InterposerUnavailable(f"{compiler} does not compile {SOURCE.name}: {done.stderr.strip()[-400:]}")
            made.chmod(0o500)
            made.replace(compiled)
    except (OSError, subprocess.SubprocessError) as error:
        raise InterposerUnavailable(f"{SOURCE.name} cannot be compiled into {compiled.parent}: {error}") from error


@dataclass(frozen=True)
class Durability:
    """Writes and syncs of a process so far: how many syncs, and where its main thread's last write and sync stand."""

    syncs: int
    main_wrote: int
    main_synced: int


class Control:
    """The file that says what is refused, from whoever has it mapped."""

    def __init__(self, path: Path) -> None:
        """Map a file that ``create`` made. Raises BackendError for one that is none."""
        self.path = path
        try:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _SIZE)
        except (OSError, ValueError) as error:
            raise BackendError(f"{path} is no control file of the interposer: {error}") from error
        if _HEAD.unpack_from(self._map, 0) != (_MAGIC, _VERSION):
            raise BackendError(f"{path} is no control file of this version of the interposer: make another")
        weakref.finalize(self, self._map.close)

    @classmethod
    def create(cls, path: Path, executable: Path | None = Path("/proc/self/exe")) -> Control:
        """Make the file, nothing armed. Only processes of this ``executable`` are processes of the run (None: all)."""
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
            file.truncate(_SIZE)
            file.write(_HEAD.pack(_MAGIC, _VERSION))
            if executable is not None:
                its = executable.stat()
                file.seek(_EXECUTABLE_AT)
                file.write(_EXECUTABLE.pack(its.st_dev, its.st_ino))
        return cls(path)

    @classmethod
    def attached(cls) -> Control | None:
        """Give the one that this process is under, or None."""
        path = os.environ.get(CONTROL)
        control = cls(Path(path)) if path else None
        return control if control is not None and control._place(os.getpid()) is not None else None

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Give the environment of a process that is to be under it. Raises InterposerUnavailable."""
        return {**base, _PRELOAD: str(self.required_of(base)), CONTROL: str(self.path)}

    @staticmethod
    def required_of(base: Mapping[str, str]) -> Path:
        """Give the library that is put under a process with this environment. Raises InterposerUnavailable."""
        if base.get(_PRELOAD):
            raise InterposerUnavailable(
                f"LD_PRELOAD is {base[_PRELOAD]} already, and what another library does to allocations would be "
                "taken for the subject's: unset it"
            )
        return library()

    def prepare(self, plan: FaultPlan, host: int | None = None) -> None:
        """Say what is refused once ``begin`` is called; its deadline starts now. ``host`` is the subject's process id.

        The plan's process is "host", "runtime" (any but the host), an id, or None; its thread "main", a name as the
        kernel has it, one of them after "!" (any other), or None. With ``times`` None the first process in which it
        fires is refused everything from there on, and no other. Raises ValueError for another plan.
        """
        name, mode = (plan.thread or "").removeprefix("!"), _ANY_THREAD
        if plan.input_above is not None:
            raise ValueError(f"input_above is {plan.input_above}: expected None, since an allocation has no input")
        if plan.thread is not None:
            if not name:
                raise ValueError(f'thread is {plan.thread!r}: expected "main", a name, one of them after "!", or None')
            other = plan.thread.startswith("!")
            mode = (
                (_OTHER_THREADS if other else _MAIN_THREAD)
                if name == "main"
                else (_NOT_NAMED_THREAD if other else _NAMED_THREAD)
            )
        self._map[_WAKE_AT] = 0
        _PLAN.pack_into(
            *(self._map, _PLAN_AT, time.monotonic_ns() + int(plan.disarm_after_s * 1e9), _bits(plan)),
            *(plan.min_bytes, plan.nth, plan.times or 0, _process(plan, host), mode),
            name.encode()[:_NAME_BYTES],
        )
        _COUNTS.pack_into(self._map, _COUNTS_AT, 0, 0)
        _INT.pack_into(self._map, _BOUND_AT, 0)
        _FIRED.pack_into(self._map, _FIRED_AT, 0, 0, 0, 0, 0)

    def begin(self) -> None:
        """Arm what was prepared. Takes no memory."""
        self._map[_WAKE_AT] = _ARMED

    def end(self) -> None:
        """Disarm. Takes no memory."""
        self._map[_WAKE_AT] = 0

    def record(self) -> FaultRecord:
        """Read what was counted: requests seen and refused since ``prepare``. Whether one was absorbed is not seen."""
        seen, fired = _COUNTS.unpack_from(self._map, _COUNTS_AT)
        return FaultRecord(seen, fired, 0, Provenance.INTERPOSED if fired else None, self._told() if fired else "")

    def _told(self) -> str:
        process, thread, site, size_bytes, _ = _FIRED.unpack_from(self._map, _FIRED_AT)
        where = "main thread" if process == thread else "another thread"
        what = "a launch of" if site == _LAUNCH else f"{size_bytes} bytes for"
        return f"{what} process {process}, {where}: {' < '.join(self.call_site()[:4])}"

    def fired_process(self) -> int:
        """Give the process in which the first request was refused, or 0."""
        process: int = _FIRED.unpack_from(self._map, _FIRED_AT)[0]
        return process

    def call_site(self) -> list[str]:
        """Give where the first refused request came from, innermost first: library+offset and the nearest symbol."""
        *_, frames = _FIRED.unpack_from(self._map, _FIRED_AT)
        starts = (_FRAMES_AT + _FRAME_BYTES * number for number in range(frames))
        return [self._map[at : at + _FRAME_BYTES].split(b"\0")[0].decode(errors="replace").strip() for at in starts]

    def ask_for_heaps(self) -> None:
        """Have each process of the run report its heap with its next request for memory."""
        (before,) = _INT.unpack_from(self._map, _REPORT_AT)
        _INT.pack_into(self._map, _REPORT_AT, before + 1)
        self._map[_WAKE_AT] |= _REPORT

    def heaps_bytes(self) -> dict[int, int]:
        """Give what each process reported since ``ask_for_heaps``: the bytes in use of its heap, by process id."""
        (wanted,) = _INT.unpack_from(self._map, _REPORT_AT)
        found = (_PROCESS.unpack_from(self._map, self._at(place)) for place in range(_PROCESSES))
        return {process: heap for process, reported, heap, *_ in found if process and reported == wanted > 0}

    def durability(self, process: int) -> Durability:
        """Give how often a process made its writes durable. Raises BackendError for one that is not under it."""
        place = self._place(process)
        if place is None:
            raise BackendError(f"process {process} is not under the interposer")
        *_, syncs, wrote, synced = _PROCESS.unpack_from(self._map, self._at(place))
        return Durability(syncs, wrote, synced)

    def processes(self) -> list[int]:
        """Give the ids of the processes that have come under it and may still run."""
        found = (_INT.unpack_from(self._map, self._at(place))[0] for place in range(_PROCESSES))
        return [process for process in found if process]

    def _place(self, process: int) -> int | None:
        places = (place for place in range(_PROCESSES) if _INT.unpack_from(self._map, self._at(place))[0] == process)
        return next(places, None)

    @staticmethod
    def _at(place: int) -> int:
        return _PROCESSES_AT + place * _PROCESS.size


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Have no request of this thread be a point: what brings about a fault of another kind is not the subject's."""
    count = _uncounted()
    if count is None:
        yield
        return
    count(1)
    try:
        yield
    finally:
        count(-1)


@functools.cache
def _uncounted() -> Callable[[int], object] | None:
    """Give the interposer's own function, where this process is under it."""
    if CONTROL not in os.environ:
        return None
    with contextlib.suppress(OSError, AttributeError):
        found: Callable[[int], object] = ctypes.CDLL(None).plimsoll_uncounted
        return found
    return None


class InterposedFault(ArmedFault):
    """A plan that the interposer carries out, armed in a process that is under it."""

    def __init__(self, control: Control, plan: FaultPlan) -> None:
        """Arm it. Raises ValueError for a plan that the interposer cannot carry out."""
        self.plan, self._control = plan, control
        self._record: FaultRecord | None = None
        control.prepare(plan, os.getpid())
        control.begin()

    def record(self) -> FaultRecord:
        """Read points seen and faults fired so far."""
        return self._record or self._control.record()

    def disarm(self) -> None:
        """Disarm; another plan may be armed afterwards."""
        if self._record is None:
            self._control.end()
            self._record = self._control.record()


def arm(plan: FaultPlan) -> ArmedFault:
    """Arm a plan in this process and those below it. Raises BackendError where it is not under the interposer."""
    control = Control.attached()
    if control is None:
        raise BackendError(
            f"{plan.site.value} needs a process that was started under the interposer: see Control.environment"
        )
    return InterposedFault(control, plan)


def _bits(plan: FaultPlan) -> int:
    if plan.site not in _BITS:
        names = ", ".join(sorted(site.value for site in _BITS))
        raise ValueError(f"the interposer does not reach {plan.site.value}: expected one of {names}")
    return _BITS[plan.site]


def _process(plan: FaultPlan, host: int | None) -> int:
    """Give the filter: 0 for any process, an id for that one, its negative for any other."""
    match plan.process:
        case None:
            return 0
        case "host" | "runtime" if host is not None:
            return host if plan.process == "host" else -host
        case str(text) if text.isdecimal() and 0 < int(text) < 1 << 31:
            return int(text)
    raise ValueError(f'process is {plan.process!r}: expected "host" or "runtime" (with a host), a process id, or None')
