"""Give the matrix of a GitHub Actions workflow: one job for each cell.

    nox -s ci-matrix

The cells are what ``nox --list --json -t cells`` prints: the sessions with that tag. What each needs is in the
headers of ``backends/*.py``; the two have to agree. Standard output is one line of JSON and nothing else. It needs
nothing but nox.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import backends
from qualification import doctor

ROOT = Path(__file__).resolve().parents[1]
#: The tag of the sessions that are cells.
TAG = "cells"
CPU, GPU, ALL = "cpu", "gpu", "all"
#: On which runners a cell runs, by what it needs.
LABELS = {CPU: "ubuntu-latest", GPU: "self-hosted,linux,x64,gpu"}


class BadMatrix(ValueError):
    """There is no matrix. The message says why, and what was expected."""


def labels(text: str) -> str | list[str]:
    """Read the labels of a runner, such as ``self-hosted,gpu``: one is given as it is, several as a list."""
    found = [label.strip() for label in text.split(",")]
    if not all(found) or any(character.isspace() for label in found for character in label):
        raise BadMatrix(f"{text!r} names no runner: expected labels with commas between them, such as {LABELS[GPU]}")
    return found[0] if len(found) == 1 else found


def matrix(
    listed: Any, declared: Sequence[backends.Declared], runners: Mapping[str, str | list[str]], only: str = ALL
) -> dict[str, list[dict[str, Any]]]:
    """Make the matrix of what nox lists: one job for each declared cell, in the order of the sessions."""
    if not isinstance(listed, list) or not all(isinstance(each, dict) and "session" in each for each in listed):
        raise BadMatrix(f"nox lists {str(listed)[:80]!r}: expected a list of sessions, as nox --list --json prints it")
    cells = {
        doctor.session(backend.name, needs.name): (backend, needs)
        for backend in declared
        for needs in backend.needs.values()
    }
    names = [each["session"] for each in listed if TAG in each.get("tags", ())]
    if missing := [name for name in cells if name not in names]:
        raise BadMatrix(
            f"nox lists no session {', '.join(missing)}: expected one with the tag {TAG} for each cell that a header "
            f"in backends/ declares"
        )
    if unknown := [name for name in names if name not in cells]:
        raise BadMatrix(
            f"no header in backends/ declares the cell of {', '.join(unknown)}: expected only {', '.join(cells)}"
        )
    jobs = []
    for name in names:
        backend, needs = cells[name]
        accelerator = CPU if needs.cuda is None else GPU
        if only in (ALL, accelerator):
            jobs.append(
                {
                    "backend": backend.name,
                    "environment": needs.name,
                    "session": name,
                    "accelerator": accelerator,
                    "runs-on": runners[accelerator],
                }
            )
    if not jobs:
        # GitHub refuses a matrix without a job, and says less.
        raise BadMatrix(f"--only {only} leaves no cell: expected another of {CPU}, {GPU}, {ALL}")
    return {"include": jobs}


def sessions() -> Any:
    """Read the sessions that nox lists under the tag of the cells."""
    command = [sys.executable, "-m", "nox", "--no-color", "-f", str(ROOT / "noxfile.py"), "--list", "--json"]
    # Variables such as NOXKEYWORDS and NOXPYTHON choose sessions: all cells are asked for here.
    env = {name: value for name, value in os.environ.items() if not name.startswith("NOX")}
    done = subprocess.run([*command, "-t", TAG], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BadMatrix(f"nox --list --json -t {TAG} ended with {done.returncode}: {done.stderr.strip()}")
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise BadMatrix(f"nox --list --json -t {TAG} printed no JSON: {done.stdout[:80]!r}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the matrix, hand it to the workflow where that is asked for, and give the exit status."""
    parser = argparse.ArgumentParser("nox -s ci-matrix --", description=matrix.__doc__, allow_abbrev=False)
    parser.add_argument("--only", choices=(CPU, GPU, ALL), default=ALL, help="which cells, by what they need")
    for kind, default in LABELS.items():
        parser.add_argument(
            f"--{kind}-labels", default=default, metavar="A,B", help=f"the runner of a {kind} cell (default: {default})"
        )
    parser.add_argument("--github-output", action="store_true", help="append matrix=… to the file of GITHUB_OUTPUT too")
    options = parser.parse_args(arguments)
    try:
        runners = {CPU: labels(options.cpu_labels), GPU: labels(options.gpu_labels)}
        text = json.dumps(matrix(sessions(), backends.declared(), runners, options.only), separators=(",", ":"))
        if options.github_output:
            hand_over(text)
    except BadMatrix as error:
        parser.error(str(error))
    print(text)
    return 0


def hand_over(text: str) -> None:
    """Append the matrix to the file in which GitHub reads the outputs of a step."""
    path = os.environ.get("GITHUB_OUTPUT")
    if not path:
        raise BadMatrix("--github-output needs GITHUB_OUTPUT, the file that GitHub names in each step: it is not set")
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"matrix={text}\n")
    except OSError as error:
        raise BadMatrix(f"GITHUB_OUTPUT cannot be written to: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
