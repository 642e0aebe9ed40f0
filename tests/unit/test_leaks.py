"""A leak is found; noise, a warm-up, a step and a rhythm are none. The command says the same of a file."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qualification import leaks
from qualification.leaks import LeakVerdict, judge

ROOT = Path(__file__).resolve().parents[2]

Floats = NDArray[np.float64]
Shape = Callable[[Floats], NDArray[np.floating[Any]]]
T_S: Floats = np.arange(0, 60, 0.25)
BASE_BYTES = 200e6


def _judge(shape: Shape, seed: int, noise_bytes: float = 0.3e6) -> LeakVerdict:
    noise = np.random.default_rng(seed).normal(0, noise_bytes, len(T_S))
    return judge(T_S, BASE_BYTES + shape(T_S) + noise)


HEALTHY: dict[str, Shape] = {
    "steady": lambda t: 0 * t,
    "warm-up that saturates": lambda t: 30e6 * (1 - np.exp(-t / 3)),
    "one-off step early": lambda t: 10e6 * (t > 20),
    "one-off step in the middle": lambda t: 10e6 * (t > 36),
    "one-off step late": lambda t: 10e6 * (t > 55),
    "two steps": lambda t: 4e6 * (t > 20) + 3e6 * (t > 41),
    "step down": lambda t: -10e6 * (t > 30),
    "warm-up that ends": lambda t: 20e6 * np.minimum(1, t / 20),
    "cache that fills and stays full": lambda t: 5e6 * np.minimum(1, t / 24),
    "sawtooth": lambda t: 2e6 * (t % 7) / 7,
    "tall sawtooth": lambda t: 8e6 * (t % 12) / 12,
    "bursts": lambda t: 40e6 * ((t % 23) < 1),
    "shrinking": lambda t: -0.2e6 * t,
    "growth below the floor": lambda t: 0.003e6 * t,
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("noise_bytes", [0.0, 0.3e6])
def test_healthy_is_no_leak(name: str, noise_bytes: float) -> None:
    """No false alarm in 30 seeded traces of each kind; without noise all are proved healthy, with it nearly all."""
    verdicts = [_judge(HEALTHY[name], seed, noise_bytes) for seed in range(30)]
    alarms = [v.reason for v in verdicts if v.verdict == "leak"]
    assert not alarms, f"{len(alarms)} of 30 traces judged wrongly: {alarms[:1]}"
    proved = sum(v.verdict == "no_leak" for v in verdicts)
    assert proved >= (24 if noise_bytes else 30), f"{proved} of 30 traces are proved healthy"


def test_a_sawtooth_that_is_slow_for_the_run_is_no_leak_and_not_proved_healthy() -> None:
    """Three teeth in the run: what it is can only be said after more of them."""
    verdicts = {_judge(lambda t: 8e6 * (t % 20) / 20, seed).verdict for seed in range(30)}
    assert "leak" not in verdicts, f"verdicts {verdicts}"
    longer = np.arange(0, 300, 0.25)
    assert judge(longer, 2e8 + 8e6 * (longer % 20) / 20).verdict == "no_leak"


@pytest.mark.parametrize("begins_s", [36, 42, 48])
def test_a_leak_that_begins_late_is_not_acquitted_by_the_time_before(begins_s: float) -> None:
    """Nor is it proved by it: it has to be watched for longer."""
    verdicts = [_judge(lambda t: 0.5e6 * np.maximum(0, t - begins_s), seed, 1e5).verdict for seed in range(20)]
    assert "no_leak" not in verdicts, f"{verdicts}"


@pytest.mark.parametrize("fades_s", [15, 20])
@pytest.mark.parametrize(("noise_bytes", "most"), [(2e4, 0), (0.3e6, 6)])
def test_a_warm_up_that_fades_as_slowly_as_the_run_allows_is_seldom_called_a_leak(
    fades_s: float, noise_bytes: float, most: int
) -> None:
    """With a time constant of a quarter and a third of the run. With the noise, less than the noise is left of it."""
    verdicts = [_judge(lambda t: 10e6 * (1 - np.exp(-t / fades_s)), seed, noise_bytes).verdict for seed in range(40)]
    assert verdicts.count("leak") <= most, f"{verdicts}"


def test_what_comes_and_goes_is_not_stable() -> None:
    """No leak, and memory that is not within 10 %: a rhythm and a warm-up count there."""
    for shape in (lambda t: 150e6 * (t % 12) / 12, lambda t: 100e6 * np.minimum(1, t / 10)):
        verdict = _judge(shape, 0, 1e5)
        assert verdict.verdict != "leak" and verdict.stability_fraction > 0.1, f"{verdict}"


def test_a_million_readings_take_seconds() -> None:
    """They become medians first; a rhythm is found in those."""
    at = np.arange(1_000_000.0)
    verdict = judge(at, 1e8 + 1e6 * (at % 100_000) / 1e5 + 0.05e6 * at, floor=1e4)
    assert verdict.verdict == "leak" and verdict.slope == pytest.approx(0.05e6, rel=0.02), f"{verdict}"


def test_noise_that_hides_a_leak_is_inconclusive() -> None:
    """With 8 MB of noise that lasts for seconds, 60 s cannot exclude 0.05 MB/s."""
    rng = np.random.default_rng(3)
    noise = np.convolve(rng.normal(0, 8e6, len(T_S) + 19), np.ones(20) / 4.5, "valid")
    verdict = judge(T_S, BASE_BYTES + noise)
    assert verdict.verdict == "inconclusive", f"{verdict}"
    assert "run longer" in verdict.reason, verdict.reason


@pytest.mark.parametrize("leak_bytes_per_s", [0.05e6, 0.2e6, 2e6])
@pytest.mark.parametrize("noise_bytes", [0.0, 0.3e6])
@pytest.mark.parametrize(
    "name", ["steady", "warm-up that saturates", "one-off step in the middle", "sawtooth", "bursts"]
)
def test_a_leak_is_found(name: str, noise_bytes: float, leak_bytes_per_s: float) -> None:
    """In all of 20 seeded traces, whatever healthy memory does beside it, and the slope is right within 40 %."""
    verdicts = [_judge(lambda t: HEALTHY[name](t) + leak_bytes_per_s * t, seed, noise_bytes) for seed in range(20)]
    missed = [each.reason for each in verdicts if each.verdict != "leak"]
    assert not missed, f"{len(missed)} missed: {missed}"
    for verdict in verdicts:
        assert verdict.slope == pytest.approx(leak_bytes_per_s, rel=0.4), f"{verdict}"
        assert verdict.lower <= verdict.slope <= verdict.upper, f"{verdict}"


def test_a_leak_that_follows_the_work_is_found_where_the_work_slows_down() -> None:
    """To two thirds of its pace, on a machine that has other work, and back."""
    pace = np.where((T_S > 20) & (T_S < 40), 0.66, 1.0)
    grown = np.concatenate([[0.0], np.cumsum(0.25 * pace[1:])])
    verdicts = [_judge(lambda t: 0.5e6 * grown, seed, 1e5).verdict for seed in range(20)]
    assert set(verdicts) == {"leak"}, f"{verdicts}"


def test_a_staircase_leak_is_found() -> None:
    """1 MB every 2 s, as an exact counter shows it."""
    verdict = _judge(lambda t: 1e6 * (t // 2), seed=0, noise_bytes=0)
    assert verdict.verdict == "leak", verdict.reason


def test_two_steps_up_that_are_alike_prove_nothing() -> None:
    """What is lost every 25 s shows twice in 60 s: it is not proved healthy, and found when it goes on."""
    verdicts = [judge(t, BASE_BYTES + 10e6 * (t // 25)).verdict for t in (T_S, np.arange(0, 240, 0.25))]
    assert verdicts == ["inconclusive", "leak"], f"{verdicts}"


def test_two_steps_up_that_are_alike_hide_no_leak_and_are_none_where_more_would_have_followed() -> None:
    leaking = judge(T_S, BASE_BYTES + 0.2e6 * T_S + 10e6 * (T_S // 25))
    early = judge(T_S, BASE_BYTES + 4e6 * (T_S > 3) + 4e6 * (T_S > 9))
    assert (leaking.verdict, early.verdict) == ("leak", "no_leak"), f"{leaking} {early}"


def test_a_warm_up_is_half_of_the_time_at_most() -> None:
    """However many of the readings were taken at the end, where alone it grows: two seconds say nothing of a minute."""
    for at in (
        np.concatenate([np.linspace(0, 10, 100), np.linspace(50, 60, 140)]),
        np.concatenate([np.linspace(0, 10, 60), np.linspace(58, 60, 60)]),
        np.concatenate([np.linspace(0, 20, 12), np.linspace(58, 60, 12)]),
    ):
        verdict = judge(at, BASE_BYTES + 1e6 * np.maximum(0, at - at[len(at) // 2 + 2]))
        assert verdict.judged_from <= 33 and verdict.verdict == "inconclusive", f"{verdict}"


def test_readings_taken_close_together_count_as_one() -> None:
    """60 in a minute and 180 in its last second: what these do is no leak, and no half of what there is to know."""
    at = np.concatenate([np.arange(60.0), 59 + np.arange(1, 181) / 180])
    verdicts = [judge(at, BASE_BYTES + 1e6 * ((at + shift) % 5)).verdict for shift in range(5)]
    assert "leak" not in verdicts, f"{verdicts}"


def test_a_leak_under_a_sawtooth_is_found() -> None:
    """0.3 MB/s below a 2 MB sawtooth."""
    verdict = _judge(lambda t: 0.3e6 * t + 2e6 * (t % 4) / 4, seed=0)
    assert verdict.verdict == "leak", verdict.reason


def test_minima_judge_what_was_not_at_rest() -> None:
    """Half of the readings have up to 50 MB of work in hand on them: the least of each block does not."""
    rng = np.random.default_rng(1)
    used = BASE_BYTES + 0.1e6 * T_S + np.where(rng.random(len(T_S)) < 0.6, rng.uniform(0, 50e6, len(T_S)), 0)
    at_rest, minima = judge(T_S, used), judge(T_S, used, minima=True)
    assert at_rest.verdict == "inconclusive", f"{at_rest}"
    assert minima.verdict == "leak", f"{minima}"


def test_the_warm_up_is_found() -> None:
    """What is judged begins when the warm-up is over, and not before; without one, all is judged."""
    without = judge(T_S, BASE_BYTES + 0.1e6 * T_S + np.random.default_rng(0).normal(0, 1e4, len(T_S)))
    with_one = judge(T_S, BASE_BYTES + 20e6 * np.minimum(1, T_S / 15) + 0.1e6 * T_S)
    assert without.judged_from < 4, f"{without}"
    assert 12 < with_one.judged_from < 22, f"{with_one}"


def test_numbers_of_an_exact_line() -> None:
    """Slope, bounds, growth over the judged span and stability of a trace without noise."""
    verdict = judge(T_S, 100e6 + 1e6 * T_S)
    assert verdict.slope == verdict.lower == verdict.upper == pytest.approx(1e6)
    # 24 blocks of 2.5 s, and all of them judged: the outer ones lie 57.5 s apart.
    assert verdict.growth_bytes == pytest.approx(57.5e6), f"growth {verdict.growth_bytes}"
    assert verdict.stability_fraction == pytest.approx(28.75e6 / 129.875e6), f"stability {verdict.stability_fraction}"


def test_the_bounds_cover_the_truth_as_often_as_they_promise() -> None:
    """At 90 %, at most 15 % of 200 lower bounds lie above the true slope."""
    rng = np.random.default_rng(7)
    above = 0
    for _ in range(200):
        used = BASE_BYTES + 1e5 * T_S + rng.normal(0, 1e6, len(T_S))
        above += judge(T_S, used, confidence=0.9).lower > 1e5
    assert above <= 30, f"{above} of 200 lower bounds lie above the true slope"


def test_the_floor_is_the_callers() -> None:
    """The same trace is a leak under a floor and none above it."""
    used = BASE_BYTES + 1e6 * T_S
    verdicts = [judge(T_S, used, floor=floor).verdict for floor in (0.9e6, 1.1e6)]
    assert verdicts == ["leak", "no_leak"], f"{verdicts} for floors of 0.9 and 1.1 MB/s"


def test_cycles_have_a_floor_of_their_own() -> None:
    """5 kB a cycle is a leak by the cycle, and nothing by the second."""
    cycles = np.arange(100.0)
    by_cycle, by_second = (judge(cycles, 1e8 + 5e3 * cycles, unit=unit) for unit in ("cycle", "s"))
    assert (by_cycle.verdict, by_second.verdict) == ("leak", "no_leak"), f"{by_cycle}, {by_second}"
    assert "kB per cycle" in by_cycle.reason and by_cycle.plain()["slope_bytes_per_cycle"] == pytest.approx(5e3)


@pytest.mark.parametrize(("samples", "verdict"), [(0, "inconclusive"), (23, "inconclusive"), (24, "leak")])
def test_too_little_is_inconclusive(samples: int, verdict: str) -> None:
    """24 samples are enough; with fewer the numbers are NaN."""
    t = np.arange(samples, dtype=float)
    judged = judge(t, 1e6 * t)
    assert judged.verdict == verdict, f"{samples} samples: {judged}"
    assert math.isnan(judged.slope) == (verdict == "inconclusive"), f"{samples} samples: {judged}"


def test_a_counter_at_zero_is_stable() -> None:
    """Nothing in use is no leak, and no division by zero."""
    verdict = judge(T_S, 0 * T_S)
    assert (verdict.verdict, verdict.stability_fraction) == ("no_leak", 0.0), f"{verdict}"


@pytest.mark.parametrize(
    ("t_s", "used", "confidence", "message"),
    [
        ([0, 2, 1], [1, 1, 1], 0.99, r"at\[2\] is 1.0, after 2.0"),
        ([0, 1, 1], [1, 1, 1], 0.99, "expected numbers that increase"),
        ([0, 1], [1, math.nan], 0.99, r"used_bytes\[1\] is nan"),
        ([0, math.inf], [1, 1], 0.99, r"at\[1\] is inf"),
        ([0, 1], [1], 0.99, r"shape \(2,\), used_bytes \(1,\)"),
        ([[0, 1]], [[1, 1]], 0.99, "one dimension"),
        ([0, 1], [1, 1], 1.0, "confidence is 1.0"),
    ],
)
def test_bad_input_is_refused(t_s: list[float], used: list[float], confidence: float, message: str) -> None:
    """The message says where and what."""
    with pytest.raises(ValueError, match=message):
        judge(t_s, used, confidence=confidence)


@pytest.mark.parametrize("options", [{"unit": "hour"}, {"floor": -1.0}, {"floor": math.nan}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        judge([0, 1], [1, 1], **options)


# The command.


def _lines(shape: Shape, header: str = "t_s,bytes") -> str:
    noise = np.random.default_rng(0).normal(0, 1e5, len(T_S))
    rows = zip(T_S.tolist(), (BASE_BYTES + shape(T_S) + noise).tolist(), strict=True)
    return "\n".join([header, *(f"{t},{used:.0f}" for t, used in rows)]) + "\n"


def _command(
    text: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = leaks.main(["-", *arguments])
    said = capsys.readouterr()
    return status, json.loads(said.out), said.err


@pytest.mark.parametrize(
    ("shape", "status", "verdict"),
    [(HEALTHY["steady"], 0, "no_leak"), (lambda t: 1e5 * t, 1, "leak")],
)
def test_the_command_judges_a_file(shape: Shape, status: int, verdict: str, tmp_path: Path) -> None:
    """As a user would: one JSON object, the exit status, and nothing else is imported but NumPy."""
    path = tmp_path / "trace.csv"
    # As a spreadsheet writes it.
    path.write_text("\ufeff" + _lines(shape).replace("\n", "\r\n"), encoding="utf-8")
    program = (
        "import sys; from qualification import leaks; status = leaks.main(sys.argv[1:]); "
        "print(sorted({'psutil', 'pytest', 'torch', 'onnxruntime'} & set(sys.modules))); raise SystemExit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said, imported = done.stdout.splitlines()
    found = json.loads(said)
    assert (done.returncode, found["verdict"], imported) == (status, verdict, "[]"), done.stdout + done.stderr
    assert set(found) >= {"verdict", "slope_bytes_per_s", "lower", "upper", "reason"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the header is ''"),
        ("time,bytes\n1,2\n", "expected t_s,bytes or cycle,bytes"),
        ("t_s,rss\n1,2\n", "expected t_s,bytes or cycle,bytes"),
        ("t_s,bytes\n0,1\n2,1\n1,1\n", "line 4: t_s is 1, after 2: expected it to increase"),
        ("t_s,bytes\n0,1\n0,1\n", "line 3: t_s is 0, after 0: expected it to increase"),
        ("t_s,bytes\n0,nan\n", "line 2 has '0,nan': expected finite numbers"),
        ("t_s,bytes\ninf,1\n", "line 2 has 'inf,1': expected finite numbers"),
        ('t_s,bytes\n0,"' + "x" * 200_000, "field larger than field limit"),
        (
            "t_s,bytes\n0,1\n1,1e300\n" + "".join(f"{n},1\n" for n in range(2, 30)),
            "expected finite numbers up to 1e+18",
        ),
        ("t_s,bytes\n0,many\n", "line 2 is '0,many': expected numbers for t_s,bytes"),
        ("t_s,bytes\n0\n", "line 2 is '0': expected numbers for t_s,bytes"),
    ],
)
def test_a_bad_trace_is_said_clearly(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, said = _command(text, monkeypatch=monkeypatch, capsys=capsys)
    assert (status, found["verdict"]) == (2, "inconclusive"), f"{found}"
    assert message in found["reason"] and message in said, f"{found} {said}"


def test_too_few_rows_and_numbers_that_are_none_are_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found, _ = _command("cycle,bytes\n1,5\n2,6\n", monkeypatch=monkeypatch, capsys=capsys)
    assert (status, found["verdict"], found["slope_bytes_per_cycle"]) == (2, "inconclusive", None), f"{found}"
    assert found["reason"] == "2 readings: at least 24 are needed"


def test_the_options_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another column, and another floor."""
    text = _lines(lambda t: 1e5 * t, "t_s,uss_bytes")
    status, found, _ = _command(text, "--column", "uss_bytes", monkeypatch=monkeypatch, capsys=capsys)
    assert (status, found["verdict"]) == (1, "leak"), f"{found}"
    options = ("--column", "uss_bytes", "--floor", "200000")
    assert _command(text, *options, monkeypatch=monkeypatch, capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    "redirected", ["TRACE >/dev/full", "TRACE >&-", "- <&-", "nowhere.csv 2>/dev/full", "TRACE >/dev/full 2>/dev/full"]
)
def test_what_cannot_be_read_or_written_is_no_leak_found(redirected: str, tmp_path: Path) -> None:
    """A status of 1 would say that there is one."""
    path = tmp_path / "trace.csv"
    path.write_text(_lines(HEALTHY["steady"]), encoding="utf-8")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m qualification.leaks {redirected.replace("TRACE", str(path))}', sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, f"{done.returncode}: {done.stderr}"
    said_at_all = "2>" not in redirected
    assert ("cannot be written" in done.stderr or "input is closed" in done.stderr) == said_at_all, done.stderr


def test_a_file_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert leaks.main(["nowhere.csv"]) == 2
    said = capsys.readouterr()
    assert "nowhere.csv" in said.err and json.loads(said.out)["verdict"] == "inconclusive"


def test_the_trace_that_ships_leaks_as_it_was_planted(capsys: pytest.CaptureFixture[str]) -> None:
    """0.05 MB/s, recorded live: what the README shows."""
    status = leaks.main([str(ROOT / "tests" / "data" / "leaking.csv")])
    found = json.loads(capsys.readouterr().out)
    assert status == 1 and found["lower"] < 50_000 < found["upper"], f"{found}"
