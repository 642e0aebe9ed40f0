"""The benchmark of the verdict on leaks: its bounds and traces are right, its leaks are there, and nothing is lost.

Benchmarks are run, not imported: nothing of ours depends on them (test_arrows.py).
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "leaks.py"))
TRACES = runpy.run_path(str(ROOT / "benchmarks" / "leak_traces.py"))
Planned, make, read_runs, planned = (BENCHMARK[each] for each in ("Planned", "make", "read_runs", "planned"))
live_table, peers_table, TOOLS = (BENCHMARK[each] for each in ("live_table", "peers_table", "TOOLS"))
clopper_pearson, scripted, resampled = (TRACES[each] for each in ("clopper_pearson", "scripted", "resampled"))
MB = 1_000_000


def nothing(_: str) -> None:
    """Say nothing."""


# Bounds.


@pytest.mark.parametrize(
    ("hits", "tries", "confidence", "lower", "upper"),
    # The first by hand: 1 - 0.005 ** (1 / 60). The others are what R's binom.test gives.
    [
        (0, 60, 0.99, 0.0, 0.0845187),
        (60, 60, 0.99, 0.9154813, 1.0),
        (5, 20, 0.95, 0.0865715, 0.4910459),
        (1, 100, 0.95, 0.0002531, 0.0544594),
        (50, 100, 0.95, 0.3983211, 0.6016789),
    ],
)
def test_the_bounds_are_those_of_clopper_and_pearson(
    hits: int, tries: int, confidence: float, lower: float, upper: float
) -> None:
    assert clopper_pearson(hits, tries, confidence) == pytest.approx((lower, upper), abs=1e-6)


def test_thousands_of_tries_are_no_overflow() -> None:
    lower, upper = clopper_pearson(3, 5000)
    assert 0 < lower < 3 / 5000 < upper < 0.003


@pytest.mark.parametrize(("hits", "tries"), [(0, 0), (3, 2), (-1, 2)])
def test_counts_that_cannot_be_are_refused(hits: int, tries: int) -> None:
    with pytest.raises(ValueError, match=f"{hits} hits in {tries} tries"):
        clopper_pearson(hits, tries)


# Computed traces.


@pytest.mark.parametrize("number", range(len(TRACES["SHAPES"])))
def test_a_scripted_leak_is_a_line_on_top_of_the_same_healthy_trace(number: int) -> None:
    name, t_s, healthy = scripted(number, 0.0, seed=5)
    same_name, _, leaking = scripted(number, 200_000.0, seed=5)
    assert name == same_name and np.all(np.diff(t_s) > 0) and len(t_s) == 480
    # Both are rounded to what an allocator asks for at once.
    added = leaking["heap_used_bytes"] - healthy["heap_used_bytes"]
    assert np.abs(added - 200_000.0 * t_s).max() <= max(TRACES["QUANTA_BYTES"])


def test_resampled_traces_are_blocks_of_live_noise_and_the_planted_line() -> None:
    rest = np.arange(190.0)
    live = [("noisy", {"heap_used_bytes": rest, "uss_bytes": 2 * rest, "workers_heap_bytes": 3 * rest})]
    name, t_s, used = resampled(live, 3, 50_000.0, seed=1)
    line = 50_000.0 * t_s
    noise = (used["heap_used_bytes"] - 100 * MB - line).round()
    assert name == "noisy" and len(noise) == 480 and set(noise) <= set(rest)
    assert (np.diff(noise) % len(rest) == 1).sum() >= 480 - 24, "a block of noise was torn apart"
    # All series of a run at the same time, and nothing is planted in the workers.
    assert np.allclose(used["uss_bytes"] - 100 * MB - line, 2 * noise)
    assert np.allclose(used["workers_heap_bytes"] - 100 * MB, 3 * noise)


def test_what_is_inconclusive_is_judged_once_more_when_extended() -> None:
    """A leak that begins at 45 s is not proved in 60 s, and is in 120 s; what is proved is not judged again."""

    def late(number: int, rate: float, seed: int) -> tuple[str, Any, dict[str, Any]]:
        t_s = np.arange(480) * 0.25
        return "late", t_s, {"heap_used_bytes": 1e8 + rate * np.maximum(0, t_s - number)}

    judged = [TRACES["judge_one"](late, 0, (begins_s, 1e6))[2:] for begins_s in (0, 45, 65)]
    assert judged == [("leak", "leak"), ("inconclusive", "leak"), ("no_leak", "no_leak")]


def test_the_noise_of_a_live_run_has_neither_its_warm_up_nor_its_slope() -> None:
    t_s = np.arange(100.0)
    used = 5 * MB * (t_s > 10) + 1000.0 * t_s
    assert np.abs(TRACES["residuals"](t_s, used)).max() < 1


# One run.


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Let both workloads leak 1 MB/s for 4 s, at the same time; give the record and the trace of each."""
    folder = tmp_path_factory.mktemp("one")
    under_way = {
        name: subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-m", "benchmarks.leaks", "one", "--workload", name),
                *("--leak-bytes-per-s", "1e6", "--seed", "7", "--duration", "4", "--trace", folder / f"{name}.csv"),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("noisy", "pipeline")
    }
    said = {name: process.communicate(timeout=90)[0] for name, process in under_way.items()}
    assert not any(process.returncode for process in under_way.values()), said
    return {name: (json.loads(text), BENCHMARK["read_trace"](folder / f"{name}.csv")) for name, text in said.items()}


