"""The stress harness: a subject that records real speech, in real time, under real memory pressure, for hours.

    python tests/test_memory_protection.py --duration 1.0

Exit statuses: 0 every criterion holds; 1 one does not; 2 refused before anything ran; 3 what was judged holds, but not
everything could be judged (a run too short for a verdict on leaks, say); 130 interrupted before anything was recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from backends.contract import Allocation, Backend, Capability, MemoryReading
from backends.errors import classify
from backends.faults.ballast import HostBallast, free
from backends.host import available_bytes
from backends.model import DEFAULT_MODEL, SAMPLE_RATE_HZ
from qualification import growth, history, leaks, plot
from qualification.attribution import attribute, opened_at_rest
from qualification.criteria import Criterion
from qualification.host import MB
from qualification.judge import Judge
from qualification.live import Live, View, known, where
from qualification.observe import Left, can_rest, counts, left_behind, quiesce, sampler_of
from qualification.platform_check import MINIMUM_FREE_DISK_BYTES, disk_refusal, gib
from qualification.quoting import error_text, place, printable, unquoted
from qualification.records import RecordError
from qualification.run import DEFAULT_AUDIO, DEFAULT_RESULTS, Refused, Run, prepare
from qualification.sampling import UNREAD, Sample, Sampler
from qualification.stream import Stream, unanswered, untiled
from qualification.subject import DEFAULT_SUBJECT, Result, Subject, SubjectContext

EXIT_GOOD = 0
EXIT_FAILED = 1
EXIT_INCONCLUSIVE = 3
EXIT_INTERRUPTED = 130

TEST = "stress_harness"
CRITERIA = [
    Criterion(TEST, *row)
    for row in (
        ("crashes", "==", 0, "crashes", "No crash, hang or emergency shutdown; nothing set aside or not stored"),
        ("samples_unanswered", "==", 0, "samples", "Every sample answered"),
        ("gaps_and_overlaps", "==", 0, "places", "Results tile what was accepted"),
        ("toggles_failed", "==", 0, "toggles", "Recording stops and starts again at every toggle"),
        ("pressure_lost", "==", 0, "samples", "The pressure is held throughout"),
        ("resources_left", "==", 0, "descriptors, threads and processes", "No resource leaks"),
        ("leak_detected", "==", 0, "leaks", "No leak detected"),
        ("growth_rate", "<", 1.0, "MB/s", "Memory growth rate < 1 MB/s"),
        ("total_growth", "<", 100.0, "MB", "Total growth < 100 MB (by its upper bound)"),
    )
]

BLOCK_SAMPLES = SAMPLE_RATE_HZ // 10
#: Recorded at once before the clock starts, so that caches that fill up, once, are not taken for growth without end.
WARM_UP_SAMPLES = 60 * SAMPLE_RATE_HZ
#: What is held and what the model needs for a full batch take this share of the device: below every level of pressure.
DEVICE_SHARE = 0.6
FULL_BATCH = 16
PIECE_BYTES = 50 * MB
SAMPLES_PER_RUN = 240
SAMPLE_EVERY_LEAST_S = 1.0
#: Before that, pages of code that are read in on first use look like growth.
LEAKS_AFTER_S = 60.0
PAUSE_S = 1.0
DRAIN_S = 60.0
#: A spool of float32 audio takes 64 kB/s; with its results, less than this.
SPOOL_BYTES_PER_S = 100_000
#: The neighbour outlives the run by this much: the time to start, to drain and to be late.
NEIGHBOUR_SLACK_S = 600.0
_RESERVE_BYTES = 1 << 30

_HELP = """\
The subject records real speech in real time, in blocks of 100 ms, and recording is stopped for a moment and started
again at each toggle. Meanwhile memory is short, for real:

  device  --gpu-pressure MB are held by the backend's own allocations. Where the runtime can cap its memory, the device
          is limited so that they, and what the model needs for a full batch, are 60 % of it: less than any level at
          which a subject has to give way. On the backend cpu the device is such an arena in host memory.
  host    --cpu-pressure MB are held by a process beside it, never leaving less than 1 GiB or 10 % of what was
          available, whichever is more.

Memory, descriptors and threads are read while the subject is at rest, every second, or 240 times in all where that is
less often. A verdict on leaks needs a minute at least: a shorter run is inconclusive, whatever else it shows. Ctrl-C
ends the run in order, with a verdict on what there is; a second one ends it at once.
"""
_EXAMPLES = """\
examples:
  %(prog)s                                    an hour with the defaults
  %(prog)s --duration 0.1                     six minutes
  %(prog)s --duration 4.0 --gpu-pressure 2000 --cpu-pressure 1000 --toggle-interval 60.0
  %(prog)s --backend cpu --subject my_application.py:factory --audio speech.wav

