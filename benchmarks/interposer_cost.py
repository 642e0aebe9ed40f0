"""What the interposer costs while nothing is armed: each allocation, and inference.

    python -m benchmarks.interposer_cost [--pairs N]

What is preloaded cannot be taken out again, so the sides are processes, with and without; they take turns, either first
in half of the pairs. Exit status 1 if inference certainly takes longer than the limit: if the whole interval is above.

- **Allocations**: a pair is two fresh processes of a small C program, each with ``ALLOCATIONS`` times malloc and free.
- **Inference**: a pair is two blocks of calls of one chunk, ``Plan.block_s`` each. Processes are slow to start, so a
  couple of them serves for ``PAIRS_A_COUPLE`` pairs; then another takes its place, since where a process happens to
  have its code and its data makes a difference of its own. A backend whose runtime has a process of its own has it
  under the interposer too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import backends
from backends.faults import interposer
from backends.faults.interposer import Control, InterposerUnavailable
from backends.model import DEFAULT_MODEL, read_onnx
from benchmarks.engine_cost import LEAST_PAIRS, Plan, Speech, capped, cost, machine, others_s, seconds_a_call
from benchmarks.pairs import Floats, Limit, Row, Verdict, compare, in_turn, table
from qualification.platform_check import refusal

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cpu", "torch-cpu")
INFERENCE = Limit(1.01)
SIZES_BYTES = (64, 4096)
ALLOCATIONS = 1_000_000
PAIRS_A_COUPLE = 10
_CALIBRATION_CALLS = 10

ALLOCATES = r"""
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(void) {
    size_t bytes, count;
    while (scanf("%zu %zu", &bytes, &count) == 2) {
        struct timespec began, ended;
        clock_gettime(CLOCK_MONOTONIC, &began);
        for (size_t i = 0; i < count; i++) {
            /* Volatile, so that the compiler leaves it in. */
            void *volatile given = malloc(bytes);
            free(given);
        }
        clock_gettime(CLOCK_MONOTONIC, &ended);
        printf("%.9f\n", ended.tv_sec - began.tv_sec + (ended.tv_nsec - began.tv_nsec) * 1e-9);
        fflush(stdout);
    }
    return 0;
}
"""


class Side:
    """A process that measures when it is told to, and answers in seconds."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str], under: Control | None) -> None:
        """Start it. ``under`` is the interposer's file that it has to have mapped."""
        self._of = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._under = under

    def seconds(self, order: str) -> float:
        """Have it measure. Raises RuntimeError when it ends instead, or is not where it has to be."""
        assert self._of.stdin and self._of.stdout
        with contextlib.suppress(BrokenPipeError):
            self._of.stdin.write(f"{order}\n")
            self._of.stdin.flush()
        answer = self._of.stdout.readline()
        if not answer:
            raise RuntimeError(f"a measuring process ended with status {self._of.wait()}")
        if self._under is not None and self._of.pid not in self._under.processes():
            raise RuntimeError("a measuring process did not come under the interposer, so nothing can be compared")
        return float(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._of.communicate()


@contextlib.contextmanager
def sides(command: Sequence[str | Path], executable: Path) -> Iterator[tuple[Callable[[], Side], Callable[[], Side]]]:
    """Give two ways to start the command: without the interposer, and with it."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-bench-") as folder:
        control = Control.create(Path(folder) / "control", executable)
        without = dict(os.environ)
        with_it = control.environment(without)
        yield lambda: Side(command, without, None), lambda: Side(command, with_it, control)


def allocations(plan: Plan) -> Iterator[Row]:
    """Compare malloc and free."""
    rng = np.random.default_rng(plan.seed)
    with tempfile.TemporaryDirectory(prefix="plimsoll-bench-") as folder:
        program = Path(folder) / "allocates"
        command = [interposer._compiler(), "-O2", "-x", "c", "-", "-o", str(program)]
        subprocess.run(command, input=ALLOCATES, text=True, check=True)
        with sides([program], program) as (without, with_it):

            def measure(size_bytes: int) -> Callable[[int], Floats]:
                def one(start: Callable[[], Side]) -> Callable[[int], float]:
                    def measured(_: int) -> float:
                        with start() as side:
                            side.seconds(f"{size_bytes} {ALLOCATIONS // 10}")
                            return side.seconds(f"{size_bytes} {ALLOCATIONS}")

                    return measured

                return lambda pairs: in_turn(one(without), one(with_it), pairs, rng)

            for size_bytes in SIZES_BYTES:
                yield compare(
                    f"malloc and free of {size_bytes} bytes, {ALLOCATIONS:,} times: added to each",
                    *(measure(size_bytes), added_ns, "ns", None, plan.pairs),
                )


def added_ns(seconds: Floats) -> Floats:
    """Give by how many nanoseconds an allocation takes longer."""
    return (seconds[:, 1] - seconds[:, 0]) * 1e9 / ALLOCATIONS


def inference(backend: str, plan: Plan) -> Row:
    """Compare calls of one chunk."""
    rng = np.random.default_rng(plan.seed)
    command = [sys.executable, "-c", f"from benchmarks.interposer_cost import serve\nserve({backend!r})"]
    with sides(command, Path(sys.executable)) as (without, with_it):

        def couple(pairs: int) -> Floats:
            with without() as near, with_it() as under:
                # Both are warm the second time.
                for side in (under, near) * 2:
                    a_call_s = side.seconds(str(_CALIBRATION_CALLS))
                calls = max(1, round(plan.block_s / a_call_s))

                def one(side: Side) -> Callable[[int], float]:
                    return lambda _: side.seconds(str(calls))

                return in_turn(one(near), one(under), pairs, rng)

        def measure(pairs: int) -> Floats:
            sizes = [min(PAIRS_A_COUPLE, pairs - done) for done in range(0, pairs, PAIRS_A_COUPLE)]
            return np.concatenate([couple(size) for size in sizes])

        return compare(f"{backend}: cost of a call of one chunk", measure, cost, "", INFERENCE, plan.pairs)


def serve(backend: str) -> None:
    """Be a side: for each number on standard input, answer how many seconds each of so many calls took."""
    speech = Speech(read_onnx(DEFAULT_MODEL)[0])
    with (
        contextlib.closing(capped(backends.create(backend))) as device,
        contextlib.closing(device.load(DEFAULT_MODEL)) as model,
    ):
        for line in sys.stdin:
            print(float(seconds_a_call(model.run, speech, 1, int(line)).mean()), flush=True)


def run(names: Sequence[str], plan: Plan, say: Callable[[str], None] = print) -> list[Row]:
    """Measure allocations, and these backends; say each result as it comes."""
    rows = []

    def measured() -> Iterator[Row]:
        yield from allocations(plan)
        yield from (inference(name, plan) for name in names)

    for row in measured():
        say(table([row]).splitlines()[-1])
        rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    """Measure, print; give the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interposer_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--pairs", type=int, default=LEAST_PAIRS, metavar="N", help="pairs of each (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if given.pairs < LEAST_PAIRS:
        parser.error(f"--pairs is {given.pairs}: expected at least {LEAST_PAIRS}")
    if refused := refusal():
        parser.error(refused)
    runtimes = {}
    for name in BACKENDS:
        try:
            availability = backends.create(name).probe()
        except ImportError as error:
            print(f"not run: {name}: {error}")
            continue
        if availability.available:
            runtimes[name] = availability.runtime
        else:
            print(f"not run: {name}: {availability.reason}")
    began_s, others_before_s = time.monotonic(), others_s()
    try:
        rows = run(list(runtimes), Plan(given.pairs))
    except InterposerUnavailable as error:
        parser.error(str(error))
    others_cores = max(0.0, others_s() - others_before_s) / (time.monotonic() - began_s)
    print(f"\n{machine(', '.join(runtimes.values()))}. Other programs kept {others_cores:.2f} cores busy.\n")
    print(table(rows))
    return 1 if any(row.verdict is Verdict.FAIL for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
