"""What protection costs: the worker engine against the in-process one, the pipeline's care against the bare runtime.

    python -m benchmarks.engine_cost [--pairs N] [--seed N] [--backend NAME] [--out FILE]

Everything is measured as interleaved pairs, in one run on one machine: what is compared takes turns, either side first
in half of the pairs, on the same windows of real speech. Exit status 1 unless every limit is kept.

- **Latency**: a pair is two calls of one chunk. The chunk's way to the worker and back is all that differs.
- **Throughput**: a pair is two blocks of calls without a pause, ``Plan.block_s`` each.
- **Ladder, metrics, pressure thread**: a pair is as many calls as fill ``Plan.block_s`` on either side, one by one in
  turn. One side is ``Model.run`` alone. The other is what the pipeline does around it for a batch: see whether memory
  presses, go through the ladder, check the scores, count; on a real ``DictationPipeline`` with an in-process engine and
  its own pressure thread. The spool and the features are on neither side. While the bare side is measured, the
  pipeline's threads are held at the pipeline's own lock. That is half of the time, so the thread's interval is twice
  the default: a second of the protected side then has as many readings of memory as in the product. A pair has several
  of them. Pairs of single calls would have none, more often than not, and their median would hide them.

The device is capped, for both sides alike, where its backend can do that: the runtime's own arena then serves every
call, and no side is slower because of what the C library's heap happens to look like in its process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

import backends
from backends.contract import Backend, Capability, FloatArray, MemoryReading
from backends.model import DEFAULT_MODEL, ModelSpec
from benchmarks.pairs import Floats, Limit, Row, Verdict, compare, in_turn, table
from protection.engine import Engine, InProcessEngine
from protection.features import log_mel
from protection.pipeline import DictationPipeline
from protection.policy import Policy
from protection.worker_engine import WorkerEngine
from qualification.audio import load_wav
from qualification.platform_check import refusal

AUDIO = Path(__file__).resolve().parents[1] / "tests" / "data" / "speech.wav"
LEAST_PAIRS = 100
CAP_BYTES = 256 << 20

ADDED_LATENCY_MS = Limit(1.0)
THROUGHPUT = Limit(0.95, at_most=False)
PROTECTION = Limit(1.02)
#: The limit on protection is for calls that take at least so long.
_CALL_LEAST_S = 5e-3
_MOST_CHUNKS = 128
#: The pressure thread is late when the machine is busy; below this share of its readings it was not there.
_READINGS_LEAST = 0.5

Call = Callable[[FloatArray], object]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    pairs: int = LEAST_PAIRS
    seed: int = 0
    #: Several intervals of the pressure thread.
    block_s: float = 0.3

    @property
    def warm_up_pairs(self) -> int:
        """Pairs that are measured first, and thrown away."""
        return max(1, self.pairs // 10)


class Speech:
    """Windows of the recorded speech, cut as the pipeline cuts them."""

    def __init__(self, spec: ModelSpec) -> None:
        """Make every whole window's features."""
        samples = load_wav(AUDIO)
        padded = np.concatenate([np.zeros(spec.context_samples, np.float32), samples])
        starts = range(0, len(samples) - spec.chunk_samples + 1, spec.chunk_samples)
        windows = np.stack([log_mel(padded[at : at + spec.context_samples + spec.chunk_samples]) for at in starts])
        self._count = len(windows)
        # Repeated, so that every batch is a piece of it and none is copied.
        self._windows = np.concatenate([windows] * (1 + -(-_MOST_CHUNKS // self._count)))

    def batch(self, number: int, chunks: int) -> FloatArray:
        """Give float32 [chunks, window_frames, 80]: another one for each number, as far as the recording goes."""
        first = number % self._count
        return self._windows[first : first + chunks]


def seconds_of(call: Call, features: FloatArray) -> float:
    """Time one call."""
    began_s = time.perf_counter()
    call(features)
    return time.perf_counter() - began_s


def seconds_a_call(call: Call, speech: Speech, chunks: int, calls: int, number: int = 0) -> Floats:
    """Time calls one by one, without a pause between them."""
    return np.array([seconds_of(call, speech.batch(number + i, chunks)) for i in range(calls)])


def capped(kind: type[Backend]) -> Backend:
    """Make the backend, its device capped where it can be."""
    backend = kind()
    if kind.capabilities[Capability.MEMORY_LIMIT].yes:
        backend.limit_memory(CAP_BYTES)
    return backend


def worker_against_in_process(kind: type[Backend], plan: Plan) -> Iterator[Row]:
    """Compare the engines, without the spool."""
    rng = np.random.default_rng(plan.seed)
    with contextlib.ExitStack() as stack:
        # The worker's first: where a process has one cap, the last one that is set counts, and it has to be this one's.
        worker = stack.enter_context(contextlib.closing(WorkerEngine(capped(kind), DEFAULT_MODEL, owns_backend=True)))
        near = stack.enter_context(contextlib.closing(InProcessEngine(capped(kind), DEFAULT_MODEL, owns_backend=True)))
        speech = Speech(near.spec)
        most = Policy().max_batch

        def measure(chunks: int, calls: int) -> Callable[[int], Floats]:
            def side(engine: Engine) -> Callable[[int], float]:
                return lambda pair: float(seconds_a_call(engine.infer, speech, chunks, calls, pair).mean())

            in_turn(side(near), side(worker), plan.warm_up_pairs, rng)
            return lambda pairs: in_turn(side(near), side(worker), pairs, rng)

        def calls_a_block(chunks: int) -> int:
            return calls_within(plan.block_s, near.infer, speech, chunks)

        require_same_answers(near, worker, speech.batch(0, most))
        yield compare(
            "worker engine: latency added to a chunk",
            *(measure(1, 1), added_ms, "ms", ADDED_LATENCY_MS, plan.pairs),
        )
        for chunks, limit in ((most, THROUGHPUT), (1, None)):
            yield compare(
                f"worker engine: share of the throughput, {chunks} a call",
                *(measure(chunks, calls_a_block(chunks)), throughput_kept, "", limit, plan.pairs),
            )
        require_same_answers(near, worker, speech.batch(0, most))


def require_same_answers(near: Engine, worker: Engine, features: FloatArray) -> None:
    """Raise RuntimeError unless both engines do the same work on the same device."""
    if near.degraded or worker.degraded:
        raise RuntimeError("an engine fell back: the device has no memory for the model, so nothing can be compared")
    if not DictationPipeline.equivalent(near.infer(features), worker.infer(features)):
        raise RuntimeError("the engines give different answers, so they cannot be compared")


class _CountedReadings(InProcessEngine):
    """Counts how often its memory is read: the pressure thread has to have been at work."""

    readings = 0

    def device_memory(self) -> MemoryReading:
        self.readings += 1
        return super().device_memory()


def protection_against_bare(kind: type[Backend], plan: Plan) -> Iterator[Row]:
    """Compare what the pipeline does around an inference with the inference alone."""
    rng = np.random.default_rng(plan.seed)
    default = Policy()
    policy = replace(default, pressure_interval_s=2 * default.pressure_interval_s)
    engine = _CountedReadings(capped(kind), DEFAULT_MODEL, owns_backend=True)
    with (
        tempfile.TemporaryDirectory(prefix="plimsoll-bench-") as folder,
        DictationPipeline(Path(folder), engine, policy) as pipeline,
    ):
        speech = Speech(engine.spec)
        model = engine._model
        if model is None or engine.degraded:
            raise RuntimeError("the device has no memory for the model, so nothing can be compared")
        bare = model.run

        def protected(features: FloatArray) -> None:
            """Do what the pipeline's working thread does for a batch, but for spool and features."""
            made: list[tuple[FloatArray, str, bool]] = []

            def work() -> None:
                scores = engine.infer(features)
                if not np.isfinite(scores).all():
                    raise ValueError("the model gave scores that are not finite")
                device, degraded = engine.device, engine.degraded
                made.extend((row, device, degraded) for row in scores)
                pipeline._ladder.progressed()

            pipeline._relieve()
            pipeline._consider_return()
            pipeline._ladder.run(work)
            pipeline._grow()
            pipeline._metrics.add("chunks_answered", len(features))

        def bare_s(features: FloatArray) -> float:
            # The pipeline's threads wait for this lock before they do anything.
            with pipeline._wake:
                return seconds_of(bare, features)

        def measure(chunks: int) -> Callable[[int], Floats]:
            calls = calls_within(plan.block_s, bare, speech, chunks)

            def blocks(pairs: int) -> Floats:
                sides = (
                    lambda number: bare_s(speech.batch(number, chunks)),
                    lambda number: seconds_of(protected, speech.batch(number, chunks)),
                )
                seconds = np.array([in_turn(*sides, calls, rng).mean(axis=0) for _ in range(pairs)])
                protected_s.append(float(seconds[:, 1].sum()) * calls)
                return seconds

            blocks(plan.warm_up_pairs)
            return blocks

        protected_s: list[float] = []
        least = least_chunks(bare, speech)
        for chunks in sorted({least, max(least, default.max_batch)}):
            yield compare(
                f"ladder, metrics, pressure thread: cost, {chunks} a call",
                *(measure(chunks), cost, "", PROTECTION, plan.pairs),
            )
        share = engine.readings / sum(protected_s) * default.pressure_interval_s
        if share < _READINGS_LEAST:
            raise RuntimeError(f"the pressure thread made {share:.0%} of its readings of memory: it was starved")
        if told := pipeline.events():
            raise RuntimeError(f"memory was short while it was measured, so the numbers mean nothing: {told[0]}")


def calls_within(block_s: float, call: Call, speech: Speech, chunks: int) -> int:
    """Say how many calls make up a block of so many seconds."""
    return max(1, round(block_s / float(np.median(seconds_a_call(call, speech, chunks, 10)))))


def least_chunks(call: Call, speech: Speech) -> int:
    """Find the smallest batch whose call takes the 5 ms from which on the limit holds. Raises RuntimeError."""
    for chunks in range(1, _MOST_CHUNKS + 1):
        # The fastest: a busy machine makes no call of 5 ms.
        if seconds_a_call(call, speech, chunks, 20).min() >= _CALL_LEAST_S:
            return chunks
    raise RuntimeError(f"no call of up to {_MOST_CHUNKS} chunks takes {_CALL_LEAST_S * 1e3:g} ms here")


def added_ms(seconds: Floats) -> Floats:
    """Give by how many milliseconds a call takes longer."""
    return (seconds[:, 1] - seconds[:, 0]) * 1e3


def throughput_kept(seconds: Floats) -> Floats:
    """Give the share of the throughput that is left: chunks a second, of the same number of chunks."""
    return seconds[:, 0] / seconds[:, 1]


def cost(seconds: Floats) -> Floats:
    """Give how many times as long a call takes."""
    return seconds[:, 1] / seconds[:, 0]


def machine(runtime: str) -> str:
    """Say what was measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return (
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores of {names[0] if names else platform.machine()}, "
        f"{runtime}, Python {platform.python_version()}, NumPy {np.__version__}"
    )


def others_s() -> float:
    """Give the processor seconds that went to anything but this process and its ended children, since the start."""
    all_of_it, own = psutil.cpu_times(), os.times()
    busy_s = sum(getattr(all_of_it, each) for each in ("user", "nice", "system", "irq", "softirq", "steal"))
    return float(busy_s) - sum(own[:4])


def document(rows: list[Row], about: str, when: datetime, others_cores: float, command: str) -> str:
    """Write the result as a page."""
    return f"""# What protection costs

Measured on {when:%Y-%m-%d} (UTC) on {about}.
Meanwhile other programs kept {others_cores:.2f} cores busy. Where no core is free, the worker waits for one, and the
added latency is that of the machine's scheduler.

Generated. To measure again, on a machine with nothing else to do:

```text
{command}
```

{table(rows)}
- What is compared takes turns. *Without* and *With* are the medians of both sides, for one call.
- *Median* is that of the pairs' differences or ratios. Its interval asks nothing of their distribution.
- A limit is kept (pass) or broken (fail) only if the whole interval says so. Otherwise as many pairs are added, once.
- What each side includes is said in [`benchmarks/engine_cost.py`](../benchmarks/engine_cost.py).
"""


def run(backend: str, plan: Plan, say: Callable[[str], None] = print) -> list[Row]:
    """Measure everything; say each result as it comes."""
    kind = backends.create(backend)
    rows = []
    for part in (worker_against_in_process, protection_against_bare):
        for row in part(kind, plan):
            say(table([row]).splitlines()[-1])
            rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    """Measure, print, write; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--pairs", type=int, default=LEAST_PAIRS, metavar="N", help="pairs of each (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order in each pair (default: %(default)s)"
    )
    parser.add_argument("--backend", default="cpu", metavar="NAME", help="what runs the model (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there (default: print it only)")
    given = parser.parse_args(arguments)
    if given.pairs < LEAST_PAIRS:
        parser.error(f"--pairs is {given.pairs}: expected at least {LEAST_PAIRS}")
    if given.seed < 0:
        parser.error(f"--seed is {given.seed}: expected 0 or more")
    if given.out and not given.out.parent.is_dir():
        parser.error(f"--out is {given.out}: there is no folder {given.out.parent}")
    if refused := refusal():
        parser.error(refused)
    try:
        availability = backends.create(given.backend).probe()
    except (backends.UnknownBackend, ImportError) as error:
        parser.error(str(error))
    if not availability.available:
        parser.error(f"backend {given.backend} cannot run here: {availability.reason}")

    began_s, others_before_s = time.monotonic(), others_s()
    rows = run(given.backend, Plan(given.pairs, given.seed))
    others_cores = max(0.0, others_s() - others_before_s) / (time.monotonic() - began_s)
    command = shlex.join(["nox", "-s", "bench", *(["--", *arguments] if arguments else [])])
    page = document(rows, machine(availability.runtime), datetime.now(UTC), others_cores, command)
    print(f"\n{page}")
    if given.out:
        given.out.write_text(page, encoding="utf-8")
    return 0 if all(row.verdict in (None, Verdict.PASS) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
