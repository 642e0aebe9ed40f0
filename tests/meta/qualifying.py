"""Run the qualification in a process of its own, and read what it recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qualification import records
from qualification.identity import MACHINE

ROOT = Path(__file__).resolve().parents[2]
PROTECTION = "tests/test_memory_protection.py"
RECOVERY = "tests/test_oom_recovery.py"
#: A cell has no hypothesis, and importing its plugin takes as long as all the rest of a run that is refused.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]


@dataclass(frozen=True)
class Outcome:
    """What a qualification run said, and what it wrote."""

    status: int
    output: str
    criteria: tuple[dict[str, Any], ...]

    def failed(self) -> set[str]:
        """The names of the criteria that failed, for whatever reason."""
        return {each["criterion"] for each in self.criteria if each["verdict"] == "fail"}

    def broken(self) -> set[str]:
        """The names of the criteria whose measured value breaks the promise.

        Not of those that failed for another reason: a fault that proves nothing, or a test that ended before.
        """
        failed = (each for each in self.criteria if each["verdict"] == "fail")
        return {each["criterion"] for each in failed if not each["reason"]}


def qualify(results: Path, *arguments: str, timeout_s: float = 200, machine: str = "", ended: bool = True) -> Outcome:
    """Run pytest with these arguments from the repository's root, on what calls itself ``machine``.

    Its record has to have its end, unless ``ended`` is False.
    """
    command = [*PYTEST, "--results", str(results)]
    # Another qualification may run on this machine: queue behind it.
    command += ["--lock-wait", "600", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "meta"), MACHINE: machine}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s + 600, check=False
    )
    written = sorted(results.glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    criteria = records.read(written[-1], partial=not ended).criteria if written else ()
    return Outcome(done.returncode, done.stdout + done.stderr, criteria)