exit status:
  0 every criterion holds            2 refused before anything ran
  1 a criterion does not hold        3 what was judged holds, but not everything could be judged: run longer
  130 interrupted before anything was recorded
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stress harness; give the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = parser.parse_args(words)
    ending = Ending()
    try:
        return _main(options, words, ending)
    except Refused as error:
        parser.error(str(error))
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted: no verdict", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        ending.restore()


def _main(options: argparse.Namespace, words: Sequence[str], ending: Ending) -> int:
    duration_s = options.duration * 3600
    neighbour_bytes = options.cpu_pressure * MB
    reserve_bytes = max(_RESERVE_BYTES, available_bytes() // 10)
    _require_host_memory(neighbour_bytes, reserve_bytes)
    spool_bytes = int(duration_s * SPOOL_BYTES_PER_S)
    if refused := disk_refusal(Path(tempfile.gettempdir()), MINIMUM_FREE_DISK_BYTES + spool_bytes):
        raise Refused(f"--duration {options.duration:g}: the audio of the whole run is kept, so {refused}")
    run = prepare(
        backend=options.backend,
        device=options.device,
        subject=options.subject,
        model=options.model,
        audio=options.audio,
        allow_shared_gpu=options.allow_shared_gpu,
    )
    run.tests, run.own_profile = [TEST], "stress"

    with ExitStack() as stack:
        stack.callback(run.release_lock)
        run.take_device(options.lock_wait, lambda line: print(line, flush=True))
        with ExitStack() as pressure:
            backend = pressure.enter_context(closing(run.new_backend()))
            held = _hold_device(backend, options.gpu_pressure * MB, _needed_bytes(run))
            pressure.callback(free, held)
            # Again, now that the device has taken its share, which may have been the host's.
            _require_host_memory(neighbour_bytes, reserve_bytes)
            neighbour = pressure.enter_context(_neighbour(neighbour_bytes, duration_s + NEIGHBOUR_SLACK_S))
            asked = ("duration", "gpu_pressure", "cpu_pressure", "toggle_interval")
            path = run.begin_records(options.results, stress={name: getattr(options, name) for name in asked})
            stack.callback(run.end_records)
            print("\n".join(run.header()), flush=True)

            judge = Judge(TEST, CRITERIA, run.write)
            workdir = Path(tempfile.mkdtemp(prefix="plimsoll-stress-"))
            planted = f"{options.gpu_pressure} MB on the device, {options.cpu_pressure} MB on the host"
            recording = Recording(run, backend, duration_s, options.toggle_interval, neighbour.process_id, planted)
            try:
                recording.run(workdir, ending)
            except KeyboardInterrupt:
                judge.end("not_run", "interrupted before it could be judged")
                shutil.rmtree(workdir, ignore_errors=True)
                raise
        recording.judge(judge)
        repeat = shlex.join(["python", "tests/test_memory_protection.py", *words])
        run.write_test(
            test=TEST,
            id=TEST,
            outcome="failed" if judge.failed else "passed",
            repeat=repeat,
            evidence=unquoted(recording.summary()),
            **recording.told(),
        )

    print("\n".join([*recording.summary(), *_table(judge)]))
    for verdict in judge.failed:
        print("", *verdict.lines(repeat), sep="\n")
    print(f"\nrecords: {path}", flush=True)
    print(recording.plot(path.with_suffix(".svg")))
    if judge.failed:
        print(f"the subject's files are kept: {workdir}")
    else:
        shutil.rmtree(workdir, ignore_errors=True)
    status, line = _conclude(judge)
    summary = run.summary(status)
    if status == EXIT_INCONCLUSIVE:  # what was judged holds, and not everything was judged: that is no pass
        summary |= {"verdict": "not_run", "reason": line}
    print(*history.publish(summary, options.results / history.FILE, history.KEY), line, sep="\n", flush=True)
    return status


# What is asked for.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tests/test_memory_protection.py",
        usage="%(prog)s [options]",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, metavar: str, default: object, kind: Callable[[str], object], text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        parser.add_argument(name, metavar=metavar, default=default, type=kind, help=text + shown)

    add("--duration", "HOURS", 1.0, _number("hours", 0.0001, 24), "how long to record")
    add("--gpu-pressure", "MB", 1000, _megabytes, "device memory held, in MB of 1,000,000 bytes")
    add("--cpu-pressure", "MB", 500, _megabytes, "host memory held by a process beside it, in MB")
    add(
        "--toggle-interval",
        "SECONDS",
        30.0,
        _number("seconds", 1, 86_400),
        "how often recording is stopped and started",
    )
    add("--backend", "NAME", None, str, "backend to run on (default: the first that is available)")
    add("--device", "NAME", None, str, "device of the backend, such as cuda:1 (default: its first)")
    add("--subject", "MODULE:FACTORY", DEFAULT_SUBJECT, str, "application to stress")
    parser.add_argument("--model", metavar="FILE", type=Path, default=DEFAULT_MODEL, help="acoustic model to load")
    parser.add_argument(
        "--audio", metavar="FILE.wav", type=Path, default=DEFAULT_AUDIO, help="speech, 16 kHz mono 16-bit"
    )
    parser.add_argument(
        "--results", metavar="FOLDER", type=Path, default=DEFAULT_RESULTS, help="folder for the records"
    )
    add("--lock-wait", "SECONDS", 0.0, _number("seconds", 0, 86_400), "queue behind another run so long")
    parser.add_argument(
        "--allow-shared-gpu",
        action="store_true",
        help="hold memory of a GPU that other processes use, or that drives a display",
    )
    return parser


def _number(unit: str, least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        expected = f"expected a number from {least:g} to {most:g} {unit}"
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: {expected}") from None
        # NaN is in no range.
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: {expected}")
        return value

    return parse


def _megabytes(text: str) -> int:
    return math.floor(_number("MB", 1, 1_000_000)(text))


# Pressure.


def _require_host_memory(size_bytes: int, reserve_bytes: int) -> None:
    """Refuse to hold what would not leave the reserve."""
    available = available_bytes()
    if available - size_bytes < reserve_bytes:
        raise Refused(
            f"--cpu-pressure: {gib(available)} of host memory is available and {gib(reserve_bytes)} has to stay so: "
            f"expected at most {max(0, available - reserve_bytes) // MB} MB"
        )


def _needed_bytes(run: Run) -> int:
    """Say what the model needs of the device for a full batch, weights included."""
    with closing(run.new_backend()) as backend:
        before = backend.memory().used_bytes
        with closing(backend.load(run.model)) as model:
            return max(0, backend.memory().used_bytes - before) + model.working_set_bytes(FULL_BATCH)


def _hold_device(backend: Backend, size_bytes: int, needed_bytes: int) -> list[Allocation]:
    """Limit the device where it can be, and hold this much of it. Raises Refused for what it does not have."""
    held: list[Allocation] = []
    try:
        if backend.capabilities[Capability.MEMORY_LIMIT].yes:
            backend.limit_memory(int((size_bytes + needed_bytes) / DEVICE_SHARE))
        left = size_bytes
        while left > 0:
            held.append(backend.allocate(min(left, PIECE_BYTES)))
            left -= PIECE_BYTES
    except Exception as error:
        free(held)
        if not isinstance(error, ValueError) and not classify(error).is_oom:
            raise
        raise Refused(
            f"--gpu-pressure {size_bytes // MB}: the device cannot hold that beside a model that needs "
            f"{needed_bytes // MB} MB: {str(error)[:300]}"
        ) from error
    return held


def _neighbour(size_bytes: int, limit_s: float) -> HostBallast:
    try:
        return HostBallast(size_bytes, limit_s)
    except RuntimeError as error:
        raise Refused(f"--cpu-pressure {size_bytes // MB}: {error}") from error


class Ending:
    """Ctrl-C and SIGTERM: an end in order while something is recorded, at once before that and for the second one."""

    def __init__(self) -> None:
        """Listen from here on."""
        self.asked = ""
        self.in_order = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Listen no longer."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        again, self.asked = bool(self.asked), signal.Signals(number).name
        if again or not self.in_order:
            raise KeyboardInterrupt


# The run.


class Recording:
    """One recording under pressure: what was fed, what was read at rest, and what went wrong."""

    def __init__(
        self, run: Run, backend: Backend, duration_s: float, toggle_interval_s: float, neighbour_id: int, planted: str
    ) -> None:
        """Prepare to record; nothing is started. ``planted`` says what is held."""
        self._run, self._backend, self._neighbour_id = run, backend, neighbour_id
        self._duration_s, self._toggle_interval_s, self._planted = duration_s, toggle_interval_s, planted
        self._stream = Stream(run.samples)
        self._sampler = Sampler()
        # When the sampler's time is 0, as the time that events have.
        self._zero_s = time.time()
        self._live = Live("stress", duration_s)
        self._slope_at: tuple[Sample | None, leaks.Slope | None] = None, None
        self._elapsed_s = 0.0
        self._spoken = self._accepted = 0
        self._toggles = self._toggles_failed = self._pressure_lost = 0
        self._first: Sample | None = None
        self._device_limit_bytes: int | None = None
        self._left: Left | None = None
        self._growth: growth.Growth | None = None
        self._looked_into: list[str] = []
        self._crash = self._ended_by = ""
        self._results: Sequence[Result] = ()
        self._told: Counter[str] = Counter()
        self._events: list[tuple[float, str]] = []

    def run(self, workdir: Path, ending: Ending) -> None:
        """Record until the time is over, the subject fails, or an end is asked for; then end the subject."""
        device, memory = self._backend.device, self._backend.memory()
        limit_bytes, self._device_limit_bytes = memory.limit_bytes, _bound_bytes(memory)
        limits = {} if limit_bytes is None else {"device_limit_bytes": limit_bytes}
        with self._live, ExitStack() as stack, self._noting_a_crash():
            subject = self._run.factory(SubjectContext(workdir, self._backend, device, self._run.model, limits))
            stack.callback(self._end, subject)
            self._sampler = sampler_of(subject, self._run.card, card_is_ours=not self._run.allow_shared_gpu)
            self._zero_s = time.time()
            self._speak(subject, WARM_UP_SAMPLES)
            self._first = self._sample(subject)
            opened = opened_at_rest(subject.process_ids)
            ending.in_order = True
            self._record(subject, ending)
            self._ended_by = ending.asked
            subject.drain(DRAIN_S)
            self._sample(subject)
            self._left = left_behind(subject, opened)
            self._growth = self._judge_growth(subject)
            # What follows can be cut short.
            ending.in_order = False
            try:
                self._looked_into = self._look_into(subject)
            except KeyboardInterrupt:
                self._looked_into = ["", "what grew was not looked into to the end: interrupted"]
            finally:
                ending.in_order = True

    def _record(self, subject: Subject, ending: Ending) -> None:
        began_s = next_block_s = time.monotonic()
        sample_at_s, toggle_at_s = began_s + self._sample_every_s, began_s + self._toggle_interval_s
        while not ending.asked and (now_s := time.monotonic()) - began_s < self._duration_s:
            self._elapsed_s = now_s - began_s
            if now_s >= toggle_at_s:
                self._toggle(subject)
                # Nothing was spoken meanwhile.
                next_block_s = time.monotonic()
                toggle_at_s = next_block_s + self._toggle_interval_s
            self._speak(subject, BLOCK_SAMPLES)
            next_block_s += BLOCK_SAMPLES / SAMPLE_RATE_HZ
            if now_s >= sample_at_s:
                self._sample(subject)
                sample_at_s = max(sample_at_s, now_s) + self._sample_every_s
            self._live.update(lambda: self._view(subject))
            # Real time: the next block has not been spoken yet.
            time.sleep(max(0.0, next_block_s - time.monotonic()))
        self._elapsed_s = time.monotonic() - began_s

    def _speak(self, subject: Subject, samples: int) -> None:
        """Feed what was spoken, and what the subject has not accepted yet, in blocks."""
        self._spoken += samples
        while self._accepted < self._spoken:
            stop = min(self._accepted + BLOCK_SAMPLES, self._spoken)
            accepted = subject.feed(self._accepted, self._stream[self._accepted : stop])
            if accepted <= self._accepted:
                break
            self._accepted = accepted

    def _toggle(self, subject: Subject) -> None:
        self._toggles += 1
        records = subject.toggle()
        time.sleep(min(PAUSE_S, self._toggle_interval_s / 10))
        self._toggles_failed += records or not subject.toggle()

    def _sample(self, subject: Subject) -> Sample:
        """Read everything with the subject at rest."""
        quiesce(subject)
        sample = self._sampler.sample(self._backend.memory().used_bytes)
        self._pressure_lost += not _alive(self._neighbour_id)
        return sample

    @property
    def _sample_every_s(self) -> float:
        return max(SAMPLE_EVERY_LEAST_S, self._duration_s / SAMPLES_PER_RUN)

    def _slope(self) -> leaks.Slope | None:
        """Give the slope so far. To judge takes time and memory itself: once for a sample, and only to be shown."""
        last, (at, slope) = self._sampler.last, self._slope_at
        if last is not at:
            slope = growth.interval_so_far(self._sampler)
            self._slope_at = last, slope
        return slope

    def _view(self, subject: Subject) -> View:
        last, memory, device = self._sampler.last, self._backend.memory(), self._backend.device
        heaps = [each for each in (last.heap_used_bytes, last.workers_heap_bytes) if each != UNREAD]
        return View(
            elapsed_s=self._elapsed_s,
            exact_bytes=sum(heaps) if heaps else None,
            catch_all_bytes=last.uss_bytes,
            slope=self._slope,
            device=where(subject.device(), device),
            device_used_bytes=memory.used_bytes,
            device_limit_bytes=_bound_bytes(memory),
            host_fraction=psutil.virtual_memory().percent / 100,
            kinds=[event.kind for event in subject.events()],
            toggles=self._toggles,
            toggles_failed=self._toggles_failed,
            planted=self._planted,
        )

    def _end(self, subject: Subject) -> None:
        """Take in what the subject made and told, and close it, whatever became of it."""
        with self._noting_a_crash():
            self._told = counts(subject)
            self._events = plot.run_times(subject.events(), self._zero_s)
        with self._noting_a_crash():
            # What leaked until it failed is perhaps why.
            if self._growth is None:
                self._growth = self._judge_growth(subject)
        with self._noting_a_crash():
            self._results = list(subject.results())
        with self._noting_a_crash():
            subject.close()

    @contextlib.contextmanager
    def _noting_a_crash(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # The first is the cause; what fails after it is its consequence.
            self._crash = self._crash or f"{error_text(error)} at {place(error)}"

    # The verdict.

    def judge(self, judge: Judge) -> None:
        """Judge each criterion that there is something to judge by."""
        missing: list[str] = []
        incidents = sum(self._told[kind] for kind in ("emergency_shutdown", "chunk_set_aside", "storage_failed"))
        judge("crashes", max(incidents, bool(self._crash)))
        if self._spoken:
            judge("samples_unanswered", unanswered(self._results, self._spoken))
            judge("gaps_and_overlaps", sum(untiled(self._results, self._accepted)))
        if self._toggles:
            judge("toggles_failed", self._toggles_failed)
        else:
            missing.append(f"no toggle was due in {self._elapsed_s:.0f} s")
        if self._first is not None and self._sampler.last is not self._first:
            judge("pressure_lost", self._pressure_lost)
        if self._left is not None:
            judge("resources_left", self._left.total)
        series = self._sampler.recorded() if self._first is not None else None
        found = self._growth
        if found is None:
            missing.append(
                f"a verdict on leaks needs {LEAKS_AFTER_S:g} s and {leaks.SAMPLES_MIN} samples, "
                f"one every {self._sample_every_s:g} s"
            )
        else:
            if found.worst.verdict == "inconclusive":
                missing.append(found.reason)
            else:
                judge("leak_detected", len(found.leaking), series=series)
                series = None
            # Either all of the interval is below a limit, or all above it, or more has to be read.
            rate = ("growth_rate", found.upper, found.lower)
            total = ("total_growth", found.total_bytes, found.lower * found.span)
            for name, *bounds in (rate, total):
                upper, lower = (bound / MB for bound in bounds)
                limit = judge.limit(name)
                if upper < limit or lower >= limit:
                    judge(name, upper)
                else:
                    missing.append(f"{name} is between {lower:.3g} and {upper:.3g}")
        reason = "the subject failed before this could be judged" if self._crash else "; ".join(missing)
        judge.end("not_run", reason, series)

    def summary(self) -> list[str]:
        """Say in a few lines what happened."""
        spoken, answered = self._spoken, self._spoken - unanswered(self._results, self._spoken)
        gaps, overlaps = untiled(self._results, self._accepted)
        lines = [
            "",
            f"stress: {self._took}" + (f", ended by {self._ended_by}" if self._ended_by else ""),
            f"  answered   {answered} of {spoken} samples ({spoken / SAMPLE_RATE_HZ:.1f} s), "
            f"{self._accepted} accepted, {gaps} gaps, {overlaps} overlaps",
            f"  toggles    {self._toggles}, {self._toggles_failed} failed",
            "  events     " + (", ".join(f"{known(kind)} {n}" for kind, n in self._told.items()) or "none"),
            f"  left       {self._left or 'not known'}",
            f"  sampling   {self._sampler.cost[0] / MB:.2f} MB, {self._sampler.cost[1]:.2%} of the time",
        ]
        if self._first is not None and self._growth is None:
            lines.append("  memory     no verdict yet")
        elif self._growth is not None:
            lines += ["", *growth.table(self._sampler, self._growth)]
            lines.append(f"{self._growth.worst.verdict.replace('_', ' ')}: {self._growth.reason}")
        if self._crash:
            # One line, and no control characters: the text may be a subject's.
            lines.append(f"  crash      {printable(self._crash)}")
        return [*lines, *self._looked_into]

    def told(self) -> dict[str, Any]:
        """Give what the records keep of the recording besides its verdicts."""
        return {
            "duration_s": self._elapsed_s,
            "events": self._events,
            "device_limit_bytes": self._device_limit_bytes,
        }

    def plot(self, path: Path) -> str:
        """Plot memory and events into a file, and say so, or why not."""
        verdicts = self._growth.verdicts if self._growth is not None else {}
        try:
            failed = plot.write(
                path,
                self._sampler.recorded(),
                self._events,
                title=f"stress {self._took}: {self._run.subject_spec} on {self._run.backend.name}, {self._planted}",
                verdicts={name: plot.slope_text(each) for name, each in verdicts.items()},
                judged_from_s={name: each.judged_from for name, each in verdicts.items()},
                device_limit_bytes=self._device_limit_bytes,
            )
        except KeyboardInterrupt:
            # The verdict is there already.
            failed = "interrupted"
        return f"plot: none, {failed}" if failed else f"plot: {path}"

    @property
    def _took(self) -> str:
        took, asked = (timedelta(seconds=round(each)) for each in (self._elapsed_s, self._duration_s))
        return f"{took} of {asked}"

    def _judge_growth(self, subject: Subject) -> growth.Growth | None:
        """Judge what grew; None before there is enough to judge by."""
        t_s = self._sampler.series("uss_bytes")[0]
        if len(t_s) < leaks.SAMPLES_MIN or t_s[-1] - t_s[0] < LEAKS_AFTER_S:
            return None
        return growth.judge(self._sampler, minima=not can_rest(subject))

    def _look_into(self, subject: Subject) -> list[str]:
        """Repeat the work and name what stays, where something does."""
        leaks_ = self._growth is not None and self._growth.worst.verdict == "leak"
        if not leaks_ and not (self._left and self._left.total):
            return []
        phases: dict[str, Callable[[], object]] = {
            "recording 8 s": lambda: self._speak(subject, 8 * SAMPLE_RATE_HZ),
            "toggle": lambda: (subject.toggle(), subject.toggle()),
        }
        # Of its own: what is read while allocations are followed is not what was judged.
        sampler = sampler_of(subject, self._run.card, card_is_ours=not self._run.allow_shared_gpu)

        def read() -> Sample:
            quiesce(subject)
            return sampler.sample(self._backend.memory().used_bytes)

        return ["", *attribute(phases, read, subject.process_ids)]


def _table(judge: Judge) -> list[str]:
    """Give each criterion's verdict as a line."""
    lines = [""]
    for each in judge.verdicts:
        value = f"{each.value:.6g}" if each.value is not None else "-"
        why = f"  ({each.reason})" if each.reason else ""
        lines.append(
            f"  {each.verdict.upper().replace('_', ' '):<8} {each.criterion.name:<20} {value:>10}  "
            f"limit {each.criterion.limit_text}{why}"
        )
    return lines


def _conclude(judge: Judge) -> tuple[int, str]:
    """Give the exit status and the line that says it."""
    if judge.failed:
        return EXIT_FAILED, f"FAIL: {', '.join(each.criterion.name for each in judge.failed)}"
    open_ = [each.criterion.name for each in judge.verdicts if each.verdict == "not_run"]
    if open_:
        return EXIT_INCONCLUSIVE, f"INCONCLUSIVE: what was judged holds; not judged, run longer: {', '.join(open_)}"
    return EXIT_GOOD, "PASS: every criterion holds"


def _bound_bytes(memory: MemoryReading) -> int:
    """Say what may be used of a device, or of all there is."""
    return memory.total_bytes if memory.limit_bytes is None else min(memory.limit_bytes, memory.total_bytes)


def _alive(process_id: int) -> bool:
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
