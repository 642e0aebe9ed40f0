"""How a child process begins: with its parent there, and without a core dump in it."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qualification.host import Job

ROOT = Path(__file__).resolve().parents[2]
ABORTING = """
import os, resource, sys
sys.path.insert(0, {root!r})
from backends.process import suppress_core_dumps
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
{suppress}
print(*resource.getrlimit(resource.RLIMIT_CORE), flush=True)
os.abort()
"""


@pytest.mark.parametrize("module", ["qualification.host", "backends.faults.ballast"])
def test_a_child_whose_parent_ended_before_it_began_ends_at_once(module: str) -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    job = json.dumps(dataclasses.asdict(Job("none", "none", "none", "none", "none", 0)))
    words = [job] if module == "qualification.host" else ["1000", "30"]
    command = [sys.executable, "-m", module, *words, str(parent.pid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, ""), f"it said {done.stdout!r} and ended with {done.returncode}"


def _aborted(folder: Path, suppress: str) -> tuple[str, list[Path]]:
    """Have a child abort in a folder; give its limits, and what it left."""
    folder.mkdir()
    program = ABORTING.format(root=str(ROOT), suppress=suppress)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGABRT, f"it ended with {done.returncode}: {done.stderr[-1000:]}"
    return done.stdout.strip(), list(folder.iterdir())


def test_a_process_that_aborts_leaves_no_core_file(tmp_path: Path) -> None:
    _, without = _aborted(tmp_path / "without", "")
    for each in without:
        each.unlink()
    limits, left = _aborted(tmp_path / "with", "suppress_core_dumps()")
    assert not left, f"it left {left}, with the limits {limits}"
    if not without:
        pytest.skip("not run: no process leaves a core file in its working directory here")
    assert limits == "1 1", f"the limits are {limits}, and they could be 1"


@pytest.mark.parametrize("hard", [0, 1])
def test_a_limit_that_is_lower_or_the_same_stays_or_is_one(hard: int) -> None:
    program = (
        "import resource\nfrom backends.process import suppress_core_dumps\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
        "suppress_core_dumps()\nprint(*resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    soft, found = (int(word) for word in done.stdout.split())
    # Root may raise it to what keeps a pipe from having the dump.
    assert soft == found and found in (hard, 1), f"of {hard} it made {soft} {found}"
