"""What a leak consists of: the work is repeated a few times, phase by phase, and everything that stays is named.

Only once growth has failed a test: following every allocation of Python's slows the work down, and takes memory itself.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from qualification.quoting import printable, quoted
from qualification.sampling import MEMORY, SERIES, UNREAD, Sample

#: What a process can have open: each name begins with its kind.
OPENED = ("descriptor", "thread", "process")
ROOT = Path(__file__).resolve().parents[1]
TURNS = 4
SHOWN_MAX = 5
#: What grows by less in each turn is not worth a line.
LEAST_BYTES = 1_000
_FRAMES = 12
_NUMBERED = re.compile(r"^(socket|pipe|anon_inode):.*")

_NUMBER = re.compile(r"\d+")

FURTHER = """\
look further:
  python    PYTHONTRACEMALLOC=25 and tracemalloc.take_snapshot(), or memray run --native -m pytest ...
  native    heaptrack -p PID, or LD_PRELOAD of jemalloc with MALLOC_CONF=prof:true,prof_leak:true
  torch     torch.cuda.memory._record_memory_history(), _dump_snapshot("m.pickle"), and pytorch.org/memory_viz
  open      ls -l /proc/PID/fd; lsof -p PID; py-spy dump --pid PID (threads)"""


def attribute(
    phases: Mapping[str, Callable[[], object]],
    read: Callable[[], Sample],
    process_ids: Callable[[], Iterable[int]],
    turns: int = TURNS,
) -> list[str]:
    """Repeat the work, each phase followed by a reading at rest; give lines that say what stayed, and whence.

    The first turn is warm-up. Work that fails ends it early, which is said.
    """
    grown: dict[str, Counter[str]] = {name: Counter() for name in phases}
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start(_FRAMES)
    done, failed = 0, ""
    try:
        for phase in phases.values():
            phase()
        before = read()
        blocks, sites, opened = runtime_blocks(), _snapshot(), opened_at_rest(process_ids)
        try:
            for _ in range(turns):
                turn, before = _turn(phases, read, before)
                # A turn counts when it is whole.
                for name, of_phase in turn.items():
                    grown[name].update(of_phase)
                done += 1
        except Exception as error:
            if not done:
                raise
            failed = f"turn {done + 1} failed, and what it left is in what follows the phases: {_said(error)}"
        after = _snapshot()
        opened_now, blocks_now = opened_at_rest(process_ids), runtime_blocks()
    except Exception as error:
        return [f"what grew could not be looked into: turn {done + 1} failed: {_said(error)}", *FURTHER.splitlines()]
    finally:
        if not already:
            tracemalloc.stop()
    lines = [f"in {done} more turns:", *_by_phase(grown, done), *_by_site(sites, after, done)]
    lines += _in_workers(grown, done)
    lines += _more("opened and kept", opened_now, opened)
    lines += _more("blocks that the runtime's allocator kept", blocks_now, blocks)
    return [*lines, *([failed] if failed else []), *FURTHER.splitlines()]


def _turn(
    phases: Mapping[str, Callable[[], object]], read: Callable[[], Sample], before: Sample
) -> tuple[dict[str, Counter[str]], Sample]:
    """Do each phase once; give by how much each series grew in each, and the last reading."""
    grown: dict[str, Counter[str]] = {}
    for name, phase in phases.items():
        phase()
        now = read()
        pairs = {each: (getattr(before, each), getattr(now, each)) for each in SERIES}
        grown[name] = Counter({each: is_ - was for each, (was, is_) in pairs.items() if UNREAD not in (was, is_)})
        before = now
    return grown, before


def what_is_open(process_ids: Iterable[int]) -> Counter[str]:
    """Count what processes have open now: descriptors by what they lead to, threads by name, and descendants."""
    found: Counter[str] = Counter()
    with suppress(psutil.Error):
        found.update(f"process {child.name()}" for child in psutil.Process().children(recursive=True))
    for process_id in dict.fromkeys((os.getpid(), *process_ids)):
        folder = Path(f"/proc/{process_id}")
        with suppress(OSError):
            for link in (folder / "fd").iterdir():
                # One that was closed meanwhile; the folder that is being listed is one itself.
                with suppress(OSError):
                    target = str(link.readlink())
                    if target != f"/proc/{process_id}/fd":
                        found["descriptor of " + _NUMBERED.sub(r"a \1", target)] += 1
            # The kernel knows the names that Python gives its threads from 3.14 on only.
            names = {each.native_id: each.name for each in threading.enumerate()} if process_id == os.getpid() else {}
            for task in (folder / "task").iterdir():
                with suppress(OSError):
                    name = names.get(int(task.name)) or (task / "comm").read_text().strip()
                    found["thread " + _NUMBER.sub("N", name)] += 1
    return found


def opened_at_rest(process_ids: Callable[[], Iterable[int]]) -> Counter[str]:
    """Count what processes have open each time they are looked at: what reads memory has a file open for a moment."""
    found = what_is_open(process_ids())
    for _ in range(2):
        time.sleep(0.05)
        found &= what_is_open(process_ids())
    return found


def runtime_blocks() -> Counter[str]:
    """Count the blocks in use of PyTorch's caching allocator by size, where this process has one of a device.

    Source: torch.cuda.memory_snapshot, a list of segments with their blocks.
    """
    torch = sys.modules.get("torch")
    found: Counter[str] = Counter()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for segment in torch.cuda.memory_snapshot():
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found[f"{block['size']} bytes"] += 1
    return found


def kept(now: Counter[str], before: Counter[str]) -> str:
    """Name what there is more of than before, the most first."""
    more = now - before
    names = [f"{count} x {_printable(name)}" for name, count in more.most_common(SHOWN_MAX)]
    return ", ".join(names) + (", …" if len(more) > SHOWN_MAX else "")


def _by_phase(grown: Mapping[str, Counter[str]], turns: int) -> list[str]:
    lines = []
    for phase, series in grown.items():
        parts = [f"{series[name] / 1e3 / turns:+.1f} kB {what}" for name, what in MEMORY.items() if series[name]]
        parts += [f"{series[name]:+d} {name}" for name in ("descriptors", "threads", "children") if series[name]]
        lines.append(f"  {phase}: {', '.join(parts) or 'nothing'} (memory: each turn, with what following it takes)")
    return lines


def _snapshot() -> tracemalloc.Snapshot:
    gc.collect()
    return tracemalloc.take_snapshot().filter_traces((tracemalloc.Filter(False, tracemalloc.__file__),))


def _by_site(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot, turns: int) -> list[str]:
    """Give the places in Python that allocated what stayed: whose line it is of ours, and the line itself."""
    more = [each for each in after.compare_to(before, "traceback") if each.size_diff >= LEAST_BYTES * turns]
    lines = ["  allocated by Python and kept:" + ("" if more else " next to nothing. In a worker, or native code?")]
    for each in more[:SHOWN_MAX]:
        frames = list(each.traceback)
        ours = [frame for frame in frames if frame.filename != __file__ and Path(frame.filename).is_relative_to(ROOT)]
        shown = list(dict.fromkeys([*ours[-2:], frames[-1]]))
        where = " -> ".join(f"{_short(frame.filename)}:{frame.lineno}" for frame in shown)
        kilobytes = each.size_diff / turns / 1e3
        lines.append(f"    {kilobytes:+.1f} kB each turn, {each.count_diff:+d} blocks in all: {where}")
    return lines


def _in_workers(grown: Mapping[str, Counter[str]], turns: int) -> list[str]:
    """Say what only the workers know of: their heaps are read, their allocations are not followed."""
    each_turn = sum(series["workers_heap_bytes"] for series in grown.values()) / turns
    text = f"  in a worker: {each_turn / 1e3:+.1f} kB each turn of its heap; which line took it is only seen there"
    return [text] if each_turn >= LEAST_BYTES else []


def _more(what: str, now: Counter[str], before: Counter[str]) -> list[str]:
    more = kept(now, before)
    return [f"  {what}: {more}"] if more else []


def _short(name: str) -> str:
    path = Path(name)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {quoted(_printable(str(error)))}"


def _printable(text: str) -> str:
    return printable(text, "?")[:120]
