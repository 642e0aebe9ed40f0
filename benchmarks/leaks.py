"""How often the verdict on leaks is wrong: on live runs, on scripted traces, and beside what others offer.

    python -m benchmarks.leaks [--quick] [--folder DIR] [--out FILE]      live, scripted and peers: well over an hour
    python -m benchmarks.leaks one --workload noisy --leak-bytes-per-s 50000 --seed 1
    python -m benchmarks.leaks live --folder DIR [--healthy N] [--planted N] [--rates MB/s ...]
    python -m benchmarks.leaks judge --folder DIR
    python -m benchmarks.leaks scripted --folder DIR
    python -m benchmarks.leaks peers --folder DIR

- **live**: a workload runs for a minute in a process of its own, healthy or with a planted leak, is sampled while it is
  at rest, and judged. ``one`` is such a run; ``judge`` judges the samples that were kept with the verdict as it is now.
- **scripted**: traces that are computed, and traces put together from the noise of live healthy runs (resampled).
- **peers**: the same leaks and workload under psleak and pytest-memray, and judged by a slope from first to last.

What was measured is kept in the folder at once, so that what was cut off goes on, and ``--out`` writes all of it as a
page. Another commit does not make it anew: for that, name another folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
from numpy.typing import ArrayLike, NDArray

from benchmarks.engine_cost import machine
from benchmarks.leak_traces import BOOTSTRAP_BLOCK, SHAPES, Counted, clopper_pearson, count, residuals, total
from benchmarks.leak_workloads import MB, WORKLOADS, ByTurns, Leak, Noisy, Workload
from qualification import growth
from qualification.identity import suite
from qualification.sampling import Sampler

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "leak-benchmark"
SAMPLE_EVERY_S = 0.25
READ_EVERY_S = 0.1
#: What a slope from first to last is held against: the limit that is usual, and the verdict's own floor.
NAIVE_GATES_MB_PER_S = (1.0, 0.01)
LIVE_WORKLOADS = ("noisy", "pipeline")
LIVE_RATES_MB_PER_S = (0.05, 0.2, 1.0)
SCRIPTED_RATES_MB_PER_S = (0.025, 0.05, 0.2, 1.0)
VERDICTS = ("leak", "no_leak", "inconclusive")

Floats = NDArray[np.float64]
Say = Callable[[str], None]


# One run.


class Resident:
    """Reads the resident memory of this process and the workload's from a thread, all the time: the naive way."""

    def __init__(self, process_ids: Callable[[], Sequence[int]], duration_s: float) -> None:
        """Begin to read."""
        self._process_ids = process_ids
        # Written to at once, so that it is there before the first reading.
        self._read = np.full((int(2 * duration_s / READ_EVERY_S) + 100, 2), -1.0)
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(READ_EVERY_S) and self._count < len(self._read):
            used_bytes = 0
            for process_id in {os.getpid(), *self._process_ids()}:
                with contextlib.suppress(psutil.Error):
                    used_bytes += psutil.Process(process_id).memory_info().rss
            self._read[self._count] = time.monotonic(), used_bytes
            self._count += 1

    def slopes(self) -> dict[str, float]:
        """End; give the slopes in bytes/s, from the first reading to the last, and of a straight line through all."""
        self._ended.set()
        self._thread.join()
        if self._count < 2:
            return {"first_to_last": math.nan, "least_squares": math.nan}
        t_s, used_bytes = self._read[: self._count].T
        ends = float((used_bytes[-1] - used_bytes[0]) / (t_s[-1] - t_s[0]))
        return {"first_to_last": ends, "least_squares": float(np.polyfit(t_s, used_bytes, 1)[0])}


def one(name: str, rate: float, seed: int, duration_s: float, trace: Path | None = None) -> dict[str, Any]:
    """Let a workload run for so long and leak ``rate`` bytes/s; give the verdict, write the samples to ``trace``."""
    leak = Leak(seed, rate)
    with contextlib.closing(WORKLOADS[name](seed, leak.grow)) as workload:
        workload.turn()
        workload.rest()
        sampler = Sampler(workload.process_ids, workers_heap_bytes=workload.workers_heap_bytes)
        resident = Resident(workload.process_ids, duration_s)
        leak.begin()
        turns = _work(workload, sampler, duration_s)
        naive = resident.slopes()
        series = {each: sampler.series(each) for each in sampler.memory_series}
    if trace is not None:
        write_trace(trace, series)
    found = growth.judge_series(series)
    return {
        "workload": name,
        "leak": rate,
        "seed": seed,
        "samples": len(next(iter(series.values()))[0]),
        "turns": turns,
        "seconds": duration_s,
        "kept_bytes": leak.kept_bytes,
        "verdict": found.worst.verdict,
        "series": {each: asdict(verdict) for each, verdict in found.verdicts.items()},
        "naive": naive,
    }


