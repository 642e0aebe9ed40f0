"""The stress harness: a subject that records real speech, in real time, under real memory pressure, for hours.

    python tests/test_memory_protection.py --duration 1.0

Exit statuses: 0 every criterion holds; 1 one does not; 2 refused before anything ran; 3 what was judged holds, but not
everything could be judged (a run too short for a verdict on leaks, say); 130 interrupted before anything was recorded.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType

from backends.contract import Allocation, Backend, Capability
from backends.errors import classify
from backends.faults.ballast import HostBallast, free
from backends.host import available_bytes
from backends.model import DEFAULT_MODEL, SAMPLE_RATE_HZ
from qualification import leaks
from qualification.criteria import Criterion
from qualification.host import MB
from qualification.judge import Judge
from qualification.observe import counts
from qualification.platform_check import MINIMUM_FREE_DISK_BYTES, disk_refusal, gib
from qualification.progress import Progress
from qualification.run import DEFAULT_AUDIO, DEFAULT_RESULTS, Refused, Run, prepare
from qualification.sampling import Sampler
from qualification.stream import Stream, unanswered, untiled
from qualification.subject import DEFAULT_SUBJECT, Result, Subject

EXIT_GOOD = 0
EXIT_FAILED = 1
EXIT_INCONCLUSIVE = 3
EXIT_INTERRUPTED = 130

TEST = "stress_harness"
CRITERIA = [
    Criterion(TEST, *row)
    for row in (
        ("crashes", "==", 0, "crashes", "No crash and no emergency shutdown"),
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
#: Recorded at once before the clock starts, so that what is loaded on first use is not taken for growth.
WARM_UP_SAMPLES = 8 * SAMPLE_RATE_HZ
#: What is held and what the model needs for a full batch take this share of the device: below every level of pressure.
DEVICE_SHARE = 0.6
FULL_BATCH = 16
PIECE_BYTES = 50 * MB
SAMPLES_PER_RUN = 240
SAMPLE_EVERY_LEAST_S = 1.0
PAUSE_S = 1.0
DRAIN_S = 60.0
SHOW_EVERY_S = 0.5
#: A spool of float32 audio takes 64 kB/s; with its results, less than this.
SPOOL_BYTES_PER_S = 100_000
#: The neighbour outlives the run by this much: the time to start, to drain and to be late.
NEIGHBOUR_SLACK_S = 600.0
_RESERVE_BYTES = 1 << 30
_SERIES = {"rss_bytes": "resident", "heap_used_bytes": "heap in use", "device_used_bytes": "device"}

_HELP = """\
The subject records real speech in real time, in blocks of 100 ms, and recording is stopped for a moment and started
again at each toggle. Meanwhile memory is short, for real:

  device  --gpu-pressure MB are held by the backend's own allocations. Where the runtime can cap its memory, the device
          is limited so that they, and what the model needs for a full batch, are 60 % of it: less than any level at
          which a subject has to give way. On the backend cpu the device is such an arena in host memory.
  host    --cpu-pressure MB are held by a process beside it, never leaving less than 1 GiB or 10 % of what was
          available, whichever is more.

Memory, descriptors and threads are read while the subject is at rest, every second or 240 times in all. Ctrl-C ends
the run in order, with a verdict on what there is; a second one ends it at once.
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
    folder = Path(tempfile.gettempdir())
    if refused := disk_refusal(folder, MINIMUM_FREE_DISK_BYTES + int(duration_s * SPOOL_BYTES_PER_S)):
        raise Refused(f"--duration {options.duration:g}: {refused}, and the audio of the whole run is kept there")
    run = prepare(backend=options.backend, subject=options.subject, model=options.model, audio=options.audio)
    run.tests = [TEST]

    with ExitStack() as stack:
        stack.callback(run.release_lock)
        run.take_lock(options.lock_wait)
        backend = stack.enter_context(closing(run.backend()))
        held = _hold_device(backend, options.gpu_pressure * MB, _needed_bytes(run))
        stack.callback(free, held)
        # Again, now that the device has taken its share, which may have been the host's.
        _require_host_memory(neighbour_bytes, reserve_bytes)
        neighbour = stack.enter_context(_neighbour(neighbour_bytes, duration_s + NEIGHBOUR_SLACK_S))
        asked = ("duration", "gpu_pressure", "cpu_pressure", "toggle_interval")
        path = run.begin_records(options.results, stress={name: getattr(options, name) for name in asked})
        print("\n".join(run.header()), flush=True)

        workdir = Path(tempfile.mkdtemp(prefix="plimsoll-stress-"))
        judge = Judge(TEST, CRITERIA, run.write)
        recording = Recording(run, backend, workdir, duration_s, options.toggle_interval, neighbour.process_id, ending)
        try:
            try:
                recording.run()
            finally:
                # What the verdict needs in memory must not meet the pressure.
                free(held)
                neighbour.close()
                recording.judge(judge)
        finally:
            recording.close()
            if run.records is not None:
                run.records.close()

    for line in [*recording.summary(), *_table(judge)]:
        print(line)
    for verdict in judge.failed:
        print("", *verdict.lines(shlex.join(["python", "tests/test_memory_protection.py", *words])), sep="\n")
    print(f"\nrecords: {path}")
    if judge.failed:
        print(f"the subject's files are kept in {workdir}")
    else:
        shutil.rmtree(workdir, ignore_errors=True)
    status, line = _conclude(judge, recording.recorded, ending.asked)
    print(line, flush=True)
    return status


