"""What the unit tests of the backends and of the pipeline share: a bounded device, audio, and a child process."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import protection.template
from backends.cpu import Cpu
from backends.faults import interposer
from backends.faults.interposer import Control
from tests.unit.waiting import until

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 96 << 20


@pytest.fixture(autouse=True, scope="session")
def _is_interruptible() -> Iterator[None]:
    """Have SIGINT end children: begun in the background of a script it is ignored, by whatever is started from here."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def _templates_end() -> Iterator[None]:
    """Have the processes that workers are forked from end with the file: one that lingers ends amid other tests."""
    yield
    protection.template.end_all()
    until(lambda: all(each.name != "plimsoll-template" for each in threading.enumerate()), "the templates' threads end")


@pytest.fixture
def bounded() -> Iterator[Cpu]:
    """Give the cpu backend, its device bounded at 96 MiB."""
    device = Cpu()
    device.limit_memory(LIMIT_BYTES)
    yield device
    device.close()


@pytest.fixture
def audio() -> Callable[[float], npt.NDArray[np.float32]]:
    """Give a maker of so many seconds of noise, the same each time."""

    def make(seconds: float) -> npt.NDArray[np.float32]:
        return (np.random.RandomState(5).standard_normal(round(seconds * 16_000)) * 0.1).astype(np.float32)

    return make


@pytest.fixture
def in_child() -> Callable[[str], Any]:
    """Give a runner of a program in an expendable process: what its last line of output says, as JSON."""

    def run(program: str) -> Any:
        prelude = "from backends.faults import limits\nlimits.declare_expendable()\n"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", prelude + program],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"the child ended with {done.returncode}: {done.stderr[-2000:]}"
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def interposed(in_child: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Give a runner of a program whose requests for memory can be refused; one that hangs is ended."""
    if (refused := interposer.refusal()) is not None:
        pytest.skip(f"not run: {refused}")
    control = Control.create(tmp_path / "control")
    for name, value in control.environment(os.environ).items():
        monkeypatch.setenv(name, value)
    return in_child


def pytest_collection_finish() -> None:
    """Take what collecting imported out of every collection from here on: with torch among it, each takes 0.1 s."""
    gc.collect()
    gc.freeze()
