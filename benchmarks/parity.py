"""How far each backend's scores are from the same model in double precision: same file, same windows.

    python -m benchmarks.parity [--write]

Every backend that runs here computes the windows of the recorded speech and windows of noise, in batches of several
sizes; what a product uses of the scores, the rows of the chunk, is compared with ``backends.model.reference``. Exit
status 1 if a backend is further away than the bound, or if one row has another best token.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import backends
from backends.contract import FloatArray, Model
from backends.model import DEFAULT_MODEL, N_MELS, ModelSpec, read_onnx, reference
from benchmarks.engine_cost import AUDIO, capped, machine
from protection.features import log_mel
from qualification.audio import load_wav

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BATCHES = (1, 3, 16)
NOISE_WINDOWS = 64
#: Largest difference, as a share of the largest score. Single precision; arithmetic of 10 bits (TF32) is far above it.
BOUND = 5e-6


@dataclass(frozen=True)
class Parity:
    """What was measured of one backend, over every row of every batch size."""

    backend: str
    runtime: str
    difference: float
    same_tokens: int
    rows: int

    @property
    def kept(self) -> bool:
        """Whether it is within the bound, with the same best token in every row."""
        return self.difference <= BOUND and self.same_tokens == self.rows


def windows(spec: ModelSpec) -> FloatArray:
    """Cut the recorded speech as the pipeline cuts it, and add noise: float32 [windows, window_frames, 80]."""
    samples = np.concatenate([np.zeros(spec.context_samples, np.float32), load_wav(AUDIO)])
    size = spec.context_samples + spec.chunk_samples
    starts = range(0, len(samples) - size + 1, spec.chunk_samples)
    noise = np.random.RandomState(1).standard_normal((NOISE_WINDOWS, spec.window_frames, N_MELS))
    return np.concatenate([*(log_mel(samples[at : at + size])[None] for at in starts), noise.astype(np.float32)])


def smallest_margin(exact: NDArray[np.float64]) -> float:
    """Give the smallest lead of a row's best token over its second, as a share of the largest score."""
    ordered = np.sort(exact, axis=-1)
    return float((ordered[..., -1] - ordered[..., -2]).min() / np.abs(exact).max())


def measure(model: Model, features: FloatArray, exact: NDArray[np.float64]) -> tuple[float, int, int]:
    """Run every window in batches of each size: the largest difference, the rows with the same best token, and all."""
    difference, same, rows = 0.0, 0, 0
    for batch in BATCHES:
        found = np.concatenate([model.run(features[at : at + batch]) for at in range(0, len(features), batch)])
        difference = max(difference, float(np.abs(found - exact).max() / np.abs(exact).max()))
        same += int((found.argmax(-1) == exact.argmax(-1)).sum())
        rows += found.shape[0] * found.shape[1]
    return difference, same, rows


def table(found: list[Parity]) -> str:
    """Write what was found as a Markdown table."""
    lines = [
        "| Backend | Runtime | Largest difference | Bound | Same best token | Verdict |",
        "|---------|---------|--------------------|-------|-----------------|---------|",
    ]
    for each in found:
        cells = (
            *(f"`{each.backend}`", each.runtime, f"{each.difference:.1e}", f"{BOUND:.0e}"),
            *(f"{each.same_tokens:,} of {each.rows:,} rows", "pass" if each.kept else "fail"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Measure, print, write; give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the result into docs/parity.md")
    given = parser.parse_args(arguments)

    spec, weights = read_onnx(DEFAULT_MODEL)
    features = windows(spec)
    exact = reference(spec, weights, features)[:, -spec.chunk_scores :]
    found, absent = [], []
    for declared, availability in backends.available():
        if not availability.available:
            absent.append(f"`{declared.name}` was not measured: {availability.reason}.")
            continue
        backend = capped(backends.create(declared.name))
        model = backend.load(DEFAULT_MODEL)
        found.append(Parity(declared.name, availability.runtime, *measure(model, features, exact)))
        model.close()
        backend.close()
    text = "\n\n".join(
        [
            f"Measured on {datetime.now(UTC):%Y-%m-%d} (UTC) on {machine(f'model {DEFAULT_MODEL.name}')}.",
            table(found),
            f"{len(features)} windows, in batches of {', '.join(map(str, BATCHES))}. The closest call of their"
            f" rows: the best token leads by {smallest_margin(exact):.1e} of the largest score.",
            *absent,
        ]
    )
    print(text)
    if given.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return 0 if found and all(each.kept for each in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