# What is asked for.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python tests/test_memory_protection.py",
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
    add("--subject", "MODULE:FACTORY", DEFAULT_SUBJECT, str, "application to stress")
    parser.add_argument("--model", metavar="FILE", type=Path, default=DEFAULT_MODEL, help="acoustic model to load")
    parser.add_argument(
        "--audio", metavar="FILE.wav", type=Path, default=DEFAULT_AUDIO, help="speech, 16 kHz mono 16-bit"
    )
    parser.add_argument(
        "--results", metavar="FOLDER", type=Path, default=DEFAULT_RESULTS, help="folder for the records"
    )
    add("--lock-wait", "SECONDS", 0.0, _number("seconds", 0, 86_400), "queue behind another run so long")
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
    with closing(run.backend()) as backend:
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
    # A terminal sends Ctrl-C to every process in it; the neighbour inherits that it is not to listen.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return HostBallast(size_bytes, limit_s)
    except RuntimeError as error:
        raise Refused(f"--cpu-pressure {size_bytes // MB}: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


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
        self,
        run: Run,
        backend: Backend,
        workdir: Path,
        duration_s: float,
        toggle_interval_s: float,
        neighbour_id: int,
        ending: Ending,
    ) -> None:
        """Prepare to record; nothing is started."""
        self._run, self._backend, self._workdir, self._ending = run, backend, workdir, ending
        self._duration_s, self._toggle_interval_s = duration_s, toggle_interval_s
        self._sample_every_s = max(SAMPLE_EVERY_LEAST_S, duration_s / SAMPLES_PER_RUN)
        self._neighbour_id = neighbour_id
        self._subject: Subject | None = None
        self._stream = Stream(run.samples)
        self._sampler = Sampler(lambda: self._subject.process_ids() if self._subject else ())
        self._progress = Progress("stress", duration_s, _write, sys.stdout.isatty())
        self._show_at_s = 0.0
        self._elapsed_s = 0.0
        self._spoken = self._accepted = 0
        self._toggles = self._toggles_failed = self._pressure_lost = 0
        self._crash = ""
        self._results: Sequence[Result] = ()
        self._verdicts: dict[str, leaks.LeakVerdict] = {}

    @property
    def recorded(self) -> bool:
        """Whether there is anything to judge."""
        return self._spoken > 0 or bool(self._crash)

    def run(self) -> None:
        """Record until the time is over, the subject fails, or an end is asked for."""
        with self._progress, self._noting_a_crash():
            self._subject = self._start()
            self._speak(self._subject, WARM_UP_SAMPLES)
            self._sample(self._subject)
            self._ending.in_order = True
            self._record(self._subject)
            self._subject.drain(DRAIN_S)
            self._sample(self._subject)

    def judge(self, judge: Judge) -> None:
        """Judge each criterion as far as there is something to judge it by."""
        told = 0
        with self._noting_a_crash():
            if self._subject is not None:
                told = counts(self._subject)["emergency_shutdown"]
                self._results = self._subject.results()
        if not self.recorded:
            judge.end("not_run", "interrupted before anything was recorded")
            return
        if self._crash:
            judge.say(self._crash)
        judge("crashes", max(told, bool(self._crash)))
        if self._spoken:
            judge("samples_unanswered", unanswered(self._results, self._spoken))
            judge("gaps_and_overlaps", sum(untiled(self._results, self._accepted)))
        if self._toggles:
            judge("toggles_failed", self._toggles_failed)
        t_s = self._sampler.series("rss_bytes")[0]
        if len(t_s) > 1:
            judge("pressure_lost", self._pressure_lost)
            judge("resources_left", sum(self._left().values()))
        self._judge_leaks(judge)
        judge.end("not_run", f"the run ended after {self._elapsed_s:.0f} s, before there was anything to judge this by")

    def close(self) -> None:
        """End the subject, whatever became of it."""
        if self._subject is not None:
            with self._noting_a_crash():
                self._subject.close()

    def summary(self) -> list[str]:
        """Say in a few lines what happened."""
        seconds = self._spoken / SAMPLE_RATE_HZ
        gaps, overlaps = untiled(self._results, self._accepted)
        answered = self._spoken - unanswered(self._results, self._spoken)
        kinds = [(kind, count) for kind, count in self._told.items()] if hasattr(self, "_told") else []
        return [f"{seconds} {gaps} {overlaps} {answered} {kinds}"]
