"""Recovery from running out of memory: detection, degradation, data, repeated failures, metrics.

pytest tests/test_oom_recovery.py -v
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from backends.contract import ArmedFault, Backend, Capability, FaultPlan, FaultRecord, Provenance, Site
from backends.errors import ErrorKind, classify
from backends.faults.ballast import HostBallast
from backends.faults.cgroup import CgroupUnavailable, MemoryCgroup
from backends.host import spendable_bytes
from qualification.host import MB, Hosted
from qualification.judge import Judge
from qualification.observe import counts, first_recovery, recovered, same_output, strategies, wait_for_event, wait_until
from qualification.progress import Progress
from qualification.quoting import quoted
from qualification.storage import (
    Disk,
    DiskOutside,
    StorageUnavailable,
    is_mounted,
    limit_file_size,
    make_image,
    repair,
)
from qualification.stream import Stream, unanswered, untiled, wrong
from qualification.subject import (
    METRIC_OOMS,
    METRIC_RECOVERIES_ATTEMPTED,
    METRIC_RECOVERIES_SUCCEEDED,
    METRIC_RECOVERY_LATENCY_MAX,
    STRATEGIES,
    Event,
    Result,
    Subject,
)
from qualification.survival import PAUSE_S, Killing, Toll, Unfinished, suspended

SECOND = 16_000
NewBackend = Callable[[int], Backend]
NewSubject = Callable[..., Subject]
NewProgress = Callable[[float | None], Progress]
Parameter = Callable[[str], float]
Undisturbed = Callable[..., Sequence[Result]]
#: So much free device memory is enough for a small batch of the model that ships, and too little for a full one.
SOME_BYTES = 16 * MB


def has_fired(fault: ArmedFault) -> bool:
    """Say whether a fault has fired."""
    return fault.record().faults_fired > 0


def total(records: Sequence[FaultRecord]) -> FaultRecord:
    """Add up what became of several faults; one that never fired makes the whole unfired."""
    fired = sum(record.faults_fired for record in records)
    if any(record.faults_fired == 0 for record in records):
        fired = 0
    provenance = next((record.provenance for record in records if record.provenance), None)
    detail = f"{len(records)} faults, each fired {[record.faults_fired for record in records]} times"
    return FaultRecord(
        sum(record.points_seen for record in records),
        fired,
        sum(record.absorbed for record in records),
        provenance if fired else None,
        detail,
    )


@pytest.mark.oom
class TestOOMDetection:
    """Does it notice, and say so?"""

    def test_oom_detection(self, backend: Backend, new_subject: NewSubject, stream: Stream, judge: Judge) -> None:
        """OOM condition detection.

        Pass criteria:
        - OOM detected on impossible allocation
        - Appropriate error raised
        - Counter incremented
        """
        raised: Exception | None = None
        try:
            backend.allocate(2 * (backend.memory().limit_bytes or 0))
        except Exception as error:
            raised = error
        kind = classify(raised) if raised else ErrorKind.OTHER
        text = f"{type(raised).__name__}: {str(raised)[-120:]}"
        impossible = FaultRecord(1, int(raised is not None), 0, Provenance.CAPPED if raised else None, text)

        subject = new_subject(backend)
        before = subject.metrics()[METRIC_OOMS]
        with backend.arm(FaultPlan(Site.DEVICE_MEMORY)) as fault:
            stream.feed(subject, 0, 4 * SECOND)
            subject.drain(60)
            record = fault.record()
        counted = subject.metrics()[METRIC_OOMS] - before
        judge("ooms_undetected", not kind.is_oom, fault=impossible)
        judge("errors_misclassified", kind is not ErrorKind.DEVICE_OOM, fault=impossible)
        judge("ooms_uncounted", abs(record.faults_fired - counted), fault=record)

    def test_oom_notification_system(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, judge: Judge
    ) -> None:
        """Telling the user of an OOM.

        Pass criteria:
        - User notified of every OOM
        - Each notification says what happened, what was done, what it means
        - Notified within 1 s of the OOM
        """
        subject, records, delays, untold = new_subject(backend), [], [], 0
        for i in range(3):
            before = counts(subject)["oom_detected"]
            with backend.arm(FaultPlan(Site.DEVICE_MEMORY)) as fault:
                stream.feed(subject, 4 * i * SECOND, 4 * (i + 1) * SECOND)
                fired = wait_until(partial(has_fired, fault), 10)
                fired_s = time.monotonic()
                told = wait_for_event(subject, "oom_detected", before, 10)
                delays.append(time.monotonic() - fired_s)
                subject.drain(60)
                records.append(fault.record())
            untold += not (fired and told)
        incomplete = sum(not (event.message and event.action and event.meaning) for event in subject.events())
        judge("ooms_untold", untold, fault=total(records))
        judge("notifications_incomplete", incomplete, fault=total(records))
        judge("notification_delay", max(delays), fault=total(records))


@pytest.mark.oom
@pytest.mark.recovery
class TestGracefulDegradation:
    """Does it do the least that helps, in order?"""

    def test_progressive_recovery_strategies(
        self,
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        undisturbed: Undisturbed,
        hosted: Callable[..., Hosted],
        judge: Judge,
    ) -> None:
        """Recovery strategy progression: each OOM really needs one strategy more than the one before.

        Pass criteria:
        - Strategies tried in order
        - Each further strategy needed once
        - Recovery succeeds
        - System operational
        """
        stages = (
            # Only the runtime's own cache is in the way. Some runtimes clear it themselves, or have none.
            *cache_stage(backend, judge),
            # Garbage holds the memory: clearing the cache is not enough.
            (FaultPlan(Site.DEVICE_GARBAGE), "garbage_collect"),
            # Somebody else holds most of it: only a smaller batch fits.
            (FaultPlan(Site.DEVICE_MEMORY, times=None, min_bytes=SOME_BYTES), "reduce_buffer"),
            # Somebody else holds all of it.
            (FaultPlan(Site.DEVICE_MEMORY, times=None), "cpu_fallback"),
        )
        step = 32 * SECOND
        expected = undisturbed(*(step * (i + 1) for i in range(len(stages))))
        subject = new_subject(backend)
        device, records, tried, unrecovered = subject.device(), [], [], 0
        for i, (plan, _) in enumerate(stages):
            seen = len(subject.events())
            with backend.arm(plan) as fault:
                stream.feed(subject, step * i, step * (i + 1))
                subject.drain(60)
                records.append(fault.record())
            episode = of_first_recovery(subject.events()[seen:])
            tried.append(strategies(episode))
            unrecovered += not episode or episode[-1].kind != "recovered"
            wait_until(lambda: subject.device() == device, 5)
        # And when not even the fallback finds memory: the last strategy, in a process of its own.
        host = hosted(
            "starved",
            stop=32 * SECOND,
            # In one call, so that there is a batch to reduce.
            block_samples=32 * SECOND,
            faults=(
                FaultPlan(Site.DEVICE_MEMORY, times=None).to_json(),
                FaultPlan(Site.HOST_MEMORY, times=None, min_bytes=256_000).to_json(),
            ),
        )
        status = host.end(60)
        told = [kind for kind, _ in host.last("events") or [] if kind in STRATEGIES]
        tried.append(list(dict.fromkeys(told)))
        records += [FaultRecord.from_json(each) for each in host.all("fault")]

        needed = [*(stage[1] for stage in stages), "emergency_shutdown"]
        judge.say(f"strategies tried at each stage: {tried}")
        out_of_order = sum(each not in in_order(last) for each, last in zip(tried, needed, strict=True))
        judge("out_of_order", out_of_order, fault=total(records))
        judge(
            "not_needed",
            sum(each[-1:] != [last] for each, last in zip(tried, needed, strict=True)),
            fault=total(records),
        )
        judge("unrecovered", unrecovered + (status != 75), fault=total(records))
        judge("answers_wrong", wrong(subject.results(), expected, same_output(subject)), fault=total(records))

    def test_buffer_reduction_on_pressure(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """A smaller buffer under pressure, before there is an OOM.

        Pass criteria:
        - Buffer reduced at 90% pressure
        - No fallback while a smaller buffer is enough
        - No OOM on the way
        - Processing continues
        """
        step = 32 * SECOND
        expected = undisturbed(step, 2 * step)
        subject = new_subject(backend)
        stream.feed(subject, 0, step)
        subject.drain(60)
        reading = backend.memory()
        # One block, so that the pressure is there at once: in steps, clearing the cache would keep it away.
        ballast = backend.allocate(int(0.92 * device_limit(backend)) - reading.used_bytes)
        wait_for_event(subject, "pressure_critical", 0, 10)
        stream.feed(subject, step, 2 * step)
        subject.drain(60)
        told = counts(subject)
        ballast.free()
        judge("reductions", told["reduce_buffer"])
        judge("fallbacks", told["cpu_fallback"])
        judge("ooms", max(told["oom_detected"], subject.metrics()[METRIC_OOMS]))
        judge("answers_wrong", wrong(subject.results(), expected, same_output(subject)))

    def test_cpu_fallback_activation(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """The fallback under pressure, and the way back when the pressure is over.

        Pass criteria:
        - CPU fallback at 95% pressure
        - Back on the device when the pressure is over
        - Processing continues
        """
        step = 16 * SECOND
        expected = undisturbed(step, 2 * step, 3 * step)
        subject = new_subject(backend)
        device = subject.device()
        stream.feed(subject, 0, step)
        subject.drain(60)
        ballast = backend.allocate(int(0.97 * device_limit(backend)) - backend.memory().used_bytes)
        wait_for_event(subject, "cpu_fallback", 0, 10)
        stream.feed(subject, step, 2 * step)
        subject.drain(60)
        ballast.free()
        wait_for_event(subject, "returned_to_device", 0, 10)
        stream.feed(subject, 2 * step, 3 * step)
        subject.drain(60)
        results = subject.results()
        on_fallback = [each for each in results if step <= each.start < 2 * step and each.device != device]
        back = [each for each in results if each.start >= 2 * step and each.device == device]
        judge("fallbacks", counts(subject)["cpu_fallback"] if on_fallback else 0)
        judge("returns", counts(subject)["returned_to_device"] if back else 0)
        judge("answers_wrong", wrong(results, expected, same_output(subject)))


def cache_stage(backend: Backend, judge: Judge) -> list[tuple[FaultPlan, str]]:
    """Give the fault that only clearing the runtime's cache cures, where the backend states that there is one."""
    support = backend.capabilities[Capability.CACHE_OOM]
    if support.yes:
        return [(FaultPlan(Site.DEVICE_CACHE), "cache_clear")]
    judge.say(f"not run: an OOM that clearing the cache cures: {support.reason}")
    return []


