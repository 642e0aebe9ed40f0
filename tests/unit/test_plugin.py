"""The plugin's own rules, where no run is needed to see them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qualification import records
from qualification.plugin import _from_root
from qualification.run import ROOT
from tests.meta.qualifying import qualify

SWEEP = "tests/test_fault_sweep.py"
SAMPLE = f"{SWEEP}::TestFaultSweep::test_fault_sweep_sample"


def test_the_paths_of_a_repeat_command_are_those_of_the_root(tmp_path: Path) -> None:
    assert _from_root(ROOT, "tests/meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", "meta/broken.py") == "tests/meta/broken.py"
    assert _from_root(ROOT / "tests", Path("../README.md")) == "README.md"
    assert _from_root(tmp_path, "mine.py") == str(tmp_path.resolve() / "mine.py")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "coffee/host/transient/1",
            "expected SCENARIO/TARGET/MODE/NUMBER, begun by one of start/host, start/runtime, ",
        ),
        ("feed/host/often/1", "after feed/host expected /transient or /persistent, and / with a number from 1"),
        ("feed/host/transient/0", "after feed/host expected /transient or /persistent, and / with a number from 1"),
        ("feed/host/transient/first", "after feed/host expected /transient or /persistent, and / with a number from 1"),
    ],
)
def test_what_names_no_point_of_the_sweep_is_a_usage_error(tmp_path: Path, name: str, expected: str) -> None:
    outcome = qualify(tmp_path / "results", SWEEP, "--point", name)
    assert outcome.status == 4, f"pytest ended with {outcome.status}: {outcome.output}"
    assert f"argument --point: --point {name}: {expected}" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    assert not (tmp_path / "results").exists(), "a run that was refused left results"


@pytest.mark.parametrize("share", ["0/2", "3/2", "x", "1/", "1/2/3"])
def test_what_is_no_share_of_the_sweep_is_a_usage_error(tmp_path: Path, share: str) -> None:
    outcome = qualify(tmp_path / "results", SWEEP, f"--shard={share}")
    assert outcome.status == 4, f"pytest ended with {outcome.status}: {outcome.output}"
    expected = f"argument --shard: {share!r}: expected K/N, a share from 1 to N and their number, such as 1/4"
    assert expected in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"CC": "/nonexistent/cc"},
            "there is no C compiler (/nonexistent/cc) to compile interposer.c with: install one",
        ),
        ({"LD_PRELOAD": "libm.so.6"}, "LD_PRELOAD is libm.so.6 already"),
    ],
    ids=["no compiler", "LD_PRELOAD"],
)
def test_where_nothing_can_be_refused_the_sweep_is_not_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str
) -> None:
    for name, value in {**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    outcome = qualify(tmp_path / "results", SAMPLE, "--backend", "cpu")
    assert outcome.status == 0 and "1 not run" in outcome.output, f"status {outcome.status}: {outcome.output}"
    assert f"NOT RUN {SAMPLE} - {reason}" in outcome.output, f"the reason is not told: {outcome.output}"
    (written,) = (tmp_path / "results").glob("*.jsonl")
    found = records.read(written)
    verdicts = {each["verdict"] for each in found.criteria}
    assert verdicts == {"not_run"} and not found.sweeps, f"verdicts {verdicts}, sweeps {found.sweeps}"
