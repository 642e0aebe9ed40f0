"""Memory protection: stress, fallback, device errors, emergency shutdown.

    pytest tests/test_memory_protection.py -v -m "not slow"

As a script it is the stress harness: ``python tests/test_memory_protection.py --help``.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

# A script has only its own folder on its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backends.contract import (
    Allocation,
    ArmedFault,
    Backend,
    BackendError,
    FaultPlan,
    FaultRecord,
    Provenance,
    Site,
    Unsupported,
)
from backends.errors import classify
from qualification import growth
from qualification.attribution import attribute, opened_at_rest
from qualification.host import MB, Hosted
from qualification.judge import Judge
from qualification.observe import (
    can_rest,
    counts,
    left_behind,
    quiesce,
    recovered,
    same_output,
    wait_until,
)
from qualification.progress import Progress
from qualification.quoting import error_text, quoted
from qualification.sampling import Sample, Sampler
from qualification.stream import Stream, unanswered, untiled, wrong
from qualification.subject import METRIC_DEVICE_ERRORS, METRIC_OOMS, Result, Subject
from qualification.survival import still_running

SECOND = 16_000
SAMPLE_EVERY_S = 0.25
#: Recorded before memory is judged: caches that fill up once, that of a data base say, are no growth without end.
WARM_UP_SAMPLES = 60 * SECOND
#: Growth per cycle with a fallback that is no leak: pytest keeps what is logged of each, some 5 kB.
CYCLE_FLOOR_BYTES = 20_000.0
#: Small blocks live for up to so many cycles of the allocation test; it is at rest when they are gone.
CYCLES_A_SAMPLE = 4
#: The confidence with which a long test ends early: it looks many times.
CERTAIN = 0.9999
NewBackend = Callable[[int], Backend]
NewSubject = Callable[..., Subject]
NewSampler = Callable[[Subject], Sampler]
NewProgress = Callable[[float | None], Progress]
Parameter = Callable[[str], float]
Undisturbed = Callable[..., Sequence[Result]]


@pytest.mark.stress
class TestMemoryStress:
    """Does it hold its memory under load?"""

    def test_sustained_high_memory_usage(
        self,
        new_backend: NewBackend,
        new_subject: NewSubject,
        new_sampler: NewSampler,
        stream: Stream,
        parameter: Parameter,
        device_limit_bytes: int,
        undisturbed: Undisturbed,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """Memory leak detection under sustained 500MB load.

        Pass criteria:
        - Memory growth rate < 1 MB/s
        - No leak detected after 60s
        - Stable memory within ±10%
        - Every answer right under load
        """
        held_bytes, duration_s = int(parameter("held_mb")) * MB, parameter("duration_s")
        # Held and worked on, and still below the level of pressure at which a subject begins to give way.
        backend = new_backend(int((held_bytes + device_limit_bytes) / 0.75))
        subject = new_subject(backend)
        pieces = 20
        held = [backend.allocate(held_bytes // pieces) for _ in range(pieces)]
        stops = [WARM_UP_SAMPLES]
        stream.feed(subject, 0, stops[0])
        quiesce(subject)

        sampler, live, turn = new_sampler(subject), progress(duration_s), 0

        def rewrite() -> None:
            nonlocal turn
            # One piece after another is given back and taken anew, every page written.
            held[turn % pieces].free()
            held[turn % pieces] = backend.allocate(held_bytes // pieces)
            turn += 1

        def record() -> None:
            stops.append(stops[-1] + 8 * SECOND)
            stream.feed(subject, stops[-2], stops[-1])

        def read() -> Sample:
            subject.drain(60)
            quiesce(subject)
            return sampler.sample(backend.memory().used_bytes)

        def load() -> growth.Growth:
            began_s = time.monotonic()
            while (elapsed_s := time.monotonic() - began_s) < duration_s:
                record()
                while time.monotonic() - began_s < elapsed_s + SAMPLE_EVERY_S:
                    rewrite()
                sample = read()
                text = f"{turn} pieces of {held_bytes // pieces / MB:.0f} MB rewritten"
                live.update(sample.uss_bytes, lambda: growth.so_far(sampler), text)
            return growth.judge(sampler, minima=not can_rest(subject))

        found = load()
        if found.is_open(judge.limit("growth_rate") * MB):
            judge.say(f"extended once, for {duration_s:.0f} s left it open: {found.reason}")
            found = load()
        live.done()

        series = sampler.recorded()
        phases = {"recording": record, "rewriting what is held": rewrite}
        judge("growth_rate", found.upper / MB, series=series)
        judge("leak_detected", len(found.leaking), unproved=found.unproved)
        judge("stability", found.stability_fraction * 100)
        results = subject.results()
        mistakes = wrong(results, undisturbed(*stops), same_output(subject)) + sum(untiled(results, stops[-1]))
        judge("answers_wrong", mistakes)
        growth.tell(judge, sampler, found, lambda: attribute(phases, read, subject.process_ids))
        for piece in held:
            piece.free()

    def test_memory_allocation_stress(
        self,
        backend: Backend,
        new_subject: NewSubject,
        new_sampler: NewSampler,
        stream: Stream,
        parameter: Parameter,
        judge: Judge,
    ) -> None:
        """Rapid allocation/deallocation cycles (50MB × 100).

        Fragmentation is the share by which the largest block that can be had shrank, with nothing held.

        Pass criteria:
        - All allocations complete
        - Memory returns to baseline (within 16 MB)
        - Memory growth < 4 KB per cycle
        - No leak detected from cycle to cycle
        - No fragmentation (largest block at most 5% smaller than at the start)
        """
        cycles, block_bytes = int(parameter("cycles")), int(parameter("block_mb")) * MB
        subject = new_subject(backend)
        chance = random.Random(1)
        small: list[Allocation] = []
        position = failed = 0

        def speak() -> None:
            nonlocal position
            position = stream.feed(subject, position, position + SECOND)
            subject.drain(30)

        def cycle() -> None:
            block = backend.allocate(block_bytes)
            # Small blocks of many sizes outlive the large one, as they do in a program at work.
            small.append(backend.allocate(chance.randrange(4_096, 400_000)))
            if len(small) > 20:
                small.pop(chance.randrange(len(small))).free()
            speak()
            block.free()

        def settle() -> Sample:
            while small:
                small.pop().free()
            # A full device is pressure. A subject may move to the CPU, come back, and keep a process for the next time:
            # for 10 s, the one that ships. That is no leak, and would be read as one.
            speak()
            deadline_s = time.monotonic() + 20
            while subject.device() != home or len(subject.process_ids()) > processes:
                if time.monotonic() > deadline_s:
                    judge.say(f"not at rest: {len(subject.process_ids())} processes, on {quoted(subject.device())}")
                    break
                time.sleep(0.25)
                speak()
            return read()

        def read() -> Sample:
            while small:
                small.pop().free()
            quiesce(subject)
            backend.release_cached()
            return sampler.sample(backend.memory().used_bytes)

        def churn() -> None:
            nonlocal failed
            for number in range(cycles):
                try:
                    cycle()
                except Exception as error:
                    if not classify(error).is_oom:
                        raise
                    failed += 1
                if number % CYCLES_A_SAMPLE == CYCLES_A_SAMPLE - 1:
                    read()

        sampler = new_sampler(subject)
        position = stream.feed(subject, 0, WARM_UP_SAMPLES)
        for _ in range(5):
            cycle()
        home, processes = subject.device(), len(subject.process_ids())
        before, largest_before = settle(), largest_block_bytes(backend)
        settle()
        # Of its own: what is judged by the cycle begins here.
        sampler = new_sampler(subject)
        minima = not can_rest(subject)
        churn()
        found = growth.judge(sampler, unit="cycle", cycles_a_sample=CYCLES_A_SAMPLE, minima=minima)
        if found.is_open(judge.limit("growth_per_cycle") * 1e3, exact=True):
            judge.say(f"extended once, for {cycles} cycles left it open: {found.reason}")
            churn()
            found = growth.judge(sampler, unit="cycle", cycles_a_sample=CYCLES_A_SAMPLE, minima=minima)
        series = sampler.recorded()
        after, largest_after = settle(), largest_block_bytes(backend)

        phases = {"recording": speak, "allocating": lambda: backend.allocate(block_bytes).free()}
        judge("allocations_failed", failed)
        judge("baseline_excess", max(0, after.uss_bytes - before.uss_bytes) / MB)
        judge("growth_per_cycle", found.exact_upper / 1e3, series=series)
        # What is open about a catch-all is bounded by the baseline.
        judge("leak_detected", len(found.leaking))
        judge("fragmentation", 100 * (1 - largest_after / largest_before))
        growth.tell(judge, sampler, found, lambda: attribute(phases, read, subject.process_ids))

    @pytest.mark.slow
    def test_continuous_recording_memory_leak(
        self,
        backend: Backend,
        new_subject: NewSubject,
        new_sampler: NewSampler,
        stream: Stream,
        parameter: Parameter,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """Long-duration memory leak detection: one hour of recording, in real time.

        Speech comes in blocks of 10 ms to 2 s, and in batches of 1 to 16 s of it at once, as a seed decides.

        Pass criteria:
        - No leak detected
        - Total growth < 100 MB
        - No crash or OOM
        - Every sample answered
        """
        duration_s, chance = parameter("duration_s"), random.Random(int(parameter("seed")))
        every_s, look_every_s = min(10.0, duration_s / 60), duration_s / 60
        limit_bytes = judge.limit("total_growth") * MB
        subject = new_subject(backend)
        sampler, live, minima = new_sampler(subject), progress(duration_s), not can_rest(subject)
        spoken = accepted = 0

        def speak(samples: int) -> None:
            nonlocal spoken, accepted
            spoken += samples
            while accepted < spoken:
                before, block = accepted, min(chance.randrange(SECOND // 100, 2 * SECOND), spoken - accepted)
                accepted = subject.feed(before, stream[before : before + block])
                if accepted <= before:
                    # What is not accepted now is offered again with the next batch, and at the end is unanswered.
                    break

        def read() -> Sample:
            subject.drain(60)
            quiesce(subject)
            return sampler.sample(backend.memory().used_bytes)

        def failure() -> str:
            """Say why the test is sure to fail, if it is."""
            if happened := incidents(subject):
                return f"{happened} incidents"
            sure = growth.judge(sampler, minima=minima, confidence=CERTAIN)
            # A warm-up of up to half of the run is none when the run is over.
            if sure.worst.verdict == "leak" and 2 * sure.span > duration_s:
                return sure.reason
            grown_bytes = sure.lower * sure.span
            return f"{grown_bytes / MB:.0f} MB more already" if grown_bytes >= limit_bytes else ""

        speak(WARM_UP_SAMPLES)
        read()
        spoken_before, began_s = spoken, time.monotonic()
        sampled_s = looked_s = began_s
        try:
            while (now_s := time.monotonic()) - began_s < duration_s:
                batch = chance.choice([n for n in (1, 2, 4, 8, 16) if n == 1 or 60 * n <= duration_s]) * SECOND
                # Real time: it has not been spoken yet.
                time.sleep(max(0.0, (spoken - spoken_before + batch) / SECOND - (now_s - began_s)))
                speak(batch)
                if (now_s := time.monotonic()) - sampled_s >= every_s:
                    sampled_s, sample = now_s, read()
                    text = f"{spoken / SECOND:.0f} s recorded, on {subject.device()}"
                    live.update(sample.uss_bytes, lambda: growth.so_far(sampler), text)
                if now_s - looked_s >= look_every_s:
                    looked_s = now_s
                    if why := failure():
                        judge.say(f"stopped early, after {now_s - began_s:.0f} s: {why}")
                        break
            subject.drain(60)
        except KeyboardInterrupt:
            so_far = growth.judge(sampler, minima=minima)
            reason = f"interrupted after {time.monotonic() - began_s:.0f} of {duration_s:.0f} s; so far: "
            judge.end("not_run", reason + f"{so_far.worst.verdict}, {so_far.reason}", series=sampler.recorded())
            raise
        finally:
            live.done()

        found, series = growth.judge(sampler, minima=minima), sampler.recorded()
        size_bytes, share = sampler.cost
        judge.say(f"sampling took {share:.2%} of the time, and {size_bytes / MB:.2f} MB")
        happened = incidents(subject)
        phases = {"recording 8 s": lambda: speak(8 * SECOND), "nothing": lambda: None}
        judge("leak_detected", len(found.leaking), series=series, unproved=found.unproved)
        judge("total_growth", found.total_bytes / MB)
        judge("crashes_and_ooms", happened)
        judge("samples_unanswered", unanswered(subject.results(), spoken))
        growth.tell(judge, sampler, found, lambda: attribute(phases, read, subject.process_ids))


def incidents(subject: Subject) -> int:
    """Count what may not happen while nothing is short."""
    kinds = ("oom_detected", "device_error", "emergency_shutdown", "chunk_set_aside", "storage_failed")
    told = counts(subject)
    return sum(told[kind] for kind in kinds)


def largest_block_bytes(backend: Backend) -> int:
    """Find the largest block that the device can give, to 1 %, by asking for it."""
    backend.release_cached()
    low, high = 0, backend.memory().limit_bytes or backend.memory().total_bytes
    while high - low > high // 100:
        middle = (low + high) // 2
        try:
            backend.allocate(middle).free()
            low = middle
        except Exception as error:
            if not classify(error).is_oom:
                raise
            high = middle
        backend.release_cached()
    return low


@pytest.mark.oom
class TestGPUFallback:
    """Does it go on when the device has no memory?"""

    def first_answer_s(self, subject: Subject, expected: Sequence[Result], after: int) -> float:
        """Wait for a right answer about samples from a position on; give the seconds that took."""
        same = same_output(subject)
        right = {(each.start, each.stop): each.output for each in expected if each.start >= after}

        def answered() -> bool:
            outputs = [(right.get((each.start, each.stop)), each.output) for each in subject.results()]
            return any(ours is not None and same(output, ours) for ours, output in outputs)

        began_s = time.monotonic()
        wait_until(answered, 31)
        return time.monotonic() - began_s

    def test_gpu_to_cpu_fallback_on_oom(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """Graceful fallback when GPU OOMs.

        Pass criteria:
        - OOM detected correctly
        - CPU fallback succeeds
        - Processing continues
        - User notified
        - First right result within 30 s of the OOM
        - Real-time factor after the fallback < 1
        """
        stops = (8 * SECOND, 40 * SECOND, 70 * SECOND)
        expected = undisturbed(*stops)
        subject = new_subject(backend)
        stream.feed(subject, 0, stops[0])
        subject.drain(60)
        device, ooms = subject.device(), subject.metrics()[METRIC_OOMS]
        with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
            stream.feed(subject, stops[0], stops[1])
            # Until it strikes, or all is answered without.
            wait_until(lambda: bool(fault.record().faults_fired) or not unanswered(subject.results(), stops[1]), 30)
            first_answer_s = self.first_answer_s(subject, expected, stops[0])
            subject.drain(60)
            began_s = time.perf_counter()
            stream.feed(subject, stops[1], stops[2])
            subject.drain(60)
            took_s = time.perf_counter() - began_s
            record = fault.record()

        results, told = subject.results(), counts(subject)
        elsewhere = {result.device for result in results if result.start >= stops[1]} - {device}
        judge("ooms_undetected", abs(record.faults_fired - (subject.metrics()[METRIC_OOMS] - ooms)), fault=record)
        judge("fallbacks", len(elsewhere), fault=record)
        judge("answers_wrong", wrong(results, expected, same_output(subject)) + sum(untiled(results, stops[-1])))
        judge("notifications", min(told["oom_detected"], told["cpu_fallback"]), fault=record)
        judge("first_answer", first_answer_s, fault=record)
        judge("real_time_factor", took_s * SECOND / (stops[2] - stops[1]), fault=record)

    def test_rapid_toggle_with_fallback(
        self,
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        parameter: Parameter,
        new_sampler: NewSampler,
        undisturbed: Undisturbed,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """Recording toggles with GPU/CPU transitions (50 cycles).

        Pass criteria:
        - All toggles complete
        - Every cycle goes to the CPU and back
        - Every answer right
        - Memory cleaned between toggles (within 16 MB)
        - No leak detected from cycle to cycle
        - No resource leaks
        """
        subject = new_subject(backend)
        home = subject.device()
        position, warm_up, cycles = 0, 5, int(parameter("cycles"))
        fired = seen = toggled = moved = 0
        stops: list[int] = []
        last = FaultRecord(0, 0, 0, None)

        def refuses(position: int) -> bool:
            """Say whether a block that is spoken while the recording is stopped stays outside."""
            try:
                return subject.feed(position, stream[position : position + SECOND]) <= position
            except Exception:
                return True

        def fall_back() -> bool:
            nonlocal position, fired, seen, last
            began = position
            with backend.arm(FaultPlan(Site.DEVICE_MEMORY, times=None)) as fault:
                position = stream.feed(subject, began, began + SECOND)
                subject.drain(30)
                last = fault.record()
                fired, seen = fired + last.faults_fired, seen + last.points_seen
            stops.append(position)
            return any(result.start >= began and result.device != home for result in subject.results())

        def come_back() -> bool:
            return wait_until(lambda: subject.device() == home, 5)

        def toggle() -> None:
            nonlocal toggled
            toggled += (not subject.toggle()) and refuses(position)
            toggled += subject.toggle()

        def cycle() -> Sample:
            nonlocal moved
            away, back = fall_back(), come_back()
            moved += away and back
            toggle()
            return read()

        def read() -> Sample:
            quiesce(subject)
            return sampler.sample(backend.memory().used_bytes)

        sampler = new_sampler(subject)
        position = stream.feed(subject, 0, WARM_UP_SAMPLES)
        stops.append(position)
        for _ in range(warm_up):
            before = after = cycle()
        opened = opened_at_rest(subject.process_ids)
        sampler, fired, seen, toggled, moved = new_sampler(subject), 0, 0, 0, 0
        live, minima, done = progress(None), not can_rest(subject), 0

        def load() -> growth.Growth:
            nonlocal after, done
            for _ in range(cycles):
                after = cycle()
                done += 1
                live.update(after.uss_bytes, text=f"{done} cycles of {cycles}")
            return growth.judge(sampler, unit="cycle", floor=CYCLE_FLOOR_BYTES, minima=minima)

        found = load()
        if found.unproved:
            judge.say(f"extended once, for {cycles} cycles left it open: {found.reason}")
            found = load()
        live.done()

        left = left_behind(subject, opened)
        record = FaultRecord(seen, fired, 0, last.provenance, f"{done} faults; {last.detail}")
        missing, toggles_failed = done - moved, 2 * done - toggled
        mistakes = wrong(subject.results(), undisturbed(*stops), same_output(subject))
        mistakes += sum(untiled(subject.results(), position))
        phases: dict[str, Callable[[], object]] = {
            "fallback": fall_back,
            "return": come_back,
            "toggle": toggle,
        }
        judge("toggles_failed", toggles_failed)
        judge("transitions_missing", missing, fault=record)
        judge("answers_wrong", mistakes, fault=record)
        judge("memory_excess", max(0, after.uss_bytes - before.uss_bytes) / MB)
        judge("leak_detected", len(found.leaking), series=sampler.recorded(), unproved=found.unproved)
        judge("resources_left", left.total)
        growth.tell(judge, sampler, found, lambda: attribute(phases, read, subject.process_ids))
        judge.say(f"left behind: {left}")
        if left.total and not judge.complaint:
            judge.say("\n".join(attribute(phases, read, subject.process_ids)))


@pytest.mark.gpu
@pytest.mark.recovery
@pytest.mark.needs("device_error")
class TestCUDAErrorRecovery:
    """Does it get over an error of the device?"""

    def test_cuda_error_recovery(self, backend: Backend, new_subject: NewSubject, stream: Stream, judge: Judge) -> None:
        """Recovery from CUDA errors.

        Pass criteria:
        - Error detected
        - Recovery attempted
        - A new worker after a sticky error
        - GPU returns to operational state
        """
        subject = new_subject(backend)
        stream.feed(subject, 0, 2 * SECOND)
        subject.drain(60)
        before = subject.process_ids()
        with arm_device_fault(backend, FaultPlan(Site.DEVICE_ERROR)) as fault:
            stream.feed(subject, 2 * SECOND, 8 * SECOND)
            subject.drain(60)
            record = fault.record()
        errors = subject.metrics()[METRIC_DEVICE_ERRORS]
        judge("errors_undetected", max(0, record.faults_fired - errors), fault=record)
        judge("recoveries", counts(subject)["recovered"], fault=record)
        judge("workers_kept", not is_replaced(before, subject.process_ids()), fault=record)
        judge("device_healthy", backend.healthy().ok, fault=record)

    def test_repeated_cuda_errors(
        self, backend: Backend, new_subject: NewSubject, stream: Stream, undisturbed: Undisturbed, judge: Judge
    ) -> None:
        """Multiple CUDA error handling (3 errors): one of each kind with work between them, then 3 in a row.

        Pass criteria:
        - All errors handled
        - A new worker after each sticky error
        - CPU mode after three errors in a row
        - GPU remains available
        - No permanent damage
        """
        subject = new_subject(backend)
        device = subject.device()
        plans = [FaultPlan(site) for site in (Site.DEVICE_ERROR, Site.DEVICE_ASSERT, Site.DEVICE_ADDRESS)]
        plans.append(FaultPlan(Site.DEVICE_ERROR, times=3, disarm_after_s=300))
        stops = [2 * SECOND]
        stream.feed(subject, 0, stops[0])
        subject.drain(60)
        records: list[FaultRecord] = []
        kept = 0
        for plan in plans:
            before = subject.process_ids()
            with arm_device_fault(backend, plan) as fault:
                stops.append(stream.feed(subject, stops[-1], stops[-1] + 4 * SECOND))
                subject.drain(180)
                records.append(fault.record())
            kept += not is_replaced(before, subject.process_ids())
        results = subject.results()
        handled = subject.metrics()[METRIC_DEVICE_ERRORS]
        away = [each.device for each in results if each.start >= stops[-2] and each.device != device]
        # In a process that has nothing to do with what happened: it is the device itself that is asked.
        subject.close()

        record = together(records)
        expected = sum(plan.times or 0 for plan in plans)
        judge("errors_unhandled", max(0, expected - min(handled, record.faults_fired)), fault=record)
        judge("workers_kept", kept, fault=record)
        judge("cpu_mode", bool(away), fault=record)
        judge("device_healthy", backend.healthy().ok, fault=record)
        mistakes = wrong(results, undisturbed(*stops), same_output(subject)) + sum(untiled(results, stops[-1]))
        judge("answers_wrong", mistakes, fault=record)


def arm_device_fault(backend: Backend, plan: FaultPlan) -> ArmedFault:
    """Arm a fault of the device; where it may not be brought about on this machine, the test is not run."""
    try:
        return backend.arm(plan)
    except Unsupported:
        raise
    except BackendError as error:
        pytest.skip(f"not run: {error}")


def is_replaced(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether one of a subject's processes is gone, and another is there."""
    return bool(set(before) - set(after)) and bool(set(after) - set(before))


