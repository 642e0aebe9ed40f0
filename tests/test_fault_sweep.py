"""The exhaustive sweep: fail allocation 1, 2, 3 … of a whole dictation, and prove after each that nothing was lost.

pytest tests/test_fault_sweep.py -v
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from backends.contract import Backend, Capability
from qualification.judge import Judge
from qualification.sweep.campaign import PROBLEMS, Campaign, Outcome
from qualification.sweep.points import DEVICE_SWEEPS, SWEEPS, Point, Sweep

NewCampaign = Callable[..., Campaign]
Repeat = Callable[[str], str]
#: Of each scenario and target, in one of the two modes, the sample tries so many points.
SAMPLED = 1
#: Of more failures only the number is said.
SHOWN = 20


@pytest.mark.oom
@pytest.mark.sweep
class TestFaultSweep:
    """Is anything lost, whichever single allocation fails?"""

    def test_fault_sweep_sample(
        self, campaign: NewCampaign, backend: Backend, point: Point | None, judge: Judge, repeat: Repeat
    ) -> None:
        """A seeded sample of the sweep, of every scenario.

        Pass criteria:
        - A fault fires in every scenario
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was accepted
        - Every answer that of the undisturbed run
        - User told of everything that was degraded
        - No hang
        - Retries bounded
        - No disorderly death of the host
        - Memory back at its baseline
        - The next run right
        - No feed returns without a sync since its write
        """
        sweep(campaign, possible(backend, (*SWEEPS, *DEVICE_SWEEPS)), point, judge, repeat, sample=SAMPLED)

    @pytest.mark.slow
    def test_fault_sweep(
        self, campaign: NewCampaign, backend: Backend, point: Point | None, judge: Judge, repeat: Repeat
    ) -> None:
        """Every allocation of host memory, in the subject's process and in those below it.

        Pass criteria:
        - A fault fires in every scenario
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was accepted
        - Every answer that of the undisturbed run
        - User told of everything that was degraded
        - No hang
        - Retries bounded
        - No disorderly death of the host
        - Memory back at its baseline
        - The next run right
        - No feed returns without a sync since its write
        """
        sweep(campaign, possible(backend, SWEEPS), point, judge, repeat)

    @pytest.mark.slow
    @pytest.mark.gpu
    @pytest.mark.needs("device_allocation_faults")
    def test_device_fault_sweep(
        self, campaign: NewCampaign, backend: Backend, point: Point | None, judge: Judge, repeat: Repeat
    ) -> None:
        """Every allocation of the device's own memory, and every launch of a kernel.

        Pass criteria:
        - A fault fires in every scenario
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was accepted
        - Every answer that of the undisturbed run
        - User told of everything that was degraded
        - No hang
        - Retries bounded
        - No disorderly death of the host
        - Memory back at its baseline
        - The next run right
        - No feed returns without a sync since its write
        """
        backend.require(Capability.DEVICE_ALLOCATION_FAULTS)
        sweep(campaign, possible(backend, DEVICE_SWEEPS), point, judge, repeat)


def possible(backend: Backend, sweeps: Sequence[Sweep]) -> tuple[list[Sweep], dict[str, str]]:
    """Give the sweeps whose scenario this backend can bring about, and why the others are not run, by name."""
    found, not_run = [], {}
    for each in sweeps:
        support = backend.capabilities[each.needs]
        if support.yes:
            found.append(each)
        else:
            not_run[each.name] = support.reason
    return found, not_run


def sweep(
    campaign: NewCampaign,
    sweeps: tuple[list[Sweep], dict[str, str]],
    point: Point | None,
    judge: Judge,
    repeat: Repeat,
    sample: int | None = None,
) -> None:
    """Try all points of some sweeps, or the one that is asked for, and judge what came of them."""
    found, not_run = sweeps
    if point is not None:
        if point.sweep.name not in {each.name for each in found}:
            pytest.skip(f"{point.name} is no point of this test")
        played = campaign([point.sweep])
        played.try_point(point)
    else:
        played = campaign(found, sample, not_run)
        played.run()
    for failure in played.failures[:SHOWN]:
        for line in described(failure, repeat):
            judge.say(line)
    if len(played.failures) > SHOWN:
        judge.say(f"and {len(played.failures) - SHOWN} more points failed")
    record = played.record()
    unswept = played.unfired()
    if unswept:
        judge.say(f"no fault fired in {', '.join(unswept)}")
    unfinished = played.incomplete() if point is None else []
    if unfinished:
        judge.say(f"did not come to a run in which no fault fired: {', '.join(unfinished)}")
    judge("scenarios_unswept", len(unswept) + len(unfinished), fault=record)
    for kind in PROBLEMS:
        if played.recovers or kind not in ("samples_lost", "samples_different"):
            judge(kind, played.count(kind), fault=record)
    judge.end("not_run", "the subject does not say what a user could get back: recovered()")
    played.ledger.done()


def described(failure: Outcome, repeat: Repeat) -> list[str]:
    """Say what was wrong after a point, where it struck, and how it is repeated."""
    return [
        *(f"{failure.point}: {kind}: {text}" for kind, text in failure.problems),
        *([f"    struck {failure.detail}"] if failure.detail else []),
        *([f"    {' < '.join(failure.call_site[:8])}"] if failure.call_site else []),
        f"    repeat: {repeat(failure.point)}",
    ]