@pytest.mark.parametrize("name", ["noisy", "pipeline"])
def test_what_is_planted_is_really_in_memory(name: str, ran: dict[str, tuple[Any, Any]]) -> None:
    record, trace = ran[name]
    assert (record["workload"], record["leak"], record["seed"]) == (name, 1e6, 7)
    assert record["samples"] == len(trace["heap_used_bytes"][0]) >= 4 and record["turns"] >= record["samples"]
    assert record["verdict"] in BENCHMARK["VERDICTS"] and set(record["naive"]) == {"first_to_last", "least_squares"}
    assert list(record["series"]) == list(trace)
    for series in record["series"].values():
        assert set(series) >= {"verdict", "slope", "lower", "upper", "reason"}

    t_s, heap = trace["heap_used_bytes"]
    assert 0 <= 4 * MB - record["kept_bytes"] <= 1.5 * MB
    grown, due = np.median(heap[-3:]) - np.median(heap[:3]), 1e6 * (t_s[-1] - t_s[0])
    # The live set of the noisy one comes and goes by some 0.3 MB.
    assert 0.4 * due < grown < 1.8 * due, f"{grown / MB:.2f} MB of {due / MB:.2f} MB"


def test_a_trace_reads_back_as_it_was_written(tmp_path: Path) -> None:
    t_s = [0.0, 0.25, 0.5]
    series = {"uss_bytes": (t_s, [1, 2, 3]), "heap_used_bytes": (t_s, [4, 5, 6])}
    BENCHMARK["write_trace"](tmp_path / "t.csv", series)
    read = BENCHMARK["read_trace"](tmp_path / "t.csv")
    assert {name: (list(a), list(b)) for name, (a, b) in read.items()} == series


# Many runs.

RUN = {"verdict": "no_leak", "series": {"heap_used_bytes": {"lower": -1e3}}, "naive": {"first_to_last": 2e6}}


def printing(record: object) -> Callable[[Any, Path], list[str]]:
    """Give a command that says this and ends."""
    return lambda *_: [sys.executable, "-c", f"print({json.dumps(record)!r})"]


def failing(*_: object) -> list[str]:
    """Give a command that fails."""
    return [sys.executable, "-c", "import sys; sys.exit('no memory left')"]


def test_the_plan_is_half_on_each_workload_with_another_seed_in_each_run() -> None:
    runs = planned(6, 4, [0.05, 0.2], 60.0)
    counted = {(name, rate): 0 for name in ("noisy", "pipeline") for rate in (0.0, 0.05, 0.2)}
    for run in runs:
        counted[run.workload, run.rate] += 1
    assert counted == {(name, rate): 2 if rate else 3 for name, rate in counted}
    assert len({run.seed for run in runs}) == len({run.key for run in runs}) == len(runs)
    assert runs == planned(6, 4, [0.05, 0.2], 60.0), "another order the next time"
    other = planned(6, 4, [0.05, 0.2], 60.0, trial=1)
    assert not {run.seed for run in runs} & {run.seed for run in other}, "another trial has the same seeds"


def test_a_trial_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    first, second = Planned("noisy", 0.0, 0, 1.0), Planned("noisy", 0.0, 1, 1.0)
    make(tmp_path, [first], 1, nothing, printing({**RUN, "n": 1}))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"key": "noisy-0-1s-001", "verd')
    said: list[str] = []
    make(tmp_path, [first, second], 1, said.append, printing({**RUN, "n": 2}))
    assert [(run["key"], run["n"]) for run in read_runs(tmp_path)] == [(first.key, 1), (second.key, 2)]
    assert said[0].startswith("1 of 2 runs are there already")
    make(tmp_path, [first, second], 1, nothing, failing)
    assert len(read_runs(tmp_path)) == 2