def together(records: Sequence[FaultRecord]) -> FaultRecord:
    """Count several faults as one."""
    return FaultRecord(
        points_seen=sum(each.points_seen for each in records),
        faults_fired=sum(each.faults_fired for each in records),
        absorbed=sum(each.absorbed for each in records),
        provenance=next((each.provenance for each in records if each.provenance), None),
        detail=" | ".join(f"{each.faults_fired} fired: {each.detail}" for each in records),
    )


@pytest.mark.recovery
class TestEmergencyShutdown:
    """Does it end in order, with everything kept, when there is no memory left to go on?"""

    #: Host memory that the subject's process may take beyond what it holds when the fault begins.
    HEADROOM_BYTES = 400 * MB

    def starved(self, hosted: Callable[..., Hosted], live: Progress) -> tuple[Hosted, int, FaultRecord, set[str]]:
        """Run a subject in a process whose memory is filled up.

        Give it, its exit status, what was done to it, and the shared memory with a name that it had.
        """
        host = hosted(stop=8 * SECOND, starve_headroom_bytes=self.HEADROOM_BYTES)
        shared: set[str] = set()
        while host.process.poll() is None and host.read(0.25):
            shared |= host.shared_memory()
            used = host.last("pressure") or 0.0
            live.update(used * (host.last("limit_bytes") or 0), text=f"{used:.1%} of the limit")
        live.done()
        status = host.end(10)
        readings = host.all("pressure")
        record = FaultRecord(
            points_seen=len(readings),
            faults_fired=int(max(readings, default=0.0) >= 0.8),
            absorbed=0,
            provenance=None,
            detail=f"RLIMIT_DATA of {host.last('limit_bytes')} bytes, filled to {max(readings, default=0.0):.1%}",
        )
        return host, status, capped(record), shared

    def test_emergency_shutdown_trigger(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        tmp_path: Path,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """Emergency shutdown on critical memory.

        Pass criteria:
        - Shutdown triggered at threshold (above 98%)
        - Resources cleaned up
        - Clean process exit (status 75)
        """
        host, status, record, shared = self.starved(hosted, progress(None))
        left = {str(path) for path in host.temporary.iterdir()}
        left |= {each for each in shared if Path(each).exists() or each in system_v_segments()}
        left |= {str(path) for path in tmp_path.rglob("*") if path.name.endswith(("-wal", "-shm", "-journal", ".tmp"))}
        # What ends with its parent takes a moment to do so.
        left |= {f"{process.pid} (process)" for process in still_running(host.family, 2)}
        try:
            new_subject(backend).close()
        except Exception as error:
            left.add(f"a lock: the folder cannot be opened again: {error_text(error)}")
        judge.say(f"left behind: {sorted(left)}; the process said: {host.said()}")
        at_shutdown = max(host.all("pressure"), default=0.0) if host.last("shutdown") else 0.0
        judge("pressure_at_shutdown", 100 * at_shutdown, fault=record)
        judge("left_behind", len(left))
        judge("exit_status", status, fault=record)

    def test_data_preservation_on_shutdown(
        self,
        hosted: Callable[..., Hosted],
        backend: Backend,
        new_subject: NewSubject,
        stream: Stream,
        progress: NewProgress,
        judge: Judge,
    ) -> None:
        """Data saving during emergency shutdown.

        Pass criteria:
        - All buffered audio saved
        - No sample loss
        - Recovery possible
        """
        host, _, record, _ = self.starved(hosted, progress(None))
        accepted = max(host.all("accepted"))
        subject = new_subject(backend)
        kept = recovered(subject)
        if kept is None:
            pytest.skip("not run: the subject has no recovered(), so what it kept cannot be compared")
        subject.drain(60)
        judge("samples_unsaved", max(0, accepted - len(kept)), fault=record)
        judge("samples_different", stream.different(kept), fault=record)
        judge("samples_unanswered", unanswered(subject.results(), len(kept)), fault=record)


def system_v_segments() -> set[str]:
    """List the System V shared memory that there is now, as ``Hosted.shared_memory`` names it."""
    listing = Path("/proc/sysvipc/shm")
    lines = listing.read_text().splitlines()[1:] if listing.is_file() else []
    return {f"System V segment {line.split()[1]}" for line in lines}


def capped(record: FaultRecord) -> FaultRecord:
    """Mark a fault of a native limit, where it fired."""
    return replace(record, provenance=Provenance.CAPPED if record.faults_fired else None)


if __name__ == "__main__":
    from qualification.stress import main

    raise SystemExit(main())
