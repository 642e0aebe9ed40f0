"""The sweep finds each planted defect by the criterion that promises the opposite, and its command repeats it."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.faults import interposer
from qualification.sweep import campaign as campaigns
from qualification.sweep.campaign import Campaign, Ledger, Outcome
from qualification.sweep.points import SWEEPS
from qualification.sweep.stage import Setting
from tests.meta.qualifying import ROOT, qualify

BROKEN = "tests/meta/broken_sweep.py"
SAMPLE = "tests/test_fault_sweep.py::TestFaultSweep::test_fault_sweep_sample"
#: Of each sweep, where a subject is sound.
SAMPLED = 3
HANG_S = 20.0

SWALLOWS, LEAKS, LOSES = "gives_zeros_without_memory", "forgets_a_session", "acknowledges_what_was_not_written"
DEFECTS = [
    (SWALLOWS, "inference/host", "answers_wrong"),
    (LEAKS, "cache_clear/host", "memory_kept"),
    (LOSES, "feed/host", "samples_lost"),
    ("syncs_no_more_after_a_failure", "feed/host", "feeds_not_durable"),
    ("watches_until_a_reading_fails", "pressure/host", "untold"),
]


class _Found(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _interposer() -> None:
    if (refused := interposer.refusal()) is not None:
        pytest.skip(refused)


NewCampaign = Callable[..., Campaign]


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[NewCampaign]:
    made: list[Campaign] = []

    def make(subject: str, *names: str, sample: int | None = None) -> Campaign:
        def setting(folder: str) -> Setting:
            return Setting(
                subject=f"{ROOT / BROKEN}:{subject}",
                backend="cpu",
                device=None,
                model=str(ROOT / "tests" / "data" / "small.onnx"),
                audio=str(ROOT / "tests" / "data" / "speech.wav"),
                device_limit_bytes=24_000_000,
                block_samples=6400,
                folder=folder,
            )

        sweeps = [each for each in SWEEPS if each.name in names]
        made.append(Campaign(setting, sweeps, 5, Ledger(None, {}), tmp_path / "sweep", sample=sample))
        return made[-1]

    yield make
    for each in made:
        each.ledger.close()


def first_failure(played: Campaign, kind: str) -> Outcome:
    """Sweep until something fails by this criterion, and no further."""

    def found() -> list[Outcome]:
        return [each for each in played.failures if kind in dict(each.problems)]

    def stop(_: str) -> None:
        if found():
            raise _Found

    played.say = stop
    with contextlib.suppress(_Found):
        played.run()
    assert found(), f"{kind} is not found; failures: {played.failures}; {[t.plain() for t in played.tallies.values()]}"
    return found()[0]


def as_printed(command: str, results: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its letter. Where it records, and that it waits for others, is no part of it."""
    python, *arguments = shlex.split(command)
    assert python == "python"
    environment = {**os.environ, "PYTEST_ADDOPTS": shlex.join(["--results", str(results), "--lock-wait", "600"])}
    words = [sys.executable, *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)


@pytest.mark.parametrize(("defect", "sweep", "kind"), DEFECTS, ids=[defect for defect, _, _ in DEFECTS])
def test_a_defect_is_found_and_the_printed_command_repeats_it(
    defect: str, sweep: str, kind: str, campaign: NewCampaign, tmp_path: Path
) -> None:
    point = first_failure(campaign(defect, sweep), kind).point
    subject = f"{BROKEN}:{defect}"
    run = qualify(tmp_path / "results", SAMPLE, "--backend", "cpu", "--subject", subject, "--point", point)
    assert run.status == 1, f"exit status {run.status}, expected 1:\n{run.output[-3000:]}"
    assert kind in run.broken(), f"{point} broke {run.broken()}, expected {kind}:\n{run.output[-3000:]}"
    assert f"{point}: {kind}: " in run.output, run.output[-3000:]
    printed = {line.split("repeat:")[1].strip() for line in run.output.splitlines() if "repeat:" in line}
    assert printed == {f"python -m pytest {SAMPLE} --backend cpu --subject {subject} --point {point}"}
    if defect == LOSES:
        again = as_printed(printed.pop(), tmp_path / "again")
        assert again.returncode == 1 and f"{point}: {kind}: " in again.stdout, again.stdout[-3000:] + again.stderr


def test_a_healthy_subject_passes_the_same_sweeps(campaign: NewCampaign) -> None:
    played = campaign("healthy", *{sweep for _, sweep, _ in DEFECTS}, sample=SAMPLED)
    played.run()
    assert not played.failures, played.failures
    assert not played.unfired(), f"no fault fired in {played.unfired()}"


def test_a_subject_that_never_syncs_is_found_without_a_fault(campaign: NewCampaign) -> None:
    played = campaign("never_syncs", "feed/host", sample=1)
    played.run()
    assert played.count("feeds_not_durable") == 1, played.failures
    assert played.unfired() == ["feed/host"]


def test_a_subject_that_hangs_is_found_within_the_deadline(
    campaign: NewCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ninety seconds are for slow machines; that they have to pass is no part of it.
    monkeypatch.setattr(campaigns.Driver, "ask", functools.partialmethod(campaigns.Driver.ask, HANG_S))
    failure = first_failure(campaign("waits_for_a_thread_that_is_gone", "inference/host"), "hangs")
    assert failure.fired, f"{failure} is no hang of a point that fired"
    assert f"no answer within {HANG_S:g} s" in dict(failure.problems)["hangs"]