def device_limit(backend: Backend) -> int:
    """Give the device memory that may be used, in bytes."""
    reading = backend.memory()
    return reading.total_bytes if reading.limit_bytes is None else reading.limit_bytes


def in_order(needed: str) -> list[list[str]]:
    """Give what may have been tried where this strategy is the first that helps."""
    whole = list(STRATEGIES[: STRATEGIES.index(needed) + 1])
    # Inference may have no process of its own.
    return [whole, [each for each in whole if each != "restart_worker"]]


def of_first_recovery(events: Sequence[Event]) -> list[Event]:
    """Give the events from the first OOM up to and including the end of its recovery."""
    return list(events[first_recovery([event.kind for event in events])])


@pytest.mark.oom
@pytest.mark.recovery
class TestDataPreservation:
    """Is anything lost?"""

    def test_audio_buffer_preservation(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, judge: Judge
    ) -> None:
        """Audio data preservation during OOM.

        Pass criteria:
        - All samples saved
        - No data loss
        - Audio quality maintained (bit for bit)
        """
        subject, stop = new_subject(backend), 40 * SECOND
        with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
            # Blocks of no round size, as a sound card gives them.
            accepted = stream.feed(subject, 0, stop, block_samples=3_777)
            subject.drain(60)
            record = fault.record()
        kept = recovered(subject)
        if kept is None:
            pytest.skip("not run: the subject has no recovered(), so what it kept cannot be compared")
        judge("samples_lost", max(stop, accepted) - len(kept), fault=record)
        judge("samples_unanswered", unanswered(subject.results(), stop), fault=record)
        judge("samples_different", stream.different(kept), fault=record)

    def test_transcription_state_preservation(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """Answers across an interruption: no gap and no duplicate after resume.

        Pass criteria:
        - No gap after resume
        - No duplicate after resume
        - Answers as without the interruption
        """
        interrupted, stop = 240 * SECOND, 270 * SECOND
        expected = undisturbed(stop)
        first = new_subject(backend)
        with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
            accepted = stream.feed(first, 0, interrupted)
            # In the middle of its work: some is answered, some is not.
            wait_until(lambda: len(first.results()) > 0, 10)
            record = fault.record()
            first.close()
        second = new_subject(backend)
        if unanswered(second.results(), accepted) == 0:
            # There was nothing left to resume.
            record = replace(record, faults_fired=0, detail=f"everything was answered before; {record.detail}")
        stream.feed(second, accepted, stop)
        second.drain(60)
        results = second.results()
        gaps, overlaps = untiled(results, stop)
        judge("gaps", gaps, fault=record)
        judge("overlaps", overlaps, fault=record)
        judge("answers_wrong", wrong(results, expected, same_output(second)), fault=record)

    def test_kill_during_recording(self, survive_kills: SurviveKills) -> None:
        """Worker or host killed at random moments while recording, then resume.

        Pass criteria:
        - Nothing acknowledged lost
        - At most the one call in flight stored beyond
        - Every stored sample bit for bit
        - Results tile what was stored
        - Every answer right
        - No process left behind
        - No host fails by itself
        - First right result after a worker's death within 5 s (median)
        - First right result after a worker's death within 30 s (worst)
        """
        survive_kills()

    @pytest.mark.slow
    def test_kill_during_recording_soak(self, survive_kills: SurviveKills) -> None:
        """The same a thousand times. A run that is cut off goes on where it ended.

        Pass criteria:
        - Nothing acknowledged lost
        - At most the one call in flight stored beyond
        - Every stored sample bit for bit
        - Results tile what was stored
        - Every answer right
        - No process left behind
        - No host fails by itself
        - First right result after a worker's death within 5 s (median)
        - First right result after a worker's death within 30 s (worst)
        """
        survive_kills()


SurviveKills = Callable[[], None]
KILLS_A_ROUND = 10


@pytest.fixture
def survive_kills(
    hosted: Callable[..., Hosted],
    backend: Backend,
    new_subject: NewSubject,
    stream: Stream,
    parameter: Parameter,
    undisturbed: Undisturbed,
    unfinished: Callable[..., Unfinished],
    progress: NewProgress,
    judge: Judge,
) -> SurviveKills:
    """Kill worker or host again and again, a new recording every ten kills, and judge what that cost."""
    kills, seed = int(parameter("kills")), int(parameter("seed"))

    def one_round(number: int, count: int) -> Toll:
        folder = f"kills-{number}"
        killing = Killing(hosted, folder, random.Random(1_000_000 * seed + number))
        killing.run(count)
        toll = killing.toll
        subject = new_subject(backend, workdir=folder)
        kept = recovered(subject)
        if kept is None:
            pytest.skip("not run: the subject has no recovered(), so what it kept cannot be compared")
        subject.drain(60)
        results = list(subject.results())
        subject.close()
        toll.lost = max(toll.lost, killing.acknowledged - len(kept))
        toll.different = stream.different(kept)
        toll.untiled = sum(untiled(results, len(kept))) + (unanswered(results, len(kept)) > 0)
        toll.wrong = wrong(results, undisturbed(len(kept)), same_output(subject))
        return toll

    def survive() -> None:
        done, live, rounds = unfinished(kills=kills, seed=seed), progress(None), -(-kills // KILLS_A_ROUND)
        toll = Toll()
        for number in range(rounds):
            if str(number) not in done.rounds:
                done.keep(str(number), asdict(one_round(number, min(KILLS_A_ROUND, kills - number * KILLS_A_ROUND))))
            toll += Toll(**done.rounds[str(number)])
            live.update(
                text=f"{toll.kills} of {kills} kills, {toll.lost} samples lost, {toll.hosts_failed} hosts failed"
            )
        live.done()
        done.done()
        judge_kills(judge, toll, seed)

    return survive


def judge_kills(judge: Judge, toll: Toll, seed: int) -> None:
    """Judge what kills cost. Most of them have to come while something is recorded."""
    fired = toll.while_recording if 2 * toll.while_recording >= toll.kills else 0
    killed = f"{toll.workers_killed} workers and {toll.hosts_killed} hosts killed"
    detail = f"seed {seed}, {killed}, {toll.while_recording} while they recorded"
    record = FaultRecord(toll.kills, fired, 0, Provenance.KILLED if fired else None, detail)
    judge.say(f"{detail}{'; ' if toll.why else ''}{toll.why}")
    judge("samples_lost", max(0, toll.lost), fault=record)
    judge("samples_unexplained", max(0, toll.unexplained), fault=record)
    judge("samples_different", toll.different, fault=record)
    judge("gaps_and_overlaps", toll.untiled, fault=record)
    judge("answers_wrong", toll.wrong, fault=record)
    judge("orphans", toll.orphans, fault=record)
    judge("hosts_failed", toll.hosts_failed, fault=record)
    if toll.first_answers_s:
        waits = {"first right results": [(float(i), wait_s) for i, wait_s in enumerate(toll.first_answers_s)]}
        judge("first_answer_median", statistics.median(toll.first_answers_s), fault=record, series=waits)
        judge("first_answer_worst", max(toll.first_answers_s), fault=record)
    elif toll.workers_seen:
        judge.end("not_run", f"no worker's death was waited for among {toll.kills} kills: take more kills")
    else:
        judge.end("not_run", "the subject has no worker process that could be killed")


@pytest.mark.oom
@pytest.mark.recovery
class TestProcessSurvival:
    """Does it survive what no except block catches?"""

    @pytest.mark.needs("runtime_crash")
    def test_worker_hang(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """A call into the runtime that never returns.

        Pass criteria:
        - Hang detected
        - User notified
        - First right result within 30 s of the hang
        - Every answer right
        - Results tile what was accepted
        """
        stops = (8 * SECOND, 24 * SECOND)
        expected = undisturbed(*stops)
        subject = new_subject(backend)
        require_worker(subject)
        stream.feed(subject, 0, stops[0])
        subject.drain(60)
        before = set(subject.process_ids())
        with backend.arm(FaultPlan(Site.RUNTIME_HANG, disarm_after_s=600)) as fault:
            stream.feed(subject, *stops)
            wait_until(partial(has_fired, fault), 10)
            hung_s = time.monotonic()
            wait_until(lambda: max(each.stop for each in subject.results()) > stops[0], 60)
            first_s = time.monotonic() - hung_s
            subject.drain(60)
            record = fault.record()
        told = counts(subject)
        judge("hangs_undetected", before <= set(subject.process_ids()), fault=record)
        judge("notifications", min(told["worker_lost"], told["recovered"]), fault=record)
        judge("first_answer", first_s, fault=record)
        judge("answers_wrong", wrong(subject.results(), expected, same_output(subject)), fault=record)
        judge("gaps_and_overlaps", sum(untiled(subject.results(), stops[1])), fault=record)

    def test_suspend_and_resume(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        undisturbed: Undisturbed,
        judge: Judge,
    ) -> None:
        """SIGSTOP and SIGCONT: of everything, as when a laptop sleeps, and of the worker alone.

        Pass criteria:
        - No worker replaced for having slept with its host
        - A worker that alone does not wake up is replaced
        - Nothing acknowledged lost
        - Every answer right
        - Results tile what was accepted
        """
        # Long blocks: few of them are enough to work on, however slow the disk is.
        host = hosted("suspended", until_told=True, block_samples=SECOND // 2, pause_s=10 * PAUSE_S)
        host.wait_for("ready", 60)
        host.order("watch")
        host.wait_for("first_answer_s", 60)
        workers = host.workers()
        if not workers:
            pytest.skip("not run: the subject runs the model in its own process")
        # The worker first: while audio still comes in, it is asked for an answer that it does not give. Not for as
        # long as a sign of life is waited for: awake, the host would be right to replace it.
        with suspended(workers):
            host.read(0.05)
            enough = host.last("accepted") + ASKED_SAMPLES

            def is_asked() -> bool:
                # Enough was accepted to work on, or no more is: a subject may take audio only as it answers.
                before = host.last("accepted")
                host.read(0.5)
                accepted = host.last("accepted")
                return bool(accepted >= enough or accepted == before)

            asked = wait_until(is_asked, 3)
            with suspended([psutil.Process(host.process.pid)]) as asleep:
                # Longer than any sign of life is waited for.
                time.sleep(SLEEP_S)
                stopped = sum(each.status() == psutil.STATUS_STOPPED for each in [*asleep, *workers])
            # The host is awake first, as it may be: whether its patience is over shows now.
            host.read(0.5)
        host.order("watch")
        host.wait_for("first_answer_s", 60, 2)
        replaced = sum(worker not in host.workers() for worker in workers)
        # And now alone: another one takes its place.
        workers = host.workers()
        with suspended(workers):
            stopped += len(workers)
            woken = wait_until(lambda: host.read(0.05) and bool(set(host.workers()) - set(workers)), 60)
        host.order("stop")
        status = host.end(60)
        # A sleep in which nothing was waited for shows nothing.
        fired = stopped if asked else 0
        detail = f"{stopped} processes stopped, the worker {'when' if asked else 'before'} it was asked"
        record = FaultRecord(stopped, fired, 0, Provenance.KILLED if fired else None, detail)
        acknowledged = max(host.all("accepted"))
        subject = new_subject(backend, workdir="suspended")
        subject.drain(60)
        results = subject.results()
        judge("workers_replaced", replaced, fault=record)
        judge("sleepers_undetected", not woken, fault=record)
        judge("samples_lost", unanswered(results, acknowledged) + (status != 0), fault=record)
        judge("answers_wrong", wrong(results, undisturbed(acknowledged), same_output(subject)), fault=record)
        judge("gaps_and_overlaps", sum(untiled(results, acknowledged)), fault=record)

    def test_oom_killer(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        undisturbed: Undisturbed,
        parameter: Parameter,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """The kernel's OOM killer, in a memory cgroup, while recording (20 times).

        Pass criteria:
        - The worker dies each time
        - The host never dies
        - Nothing acknowledged lost
        - Results tile what was stored
        - Every answer right
        - First right result after a worker's death within 5 s (median)
        - First right result after a worker's death within 30 s (worst)
        """
        if spendable_bytes() < OOM_NEIGHBOUR_BYTES:
            pytest.skip(f"not run: it may take {OOM_NEIGHBOUR_BYTES // MB} MB, and so much has to stay free besides")
        kills, first_answers_s, died = int(parameter("kills")), list[float](), 0
        with contextlib.ExitStack() as stack:
            try:
                cgroup = stack.enter_context(MemoryCgroup())
                # Whatever happens, the cgroup is empty when it is removed.
                host = hosted(
                    "killed",
                    until_told=True,
                    block_samples=SECOND // 10,
                    pause_s=PAUSE_S,
                    volunteers=False,
                    # A subject that sees it coming may stop in order before: here it is to meet the OOM killer.
                    policy={"shutdown": 1.0},
                )
                stack.callback(host.close)
                cgroup.add(host.process.pid)
            except CgroupUnavailable as reason:
                pytest.skip(f"not run: {reason}")
            host.wait_for("ready", 60)
            live = progress(None)
            for i in range(kills):
                wait_until(lambda: bool(host.workers()), 10 if i else 1)
                workers = host.workers()
                if not workers and not i:
                    pytest.skip("not run: the subject runs the model in its own process")
                if not workers:
                    # It was lost and not replaced: the next to die would be the host.
                    break
                before = cgroup.oom_kills()
                cgroup.limit(cgroup.used_bytes() + OOM_HEADROOM_BYTES)
                # A little early: the neighbour has to start first.
                killed_s = time.monotonic()
                with HostBallast(OOM_NEIGHBOUR_BYTES, 60, cgroup.processes_path):
                    # One death is enough: the next could be another's.
                    while cgroup.oom_kills() == before and time.monotonic() < killed_s + 10:
                        time.sleep(0.001)
                    # While the neighbour is still there: with both gone, and what they held counted a little longer,
                    # the only one left to kill would be the host.
                    cgroup.limit(1 << 40)
                # Dying takes a moment.
                gone = wait_until(lambda workers=workers: not set(workers) <= set(host.workers()), 5)  # type: ignore[misc]
                died += cgroup.oom_kills() > before and gone
                host.order("watch")
                first_answers_s.append(host.wait_for("first_answer_s", 60, i + 1) - killed_s)
                live.update(cgroup.used_bytes(), text=f"{i + 1} of {kills} kills, {died} workers died")
            live.done()
            oom_kills = cgroup.oom_kills()
            host.order("stop")
            status = host.end(60)
        acknowledged = max(host.all("accepted"))
        subject = new_subject(backend, workdir="killed")
        subject.drain(60)
        results = subject.results()
        provenance = Provenance.EXHAUSTED if died else None
        record = FaultRecord(kills, oom_kills, 0, provenance, f"{oom_kills} counted by the kernel in the cgroup")
        judge("workers_spared", kills - died, fault=record)
        judge("host_deaths", status != 0, fault=record)
        judge("samples_lost", unanswered(results, acknowledged), fault=record)
        judge("gaps_and_overlaps", sum(untiled(results, acknowledged)), fault=record)
        judge("answers_wrong", wrong(results, undisturbed(acknowledged), same_output(subject)), fault=record)
        waits = {"first right results": [(float(i), wait_s) for i, wait_s in enumerate(first_answers_s)]}
        judge("first_answer_median", statistics.median(first_answers_s), fault=record, series=waits)
        judge("first_answer_worst", max(first_answers_s), fault=record)

    @pytest.mark.needs("runtime_crash")
    def test_poison_chunk(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """A piece of audio that the runtime dies of, every time.

        Pass criteria:
        - Only the answer about the poisoned audio set aside
        - Its audio kept, bit for bit
        - Everything else answered, and right
        - User notified
        - Results tile what was accepted
        """
        audio = stream[0 : 16 * SECOND]
        # Louder in one band than speech ever is, and over before the left context of the next second begins.
        begin, length = 6 * SECOND + SECOND // 10, 3 * SECOND // 10
        audio[begin : begin + length] = np.sin(np.arange(length) * (2 * np.pi * 1_000 / SECOND)).astype(np.float32)

        def is_poisoned(result: Result) -> bool:
            return result.start < begin + length and result.stop > begin

        calm = new_subject(backend, workdir="calm")
        calm.feed(0, audio)
        calm.drain(60)
        expected = [each for each in calm.results() if not is_poisoned(each)]
        calm.close()
        subject = new_subject(backend)
        require_worker(subject)
        plan = FaultPlan(Site.RUNTIME_CRASH, times=None, input_above=POISON_LEVEL, disarm_after_s=600)
        with backend.arm(plan) as fault:
            subject.feed(0, audio)
            subject.drain(100)
            record = fault.record()
        results, kept = subject.results(), recovered(subject)
        if kept is None:
            pytest.skip("not run: the subject has no recovered(), so what it kept cannot be compared")
        aside = [each for each in results if each.output is None]
        elsewhere = unanswered(results, len(audio)) - sum(each.stop - each.start for each in aside)
        judge.say(f"set aside: {[(each.start, each.stop) for each in aside]}, {record.faults_fired} workers died of it")
        judge("not_poisoned", sum(not is_poisoned(each) for each in aside) + (not aside), fault=record)
        judge(
            "samples_different",
            int(np.count_nonzero(kept != audio)) if len(kept) == len(audio) else len(audio),
            fault=record,
        )
        judge("answers_wrong", wrong(results, expected, same_output(subject)) + elsewhere, fault=record)
        judge("notifications", counts(subject)["chunk_set_aside"], fault=record)
        judge("gaps_and_overlaps", sum(untiled(results, len(audio))), fault=record)

    @pytest.mark.needs("runtime_crash")
    def test_library_missing_at_first_inference(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """A library of the runtime that is found to be missing at the first inference, not at the start.

        Pass criteria:
        - Every sample answered, by the fallback
        - Nothing set aside
        - User notified
        - Results tile what was accepted
        """
        stop = 16 * SECOND
        expected = undisturbed(stop)
        subject = new_subject(backend)
        device = subject.device()
        with backend.arm(FaultPlan(Site.LIBRARY_MISSING, times=None, disarm_after_s=600)) as fault:
            stream.feed(subject, 0, stop)
            subject.drain(100)
            record = fault.record()
        results, told = subject.results(), counts(subject)
        on_device = sum(each.device == device for each in results)
        mistakes = wrong(results, expected, same_output(subject)) + unanswered(results, stop) + on_device
        judge("answers_wrong", mistakes, fault=record)
        judge("set_aside", sum(each.output is None for each in results), fault=record)
        judge("notifications", min(told["device_error"], told["cpu_fallback"]), fault=record)
        judge("gaps_and_overlaps", sum(untiled(results, stop)), fault=record)


#: Longer than the default pipeline waits for a sign of life from a worker at work.
SLEEP_S = 6.0
#: So much audio that is not answered has the worker asked: longer than the chunks of most subjects.
ASKED_SAMPLES = 4 * SECOND
#: Free in the cgroup before the neighbour comes.
OOM_HEADROOM_BYTES = 48 * MB
#: The most that the neighbour takes, where nothing is killed.
OOM_NEIGHBOUR_BYTES = OOM_HEADROOM_BYTES + 300 * MB
#: Natural log of mel energy: full scale at one frequency is above it, speech is not.
POISON_LEVEL = 9.0


def require_worker(subject: Subject) -> None:
    """Do not run the rest where the model runs in the subject's own process: the test would not survive it."""
    if set(subject.process_ids()) <= {os.getpid()}:
        pytest.skip("not run: the subject runs the model in its own process")


@pytest.mark.oom
@pytest.mark.recovery
class TestMultipleOOMHandling:
    """Does it survive the second one?"""

    def test_consecutive_oom_recovery(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, parameter: Parameter, judge: Judge
    ) -> None:
        """Multiple OOM event handling (5 OOMs).

        Pass criteria:
        - All OOMs detected
        - Recovery attempted for each
        - Eventually falls back to CPU
        """
        subject, ooms, step = new_subject(backend), int(parameter("ooms")), 4 * SECOND
        device, records = subject.device(), []
        for i in range(ooms):
            wait_until(lambda: subject.device() == device, 5)
            # The memory comes back each time, but for the last.
            times = 1 if i < ooms - 1 else None
            with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=times)) as fault:
                stream.feed(subject, i * step, (i + 1) * step)
                subject.drain(60)
                records.append(fault.record())
        metrics = subject.metrics()
        fired = sum(record.faults_fired for record in records)
        last = [result.device for result in subject.results() if result.start >= (ooms - 1) * step]
        judge("ooms_undetected", abs(fired - metrics[METRIC_OOMS]), fault=total(records))
        judge("recoveries_missing", max(0, ooms - metrics[METRIC_RECOVERIES_ATTEMPTED]), fault=total(records))
        judge("cpu_mode", bool(last) and device not in last, fault=total(records))

    def test_oom_during_recovery(
        self,
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        hosted: Callable[..., Hosted],
        judge: Judge,
    ) -> None:
        """OOM while recovering from one: every retry fails too, and at last even the fallback.

        Pass criteria:
        - Attempts bounded (at most 12)
        - No livelock (an end within 30 s)
        - Orderly end when even the fallback finds no memory (status 75)
        - Nothing accepted lost
        """
        subject = new_subject(backend)
        with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
            stream.feed(subject, 0, 32 * SECOND)
            subject.drain(60)
            during = fault.record()
        episodes = recoveries(subject.events())
        host = hosted(
            "starved",
            stop=32 * SECOND,
            faults=(
                FaultPlan(Site.DEVICE_MEMORY, times=None).to_json(),
                FaultPlan(Site.HOST_MEMORY, times=None, min_bytes=256_000).to_json(),
            ),
        )
        host.wait_for("ready", 30)
        ready_s = time.monotonic()
        status = host.end(60)
        ended_s = time.monotonic()
        records = [FaultRecord.from_json(each) for each in host.all("fault")]
        second = new_subject(backend, workdir="starved")
        second.drain(60)
        missing = unanswered(second.results(), max(host.all("accepted"), default=0))
        missing += unanswered(subject.results(), 32 * SECOND)
        judge("attempts", max((count for count, _ in episodes), default=math.inf), fault=during)
        slowest_s = max([ended_s - ready_s, *(took_s for _, took_s in episodes)])
        judge("recovery_time", slowest_s, fault=total([during, *records]))
        judge("exit_status", status, fault=total(records))
        judge("samples_lost", missing, fault=total([during, *records]))


def recoveries(events: Sequence[Event]) -> list[tuple[int, float]]:
    """Give (strategies tried, seconds) from each OOM to the end of its recovery."""
    marks = [i for i, event in enumerate(events) if event.kind == "oom_detected"]
    found = []
    for begin, end in pairwise([*marks, len(events)]):
        episode = of_first_recovery(events[begin:end])
        tried = sum(event.kind in STRATEGIES for event in episode)
        found.append((tried, episode[-1].time_s - episode[0].time_s))
    return found


@pytest.mark.oom
@pytest.mark.recovery
class TestRecoveryMetrics:
    """Do its own numbers tell the truth?"""

    def test_recovery_success_rate(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, parameter: Parameter, judge: Judge
    ) -> None:
        """Recovery metrics over OOMs of every kind.

        Pass criteria:
        - Recovery success rate >= 95%
        - Slowest recovery < 5 s
        - Metrics agree with the faults that fired
        """
        subject, step, ooms = new_subject(backend), 16 * SECOND, int(parameter("ooms"))
        plans = (
            *(plan for plan, _ in cache_stage(backend, judge)),
            FaultPlan(Site.DEVICE_GARBAGE),
            FaultPlan(Site.DEVICE_MEMORY),
            FaultPlan(Site.DEVICE_MEMORY, times=None),
        )
        records = []
        device, before = subject.device(), subject.metrics()[METRIC_OOMS]
        for i in range(ooms):
            # A fault on the device needs the model there.
            wait_until(lambda: subject.device() == device, 5)
            with backend.arm(plans[i % len(plans)]) as fault:
                stream.feed(subject, i * step, (i + 1) * step)
                subject.drain(60)
                records.append(fault.record())
        metrics = subject.metrics()
        attempted, succeeded = metrics[METRIC_RECOVERIES_ATTEMPTED], metrics[METRIC_RECOVERIES_SUCCEEDED]
        told = counts(subject)
        judge("success_rate", 100 * succeeded / attempted if attempted else 0.0, fault=total(records))
        judge("recovery_time", metrics[METRIC_RECOVERY_LATENCY_MAX], fault=total(records))
        miscounted = abs(attempted - told["oom_detected"]) + abs(succeeded - told["recovered"])
        fired = sum(record.faults_fired for record in records)
        counted = metrics[METRIC_OOMS] - before
        judge.say(f"{counted:.0f} OOMs counted, {fired} fired")
        judge("miscounted", miscounted + abs(fired - counted), fault=total(records))


@pytest.mark.recovery
class TestStorageFailure:
    """Does it survive a disk that takes no more?"""

    def test_full_disk_while_recording(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        tmp_path: Path,
        judge: Judge,
    ) -> None:
        """A disk that fills up while it records, and room again: a small tmpfs.

        Pass criteria:
        - Feeding refused while the disk is full
        - Each refusal says that the disk is full
        - User notified
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was stored
        - Recording goes on once there is room
        - Process lives to its orderly end (status 0)
        """
        disk = Disk(str(tmp_path / "disk"), DISK_BYTES)
        host = hosted("disk/spool", disk=asdict(disk), **RECORDING)
        with open_disk(host, disk) as outside:
            host.wait_for("accepted", 30, RECORDED_BLOCKS)
            # It returns once the disk takes not one byte more.
            filled_bytes = outside.fill()
            feeds = feeds_until_refused(host)
            outside.make_room()
            status = host.end(60)
            outside.copy("spool", tmp_path / "kept")
        detail = f"{filled_bytes} bytes filled, to the last"
        record = storage_fault(host, filled_bytes > 0, feeds, Provenance.EXHAUSTED, detail)
        judge_storage(judge, [host], new_subject(backend, "kept"), stream, record, r"full|no (space|room)")
        judge("exit_status", status, fault=record)

    def test_file_size_limit_while_recording(
        self, hosted: Callable[..., Hosted], backend: Backend, new_subject: NewSubject, stream: Stream, judge: Judge
    ) -> None:
        """A limit on the size of files (RLIMIT_FSIZE) that falls while it records, and is raised again.

        Pass criteria:
        - Feeding refused while the limit is there
        - Each refusal names the file-size limit
        - User notified
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was stored
        - Recording goes on once the limit is raised
        - Process lives to its orderly end (status 0)
        """
        host = hosted(**RECORDING)
        host.wait_for("accepted", 30, RECORDED_BLOCKS)
        process_ids = {host.process.pid, *host.last("process_ids")}
        # No file may grow beyond it, and none can have a whole block.
        limit_bytes = 2 * host.job.block_samples
        limits = limit_file_size(process_ids, limit_bytes)
        feeds = feeds_until_refused(host)
        limit_file_size(process_ids, None)
        status = host.end(60)
        detail = f"RLIMIT_FSIZE was {limit_bytes} bytes in {limits.count(limit_bytes)} of {len(limits)} processes"
        record = storage_fault(host, {*limits} == {limit_bytes}, feeds, Provenance.CAPPED, detail)
        judge_storage(judge, [host], new_subject(backend), stream, record, r"file.size limit|too large")
        judge("exit_status", status, fault=record)

    def test_read_only_remount_while_recording(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        tmp_path: Path,
        judge: Judge,
    ) -> None:
        """A file system that remounts itself read-only while it records: ext4 after an error, then repaired.

        Pass criteria:
        - Feeding refused while the file system is read-only
        - Each refusal says that it is read-only
        - User notified
        - Nothing acknowledged lost
        - Every stored sample bit for bit
        - Results tile what was stored
        - Recording goes on after the repair
        - Process lives to its orderly end (status 0)
        """
        image = tmp_path / "ext4.img"
        disk = Disk(str(tmp_path / "disk"), DISK_BYTES, str(image))
        try:
            make_image(image, DISK_BYTES)
        except StorageUnavailable as error:
            pytest.skip(f"not run: {error}")
        first = hosted("disk/spool", disk=asdict(disk), **{**RECORDING, "retry_s": 2.0})
        with open_disk(first, disk) as outside:
            first.wait_for("accepted", 30, RECORDED_BLOCKS)
            try:
                outside.make_read_only()
            except StorageUnavailable as error:
                pytest.skip(f"not run: {error}")
            read_only = outside.is_read_only()
            feeds = feeds_until_refused(first)
        # It stays so for as long as it is mounted: the recording ends, and goes on after the repair.
        statuses = [first.end(60)]
        assert wait_until(lambda: not is_mounted(image), 10), f"{image} is mounted 10 s after its last user ended"
        repair(image)
        stop = max(first.all("accepted")) + MORE_SAMPLES
        second = hosted("disk/spool", disk=asdict(disk), **{**RECORDING, "stop": stop})
        with open_disk(second, disk) as outside:
            statuses.append(second.end(60))
            outside.copy("spool", tmp_path / "kept")
        detail = f"ext4 found an error and was {'read-only' if read_only else 'not read-only'}, as a write told"
        record = storage_fault(first, read_only, feeds, Provenance.MISSING, detail)
        judge_storage(judge, [first, second], new_subject(backend, "kept"), stream, record, r"read.only")
        judge("exit_status", next((status for status in statuses if status), 0), fault=record)


#: In it there is room for far more than is recorded before it is filled.
DISK_BYTES = 32 * MB
#: So much is recorded before the disk fails, and so much after it works again.
RECORDED_BLOCKS, MORE_SAMPLES = 20, 4 * SECOND
#: So many refusals are waited for: one that is accepted the second time would be no failure of the disk.
REFUSED_BLOCKS, REFUSED_WITHIN_S = 5, 10.0
RECORDING = {
    "stop": 10_000 * SECOND,
    "block_samples": SECOND // 10,
    "pause_s": 0.002,
    "retry_s": 30.0,
    "samples_after_refusal": MORE_SAMPLES,
}


def open_disk(host: Hosted, disk: Disk) -> DiskOutside:
    """Reach the disk of a hosted process once it has it; where it cannot be had, the test is not run."""
    try:
        host.wait_for("ready", 30)
    except StorageUnavailable as error:
        pytest.skip(f"not run: {error}")
    return DiskOutside(disk, host.process.pid)


def feeds_until_refused(host: Hosted) -> int:
    """Wait, once the disk fails, until feeding was refused; give the feeds that began while it failed.

    A subject that never refuses is told to stop, and one that ends is gone: each is judged all the same.
    """
    # What was said before the disk failed is taken in first.
    host.read(0.02)
    before, refused_before = count_feeds(host), len(host.all("refused"))
    # RuntimeError: it has ended.
    with contextlib.suppress(TimeoutError, RuntimeError):
        host.wait_for("refused", REFUSED_WITHIN_S, refused_before + REFUSED_BLOCKS)
    # On a slow machine a few are enough.
    if not host.all("refused"):
        host.order("stop")
    # The first may have begun before.
    return max(0, count_feeds(host) - before - 1)


def count_feeds(host: Hosted) -> int:
    """Count the calls to ``feed`` that a hosted process has told of, accepted or refused."""
    return len(host.all("accepted")) + len(host.all("refused"))


def storage_fault(host: Hosted, done: bool, feeds: int, provenance: Provenance, detail: str) -> FaultRecord:
    """Say what became of a disk's failure: it fired when it was there, seen from outside, while something was fed.

    Whether feeding was refused is no part of it: that is what is judged.
    """
    fired = done and feeds > 0
    detail = f"{detail}; {feeds} feeds meanwhile, {len(host.all('refused'))} refused"
    return FaultRecord(count_feeds(host), int(fired), 0, provenance if fired else None, detail)


def judge_storage(
    judge: Judge, hosts: Sequence[Hosted], subject: Subject, stream: Stream, record: FaultRecord, cause: str
) -> None:
    """Compare what was acknowledged while the disk failed with what a subject finds in its copy afterwards."""
    kept = recovered(subject)
    if kept is None:
        pytest.skip("not run: the subject has no recovered(), so what it kept cannot be compared")
    refused = [line for line in hosts[0].lines if "refused" in line]
    # The name of a folder is no explanation.
    said = [re.sub(r"\S*/\S*", "", line["refused"]) for line in refused]
    unclear = [text for text in said if not re.search(cause, text, re.IGNORECASE)]
    told = [kind for host in hosts for kind, _ in host.last("events") or []]
    acknowledged = max((position for host in hosts for position in host.all("accepted")), default=0)
    results = subject.results()
    first = quoted(refused[0]["refused"]) if refused else "none"
    judge.say(f"first refusal: {first}; unclear: {quoted(unclear[:3])}")
    judge("refusals", len(refused), fault=record)
    judge("refusals_unclear", len(unclear), fault=record)
    judge("notifications", told.count("storage_failed"), fault=record)
    judge("samples_lost", max(0, acknowledged - len(kept)), fault=record)
    judge("samples_different", stream.different(kept), fault=record)
    judge("gaps_and_overlaps", sum(untiled(results, len(kept))) + (unanswered(results, len(kept)) > 0), fault=record)
    # A refusal in an emergency shutdown is not at the block that was recorded.
    wanted = max((line["at"] + MORE_SAMPLES for line in refused if "at" in line), default=0)
    judge("samples_missing", max(0, wanted - acknowledged), fault=record)