def _work(workload: Workload, sampler: Sampler, duration_s: float) -> int:
    """Do turns and take samples until the time is over; give the number of turns.

    Paced: as many as a program at work does, on a machine that has other work as well.
    """
    turns, next_s = 0, time.monotonic()
    end_s = next_s + duration_s
    while (now_s := time.monotonic()) < end_s:
        for _ in range(workload.turns_a_sample):
            workload.turn()
            turns += 1
        workload.rest()
        sampler.sample(workload.device_used_bytes())
        next_s = max(next_s + SAMPLE_EVERY_S, now_s)
        time.sleep(max(0.0, next_s - time.monotonic()))
    return turns


def write_trace(path: Path, series: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """Write the samples as CSV: ``t_s``, and the bytes in use by each series' name."""
    t_s = np.asarray(next(iter(series.values()))[0])
    columns = [np.asarray(values) for _, values in series.values()]
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["t_s", *series])
        lines.writerows([f"{t:.4f}", *map(int, values)] for t, *values in zip(t_s, *columns, strict=True))


def read_trace(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Give the series of a trace, each as t_s [n] and bytes [n]."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    t_s, *columns = np.array(rows, dtype=np.float64).T
    return {name: (t_s, values) for name, values in zip(header[1:], columns, strict=True)}


# Many runs.


@dataclass(frozen=True)
class Planned:
    """A run that is to be made. ``rate`` is in MB/s; ``number`` counts the runs that are alike.

    Another ``trial`` has other seeds.
    """

    workload: str
    rate: float
    number: int
    duration_s: float
    tool: str = "plimsoll"
    trial: int = 0

    @property
    def key(self) -> str:
        """What the run is known by, whatever the commit."""
        what = f"{self.workload}-{self.rate:g}-{self.duration_s:g}s-{self.number:03}"
        what += f"-{self.trial}" if self.trial else ""
        return what if self.tool == "plimsoll" else f"{self.tool}-{what}"

    @property
    def seed(self) -> int:
        """Another one in each run, and the same for the same run, whatever judges it."""
        return zlib.crc32(replace(self, tool="plimsoll").key.encode())

    def command(self, trace: Path) -> list[str]:
        """Give the command that makes it."""
        if self.tool != "plimsoll":
            return self.command_under()
        return [sys.executable, "-m", "benchmarks.leaks", "one", *self._options(), "--trace", str(trace)]

    def command_under(self) -> list[str]:
        """Give the command that makes it under its tool, as fast as it can."""
        program = [sys.executable, "-m", "benchmarks.leaks", "under", self.tool]
        return [*TOOLS[self.tool].environment, *program, *self._options()]

    def _options(self) -> list[str]:
        return [
            *("--workload", self.workload, "--leak-bytes-per-s", f"{self.rate * MB:g}"),
            *("--seed", str(self.seed), "--duration", f"{self.duration_s:g}"),
        ]


def planned(healthy: int, leaking: int, rates: Sequence[float], duration_s: float, trial: int = 0) -> list[Planned]:
    """Give so many healthy runs, and so many leaking ones of each rate, half on each workload, in a shuffled order."""
    runs = [
        Planned(LIVE_WORKLOADS[n % 2], rate, n // 2, duration_s, trial=trial)
        for rate in (0.0, *rates)
        for n in range(leaking if rate else healthy)
    ]
    random.Random(0).shuffle(runs)
    return runs


def runs_file(folder: Path) -> Path:
    """Give where a folder's runs are kept, one a line."""
    return folder / "runs.jsonl"


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Give the runs that a folder has; of a line that was cut off, nothing."""
    path = runs_file(folder)
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def append(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run behind the others, for good."""
    path = runs_file(folder)
    cut_off = path.is_file() and not (path.read_bytes() or b"\n").endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut_off else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def trace_of(folder: Path, key: str) -> Path:
    """Give where a run's trace is kept."""
    return folder / f"{key}.csv"


def make(
    folder: Path,
    runs: Sequence[Planned],
    jobs: int,
    say: Say,
    command: Callable[[Planned, Path], list[str]] = Planned.command,
) -> None:
    """Make the runs that the folder does not have yet, so many at a time. A run that fails is written as a crash.

    Ctrl-C ends those that are under way, which then have to be made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {run["key"] for run in read_runs(folder)}
    left = [run for run in runs if run.key not in there]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs are there already, in {folder}")
    done, began_s = 0, time.monotonic()
    waiting = iter(left)
    under_way: dict[Planned, tuple[subprocess.Popen[str], float]] = {}
    commit = suite()["suite_commit"]
    try:
        while True:
            while len(under_way) < jobs and (run := next(waiting, None)) is not None:
                # To files: a pipe that nobody reads could fill up.
                out, error = _said(folder, run)
                with out.open("w") as to_out, error.open("w") as to_error:
                    words = command(run, trace_of(folder, run.key))
                    # In a session of its own, so that Ctrl-C strikes us alone and is no crash of theirs.
                    process = subprocess.Popen(
                        words, cwd=ROOT, stdout=to_out, stderr=to_error, text=True, start_new_session=True
                    )
                # Under psleak a run takes as long as that wants.
                under_way[run] = process, time.monotonic() + 2 * run.duration_s + 600
            if not under_way:
                return
            time.sleep(0.1)
            for run, (process, deadline_s) in list(under_way.items()):
                late = time.monotonic() > deadline_s
                if late:
                    _end(process)
                if process.poll() is None:
                    continue
                record = {**_outcome(folder, run, process.returncode, late), "jobs": jobs, "commit": commit}
                append(folder, record)
                del under_way[run]
                done += 1
                left_s = (time.monotonic() - began_s) / done * (len(left) - done)
                what = f"{run.tool}: {run.workload}, {f'{run.rate:g} MB/s' if run.rate else 'healthy'}"
                say(f"[{done}/{len(left)}] {what}: {record.get('verdict', 'crashed')}; {left_s / 60:.0f} min left")
    finally:
        for run, (process, _) in under_way.items():
            _end(process)
            for path in _said(folder, run):
                path.unlink()


def _said(folder: Path, run: Planned) -> tuple[Path, Path]:
    """Give where a run's output goes while it is under way, and its complaints."""
    return folder / f"{run.key}.out", folder / f"{run.key}.err"


def _outcome(folder: Path, run: Planned, status: int, late: bool) -> dict[str, Any]:
    """Give the record of a run that has ended."""
    out, error = _said(folder, run)
    said, complaint = (each.read_text(encoding="utf-8", errors="replace") for each in (out, error))
    out.unlink()
    error.unlink()
    about = {"key": run.key, **asdict(run), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
    if status != 0 or late:
        why = "not done in time" if late else f"exit status {status}"
        return {**about, "crash": f"{why}: {complaint[-1000:]}"}
    try:
        return {**json.loads(said), **about}
    except ValueError:
        return {**about, "crash": f"no record: {said[-500:]}{complaint[-500:]}"}


def _end(process: subprocess.Popen[str]) -> None:
    """End a run, in order if it does so within seconds."""
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def again(folder: Path, runs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Give runs with the verdicts that our traces of them get now. Raises FileNotFoundError where one is not kept."""
    for run in runs:
        if "crash" in run or run.get("tool", "plimsoll") != "plimsoll":
            yield dict(run)
            continue
        found = growth.judge_series(read_trace(trace_of(folder, run["key"])))
        series = {name: asdict(each) for name, each in found.verdicts.items()}
        yield {**run, "verdict": found.worst.verdict, "series": series}


# Peers.


@dataclass(frozen=True)
class Tool:
    """What judges a workload beside us, or nothing at all."""

    title: str
    packages: tuple[str, ...] = ()
    #: What its command begins with.
    environment: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """Say how to get what is not installed; None where all of it is."""
        names = [each for each in self.packages if importlib.util.find_spec(each.replace("-", "_")) is None]
        return f"not installed: python -m pip install {' '.join(names)}" if names else None


TOOLS = {
    "nothing": Tool("nothing"),
    "plimsoll": Tool("Plimsoll"),
    # As its documentation says. It decides itself for how many turns it goes on.
    "psleak": Tool("psleak", ("psleak",), ("env", "PYTHONMALLOC=malloc", "PYTHONUNBUFFERED=1")),
    "memray": Tool("pytest-memray", ("pytest-memray",)),
}
PEER_WORKLOADS = ("churn", "cache", "noisy")
PEER_RATES_MB_PER_S = (0.05, 0.2)
#: The pace of the runs that we judge: of the peers, a turn leaks as much as one of ours.
TURNS_PER_S = Noisy.turns_a_sample / SAMPLE_EVERY_S
#: What a test under memray does: it slows the turns down, and keeps a record of each allocation.
MEMRAY_TURNS = round(15 * TURNS_PER_S)
#: What it may find at one place: half of what the slowest leak keeps in the test.
MEMRAY_LIMIT_KB = round(PEER_RATES_MB_PER_S[0] / 2 * MB * MEMRAY_TURNS / TURNS_PER_S / 1000)
COST_ROUNDS, COST_S = 3, 30.0
_MEMRAY_TEST = """\
import json
from pathlib import Path

import pytest

from benchmarks.leaks import ByTurns, do_turns

# Made before the test, and so not taken for what it left behind.
WORKLOAD = ByTurns(*{about!r})


@pytest.mark.limit_leaks("{limit_kb} KB")
def test_turns():
    Path({out!r}).write_text(json.dumps(do_turns(WORKLOAD, {turns})))
"""


def under(tool: str, name: str, rate: float, seed: int, duration_s: float) -> dict[str, Any]:
    """Let a workload run under a tool, as fast as it can: what it does in so many seconds at our pace.

    Give the tool's verdict, the turns and the seconds. Raises RuntimeError where there is no verdict.
    """
    about = name, rate, seed, TURNS_PER_S
    if tool == "psleak":
        return _under_psleak(ByTurns(*about))
    if tool == "memray":
        return _under_memray(about)
    sample = Sampler().sample if tool == "plimsoll" else None
    return {"verdict": "not judged", **do_turns(ByTurns(*about), round(duration_s * TURNS_PER_S), sample)}


def do_turns(workload: ByTurns, turns: int, sample: Callable[[], object] | None = None) -> dict[str, Any]:
    """Do so many turns, sampled as often as a run of ours, or not at all; give how long that took."""
    began_s = time.monotonic()
    next_s = began_s + SAMPLE_EVERY_S
    for _ in range(turns):
        workload.turn()
        if sample is not None and time.monotonic() >= next_s:
            sample()
            next_s = time.monotonic() + SAMPLE_EVERY_S
    return {"turns": turns, "seconds": time.monotonic() - began_s, "kept_bytes": workload.kept_bytes}


def _under_psleak(workload: ByTurns) -> dict[str, Any]:
    psleak = importlib.import_module("psleak")

    class Case(psleak.MemoryLeakTestCase):  # type: ignore[misc, name-defined]
        def runTest(self) -> None:  # noqa: N802 (unittest's name)
            self.execute(workload.turn, checkers=psleak.Checkers.only("memory"))

    began_s, verdict = time.monotonic(), "no_leak"
    try:
        Case().runTest()
    except psleak.MemoryLeakError:
        verdict = "leak"
    seconds = time.monotonic() - began_s
    return {"verdict": verdict, "turns": workload.turns, "seconds": seconds, "kept_bytes": workload.kept_bytes}


def _under_memray(about: tuple[str, float, int, float]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="plimsoll-bench-") as folder:
        test, out, settings = (Path(folder) / each for each in ("test_leaks.py", "worked.json", "pytest.ini"))
        text = _MEMRAY_TEST.format(about=about, limit_kb=MEMRAY_LIMIT_KB, out=str(out), turns=MEMRAY_TURNS)
        test.write_text(text, encoding="utf-8")
        settings.write_text("[pytest]\n", encoding="utf-8")
        words = ["--memray", "-q", "-c", str(settings), "-p", "no:cacheprovider", str(test)]
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        wall_s = time.monotonic() - began_s
        found = done.returncode == 1 and "allowed to leak" in done.stdout
        if not out.is_file() or (done.returncode and not found):
            raise RuntimeError(f"pytest ended with status {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
        worked = json.loads(out.read_text(encoding="utf-8"))
        return {"verdict": "leak" if found else "no_leak", **worked, "wall_s": wall_s}


def peers(folder: Path, jobs: int, say: Say) -> None:
    """Make the runs of every tool that is installed, then measure what each costs, one run at a time."""
    tools = [name for name, tool in TOOLS.items() if not tool.missing]
    for tool in TOOLS.values():
        if tool.missing:
            say(f"not run: {tool.title}: {tool.missing}")
    # As many healthy runs as leaking ones.
    rates = [(0.0, number) for number in range(len(PEER_RATES_MB_PER_S))] + [(rate, 0) for rate in PEER_RATES_MB_PER_S]
    runs = [
        Planned(workload, rate, number, 60, tool)
        for tool in tools
        if tool != "nothing"
        for workload in PEER_WORKLOADS
        for rate, number in rates
    ]
    random.Random(0).shuffle(runs)
    make(folder / "peers", runs, jobs, say)
    # A run of ours has its pace: here it is how fast it can be.
    cost = [Planned("noisy", 0.0, number, COST_S, tool) for number in range(COST_ROUNDS) for tool in tools]
    make(folder / "cost", cost, 1, say, lambda run, _: run.command_under())


# The page.


def bounds(hits: int, tries: int) -> str:
    """Write the exact 99 % bounds of a share."""
    if tries == 0:
        return "–"
    lower, upper = clopper_pearson(hits, tries)
    return f"{lower:.1%} to {upper:.1%}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines) + "\n"


def rate_text(rate: float) -> str:
    """Say what was planted, in MB/s."""
    return f"{rate:g} MB/s" if rate else "healthy"


def live_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Write what came of live runs: a line for each workload, rate and duration, and for each rate in all."""
    header = [
        *("Workload", "Planted", "Seconds", "Runs", "Leak", "99 % bounds", "No leak", "Inconclusive", "Crashed"),
        *("Lower bound, smallest", "median", "Naive slope"),
        *(f"Naive > {gate:g} MB/s" for gate in NAIVE_GATES_MB_PER_S),
    ]
    groups = [
        (workload, rate, duration_s)
        for rate, duration_s in sorted({(run["rate"], run["duration_s"]) for run in runs})
        for workload in (*sorted({run["workload"] for run in runs}), "both")
    ]
    rows = []
    for workload, rate, duration_s in groups:
        about = rate, duration_s
        alike = [r for r in runs if (r["rate"], r["duration_s"]) == about and workload in (r["workload"], "both")]
        ended = [run for run in alike if "crash" not in run]
        leak, *others = (sum(run["verdict"] == each for run in ended) for each in VERDICTS)
        lowers = [lower for run in ended if math.isfinite(lower := _lower(run) / MB)]
        naive = [run["naive"]["first_to_last"] / MB for run in ended]
        rows.append(
            [
                *(workload, rate_text(rate), f"{duration_s:g}", len(alike), leak, bounds(leak, len(alike)), *others),
                len(alike) - len(ended),
                *((f"{min(lowers):+.4f}", f"{statistics.median(lowers):+.4f}") if lowers else ("–", "–")),
                f"{min(naive):+.2f} to {max(naive):+.2f}" if naive else "–",
                *(sum(slope > gate for slope in naive) for gate in NAIVE_GATES_MB_PER_S),
            ]
        )
    return markdown(header, rows)


def _lower(run: Mapping[str, Any]) -> float:
    """Give the lower bound of the counter that sees what is planted, in bytes/s."""
    return float(run["series"].get("heap_used_bytes", {}).get("lower", math.nan))


def counted_table(counted: Iterable[Counted]) -> str:
    """Write what came of computed traces: a line for each rate."""
    header = [
        *("Label", "Planted", "Traces", "Leak", "Share", "99 % bounds", "No leak", "Inconclusive"),
        *("Extended: leak", "Share", "No leak", "Inconclusive"),
    ]
    rows = []
    for each in counted:
        traces = total(each.verdicts)
        (leak, *others), (later, *later_others) = (
            [total(verdicts, verdict) for verdict in VERDICTS] for verdicts in (each.verdicts, each.extended)
        )
        first = [leak, f"{leak / traces:.1%}", bounds(leak, traces), *others]
        extended = [later, f"{later / traces:.1%}", *later_others]
        rows.append([each.label, rate_text(each.rate / MB), traces, *first, *extended])
    return markdown(header, rows)


def shapes_table(counted: Sequence[Counted]) -> str:
    """Write for each scripted shape how many traces of each rate were called a leak, at first and when extended."""

    def cell(each: Counted, shape: str) -> str:
        first, extended = (verdicts.get(shape, {}) for verdicts in (each.verdicts, each.extended))
        return f"{first.get('leak', 0)}, {extended.get('leak', 0)} of {sum(first.values())}"

    rows = [[shape.__name__, *(cell(each, shape.__name__) for each in counted)] for shape in SHAPES]
    return markdown(["Shape", *(rate_text(each.rate / MB) for each in counted)], rows)


def peers_table(runs: Sequence[Mapping[str, Any]], cost: Sequence[Mapping[str, Any]]) -> str:
    """Write the tools side by side."""
    header = [
        *("Judged by", "False alarms", "Leaks missed", "Inconclusive", "Crashed", "False alarms by workload"),
        *("Seconds a run", "Turns/s"),
    ]
    speeds = {
        tool: statistics.median(speed)
        for tool in TOOLS
        if (speed := [run["turns"] / run["seconds"] for run in cost if run["tool"] == tool and "crash" not in run])
    }
    alone = speeds.get("nothing", math.nan)
    rows = []
    for name, tool in TOOLS.items():
        if name == "nothing":
            continue
        own = [run for run in runs if run["tool"] == name]
        if not own:
            rows.append([tool.title, f"not run: {tool.missing or 'no runs are there'}", *["–"] * 6])
            continue
        took = [run.get("wall_s", run["seconds"]) for run in own if "crash" not in run]
        seconds = f"{min(took):.0f} to {max(took):.0f}" if took else "–"
        turns = f"{speeds[name]:.0f} ({speeds[name] / alone:.2f} of {alone:.0f})" if name in speeds else "–"
        rows.append([tool.title, *_found(own, lambda run: str(run["verdict"])), seconds, turns])
        if name == "plimsoll":
            rows += [
                [f"slope of RSS > {gate:g} MB/s", *_found(own, _naive(gate)), seconds, "–"]
                for gate in NAIVE_GATES_MB_PER_S
            ]
    return markdown(header, rows)


def _naive(gate_mb_per_s: float) -> Callable[[Mapping[str, Any]], str]:
    def verdict(run: Mapping[str, Any]) -> str:
        return "leak" if run["naive"]["first_to_last"] > gate_mb_per_s * MB else "no_leak"

    return verdict


def _found(runs: Sequence[Mapping[str, Any]], verdict: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Give false alarms, leaks missed, inconclusive and crashed runs, and the false alarms by workload."""
    ended = [(run, verdict(run)) for run in runs if "crash" not in run]
    healthy = [(run, found) for run, found in ended if not run["rate"]]
    leaking = [found for run, found in ended if run["rate"]]
    by_workload = {name: [found for run, found in healthy if run["workload"] == name] for name in PEER_WORKLOADS}
    return [
        f"{sum(found == 'leak' for _, found in healthy)} of {len(healthy)}",
        f"{sum(found != 'leak' for found in leaking)} of {len(leaking)}",
        str(sum(found == "inconclusive" for _, found in ended)),
        str(len(runs) - len(ended)),
        ", ".join(f"{name} {found.count('leak')} of {len(found)}" for name, found in by_workload.items()),
    ]


def page(folder: Path, judged_again: bool = False) -> str:
    """Write all that a folder has as a page."""
    runs, compared, cost = (read_runs(folder / each) for each in ("", "peers", "cost"))
    again_text = ""
    if judged_again:
        runs = list(again(folder, runs))
        compared = list(again(folder / "peers", compared))
        again_text = (
            f" Our verdicts are those that the kept samples get by commit {suite()['suite_commit']}: judged again."
        )
    parts = [
        "# How often the verdict on leaks is wrong\n",
        f"Written on {datetime.now(UTC):%Y-%m-%d} (UTC) on {machine(versions())}.\n",
        "Generated. To measure again, which takes well over an hour, on a machine with nothing else to do:\n",
        "```text\nnox -s bench-leaks -- --out docs/leaks-measured.md\n```\n",
    ]
    if runs:
        crashes = [
            f"- {run['key']}: {run['crash'].strip().splitlines()[-1].replace(f'{ROOT}/', '')[:200]}\n"
            for run in runs
            if "crash" in run
        ]
        parts += [f"## Live\n\n{_ABOUT_LIVE}{_made(runs)}{again_text}\n", live_table(runs), "".join(crashes)]
    if compared:
        about = _ABOUT_PEERS.format(turns_per_s=TURNS_PER_S, turns=MEMRAY_TURNS, limit_kb=MEMRAY_LIMIT_KB)
        parts += [f"## Peers\n\n{about}{_made(compared)}{again_text}\n", peers_table(compared, cost)]
    if (scripted := folder / "scripted.json").is_file():
        computed = json.loads(scripted.read_text(encoding="utf-8"))
        # Of a folder that is older, nothing was extended.
        counted = [Counted(**{"extended": {}, **each}) for each in computed["counted"]]
        of_scripts = [each for each in counted if each.label == "scripted"]
        parts += [f"## Scripted and resampled\n\n{_ABOUT_TRACES}Computed on {computed['when']}.\n"]
        parts += [
            counted_table(counted),
            "Of the scripted ones, called a leak in 60 s, and when extended:\n",
            shapes_table(of_scripts),
        ]
    return "\n".join(part for part in parts if part)


_ABOUT_LIVE = """\
Each run is a process of its own that works for so many seconds and is sampled four times a second, at rest. *noisy* has
arrays of up to 50 MB come and go over a live set that fluctuates; *pipeline* answers 8 s of speech a turn. What is
planted is kept for ever, in pieces of 2 to 64 KB or, in every second run or so, in small objects of 30 to 430 bytes. A
run is called a leak if one of its series is. *Naive* is the resident memory, read by a thread all the time, from the
first reading to the last. Bounds are exact (Clopper-Pearson). Lower bounds are the heap's; they and slopes are in MB/s.
A run that crashed is among the runs, and no leak was found in it. """
_ABOUT_PEERS = """\
The same leaks, of 0.05 and 0.2 MB/s at our pace of {turns_per_s:g} turns a second, on the workload *noisy* and on parts
of it: in *churn* only arrays come and go, in *cache* a bounded cache is replaced, too. A turn leaks the same whatever
looks on. psleak runs with its defaults, and only its check of memory; it decides itself for how many turns it goes on.
pytest-memray runs a test of {turns} turns with `limit_leaks("{limit_kb} KB")`, half of what the slowest leak keeps in
it; the live set is there before the test. What it finds comes with the place where it was allocated, which no other
here can say. A leak is missed where it is not found, inconclusive runs included. *Turns/s*: how fast *noisy*
goes with the tool, and without, one run at a time. """
_ABOUT_TRACES = """\
Nothing was run for these. *Scripted* traces are shapes that healthy memory has, with noise, and a straight line where a
leak is planted: 240 samples in 60 s, judged as those of an exact counter. *Resampled* ones are the noise of the healthy
live runs above, without their warm-up and the straight line through the rest, put together anew in blocks of 5 s, all
series of a run alike; a leak is planted in the heap and in all memory of the host. *Extended*: what is inconclusive is
judged once more, after twice the time, as our tests do. """


def _made(runs: Sequence[Mapping[str, Any]]) -> str:
    days = sorted({run["ended"][:10] for run in runs if "ended" in run})
    jobs = sorted({run["jobs"] for run in runs if "jobs" in run})
    when = f"Made on {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else "Made"
    commits = list(dict.fromkeys(str(run["commit"]) for run in runs if run.get("commit")))
    by = f" by commit {' and '.join(commits)}" if commits else ""
    return f"{when}{by}{f', {jobs[-1]} at a time' if jobs else ''}."


def versions() -> str:
    """Name the versions of what takes part and is installed."""
    names = ("onnxruntime", "psutil", "psleak", "pytest-memray", "memray")
    found = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


# The program.


def noise_of(folder: Path) -> list[tuple[str, dict[str, Floats]]]:
    """Give the noise of the healthy live runs in a folder: the workload, and by name the series that have some."""
    found = []
    for run in read_runs(folder):
        if run["rate"] or "crash" in run or not trace_of(folder, run["key"]).is_file():
            continue
        series = read_trace(trace_of(folder, run["key"]))
        rest = {name: residuals(*values) for name, values in series.items() if float(np.ptp(values[1])) > 0}
        if "heap_used_bytes" in rest and len(rest["heap_used_bytes"]) >= BOOTSTRAP_BLOCK:
            found.append((run["workload"], rest))
    return found


def scripted(folder: Path, traces: int, rates: Sequence[float], seed: int, say: Say) -> None:
    """Judge computed traces, and write the counts to the folder."""
    noise = noise_of(folder)
    if not noise:
        say(f"no resampled traces: there is no live healthy run in {folder}")
    counted = count(traces, [0.0, *(rate * MB for rate in rates)], seed, noise)
    folder.mkdir(parents=True, exist_ok=True)
    computed = {"when": f"{datetime.now(UTC):%Y-%m-%d}", "counted": [asdict(each) for each in counted]}
    (folder / "scripted.json").write_text(json.dumps(computed), encoding="utf-8")
    say(f"\n{counted_table(counted)}\n{shapes_table([each for each in counted if each.label == 'scripted'])}")


def _live(folder: Path, runs: Sequence[Planned], jobs: int, say: Say) -> None:
    make(folder, runs, jobs, say)
    say(f"\n{live_table(read_runs(folder))}")


def _peers(folder: Path, jobs: int, say: Say) -> None:
    peers(folder, jobs, say)
    say(f"\n{peers_table(read_runs(folder / 'peers'), read_runs(folder / 'cost'))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.leaks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument(
            "--folder", type=Path, default=FOLDER, metavar="DIR", help="what is measured is kept there"
        )
        command.add_argument(
            "--out", type=Path, metavar="FILE", help="write all that the folder has there, as Markdown"
        )
        return command

    def number(command: argparse.ArgumentParser, option: str, default: float, about: str) -> None:
        kind = type(default)
        command.add_argument(option, type=kind, default=default, metavar="N", help=f"{about} (default: %(default)s)")

    command = add("all", "live, scripted and peers: well over an hour. The default")
    command.add_argument("--quick", action="store_true", help="4 live runs and 200 scripted traces a rate, no peers")
    number(command, "--jobs", 2, "runs at a time")

    for name, about in (("one", "one live run, in this process"), ("under", "one run under another tool")):
        command = commands.add_parser(name, help=about, description=about)
        if name == "under":
            command.add_argument("tool", choices=TOOLS)
        command.add_argument("--workload", choices=WORKLOADS, required=True)
        number(command, "--leak-bytes-per-s", 0.0, "what is planted; 0 is healthy")
        number(command, "--seed", 0, "of everything random")
        number(command, "--duration", 60.0, "seconds")
        if name == "one":
            command.add_argument("--trace", type=Path, metavar="FILE", help="write the samples there, as CSV")

    command = add("live", "many live runs, as processes; goes on where it was cut off")
    number(command, "--healthy", 60, "healthy runs")
    number(command, "--planted", 20, "runs of each rate")
    command.add_argument("--rates", type=float, nargs="+", default=LIVE_RATES_MB_PER_S, metavar="R", help="in MB/s")
    number(command, "--duration", 60.0, "seconds of each")
    number(command, "--trial", 0, "another number, other seeds")
    number(command, "--jobs", 2, "runs at a time")

    add("judge", "judge the samples of a folder's live runs again, with the verdict as it is now")

    command = add("scripted", "computed traces, and the noise of the folder's live runs put together anew")
    number(command, "--traces", 1000, "traces of each rate")
    command.add_argument("--rates", type=float, nargs="+", default=SCRIPTED_RATES_MB_PER_S, metavar="R", help="in MB/s")
    number(command, "--seed", 0, "of everything random")

    number(add("peers", "other tools on the same leaks, and what each costs"), "--jobs", 2, "runs at a time")
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


def _do(given: argparse.Namespace) -> None:
    if given.command == "live":
        runs = planned(given.healthy, given.planted, given.rates, given.duration, given.trial)
        _live(given.folder, runs, given.jobs, _say)
    elif given.command == "judge":
        _say(f"judged again, from the samples in {given.folder}\n")
        _say(live_table(list(again(given.folder, read_runs(given.folder)))))
    elif given.command == "scripted":
        scripted(given.folder, given.traces, given.rates, given.seed, _say)
    elif given.command == "peers":
        _peers(given.folder, given.jobs, _say)
    elif given.quick:
        _live(given.folder, planned(2, 2, LIVE_RATES_MB_PER_S[1:2], 60), given.jobs, _say)
        scripted(given.folder, 200, SCRIPTED_RATES_MB_PER_S, 0, _say)
    else:
        _live(given.folder, planned(60, 20, LIVE_RATES_MB_PER_S, 60), given.jobs, _say)
        scripted(given.folder, 1000, SCRIPTED_RATES_MB_PER_S, 0, _say)
        _peers(given.folder, given.jobs, _say)


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say; give the exit status: 1 where a run crashed."""
    words = list(arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["all", *words]
    parser = _parser()
    given = parser.parse_args(words)
    # As Ctrl-C does, it has to end what is under way.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if given.command in ("one", "under"):
            about = given.workload, given.leak_bytes_per_s, given.seed, given.duration
            print(json.dumps(one(*about, given.trace) if given.command == "one" else under(given.tool, *about)))
            return 0
        if given.out and not given.out.parent.is_dir():
            parser.error(f"--out is {given.out}: there is no folder {given.out.parent}")
        _do(given)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    if given.out:
        given.out.write_text(page(given.folder, given.command == "judge"), encoding="utf-8")
    crashed = sum("crash" in run for each in ("", "peers", "cost") for run in read_runs(given.folder / each))
    if crashed:
        print(f"{crashed} runs crashed: see {runs_file(given.folder)}", file=sys.stderr)
    return 1 if crashed else 0


def _terminated(_: int, __: FrameType | None) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