def test_a_run_that_crashed_is_no_healthy_run(tmp_path: Path) -> None:
    runs = [Planned("noisy", 0.0, n, 1.0) for n in range(2)]
    make(tmp_path, runs[:1], 1, nothing, printing(RUN))
    make(tmp_path, runs, 1, nothing, failing)
    found = read_runs(tmp_path)
    assert "exit status 1: no memory left" in found[1]["crash"] and "verdict" not in found[1]
    cells = [cell.strip() for cell in live_table(found).splitlines()[2].split("|")]
    # Seconds, runs, leaks, their bounds, no leak, inconclusive, crashed.
    assert cells[1:10] == ["noisy", "healthy", "1", "2", "0", "0.0% to 92.9%", "1", "0", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.leaks", "live", "--folder", tmp_path, "--healthy", "0", "--planted", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "1 runs crashed" in done.stderr, done.stderr


def test_what_says_something_else_than_a_record_is_a_crash_too(tmp_path: Path) -> None:
    make(tmp_path, [Planned("noisy", 0.0, 0, 1.0)], 1, nothing, lambda *_: [sys.executable, "-c", "print('hello')"])
    assert "no record: hello" in read_runs(tmp_path)[0]["crash"]


def test_ctrl_c_ends_what_is_under_way_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    runs = [Planned("noisy", 0.0, n, 1.0) for n in range(2)]

    def command(run: Any, _: Path) -> list[str]:
        wait = f"import time; time.sleep(60)  # {tmp_path}"
        return printing(RUN)(run, _) if run.number == 0 else [sys.executable, "-c", wait]

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, runs, 2, interrupted, command)
    assert [run["key"] for run in read_runs(tmp_path)] == [runs[0].key]
    left = [each for each in psutil.Process().children() if f"# {tmp_path}" in " ".join(each.cmdline())]
    assert not left


def test_traces_that_were_kept_are_judged_again(tmp_path: Path) -> None:
    t_s = np.arange(240) * 0.25
    for key, rate in (("a", 0.0), ("b", 1e6)):
        series = {"uss_bytes": (t_s, 1e8 + rate * t_s)}
        BENCHMARK["write_trace"](BENCHMARK["trace_of"](tmp_path, key), series)
    runs = [{"key": "a", "verdict": "leak"}, {"key": "b", "verdict": "no_leak"}, {"key": "c", "crash": "it did"}]
    assert [run.get("verdict") for run in BENCHMARK["again"](tmp_path, runs)] == ["no_leak", "leak", None]


# Peers.


def test_a_peer_that_is_not_installed_is_not_run_and_the_table_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def missing(name: str) -> None:
        asked.append(name)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert [name for name, tool in TOOLS.items() if not tool.missing] == ["nothing", "plimsoll"]
    assert asked == ["psleak", "pytest_memray"]
    rows = peers_table([], []).splitlines()
    assert rows[3].startswith("| psleak | not run: not installed: python -m pip install psleak |")
    assert rows[4].startswith("| pytest-memray | not run: not installed: python -m pip install pytest-memray |")


def test_false_alarms_and_missed_leaks_are_counted_apart() -> None:
    found = [(0.0, "leak"), (0.0, "no_leak"), (0.2, "no_leak"), (0.2, "leak"), (0.05, "inconclusive")]
    runs = [
        {"tool": "psleak", "workload": "cache", "rate": rate, "verdict": verdict, "turns": 10, "seconds": 5.0}
        for rate, verdict in found
    ]
    cost = [{"tool": tool, "turns": 100, "seconds": s} for tool, s in (("nothing", 1.0), ("psleak", 2.0))]
    row = peers_table([*runs, {"tool": "psleak", "rate": 0.2, "crash": "it did"}], cost).splitlines()[3]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    alarms = "churn 0 of 0, cache 1 of 2, noisy 0 of 0"
    assert cells == ["psleak", "1 of 2", "2 of 3", "1", "1", alarms, "5 to 5", "50 (0.50 of 100)"]


# The page.


def test_the_page_has_what_the_folder_has(tmp_path: Path) -> None:
    make(tmp_path, [Planned("noisy", 0.0, 0, 1.0)], 1, nothing, printing(RUN))
    BENCHMARK["scripted"](tmp_path, 14, [0.2], 0, nothing)
    text = BENCHMARK["page"](tmp_path)
    assert "## Live" in text and "nox -s bench-leaks -- --out docs/leaks-measured.md" in text
    assert "| scripted | 0.2 MB/s | 14 |" in text and "## Peers" not in text
    assert str(ROOT) not in text and str(tmp_path) not in text
