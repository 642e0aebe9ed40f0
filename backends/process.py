"""How a child process begins: it ends with its parent, and is the first to go when memory runs out. Linux only.

Imports nothing but the standard library: a child does this before anything that takes time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
#: A process with these finds no accelerator: a fallback cannot touch the failed device.
NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Elsewhere than on Linux: nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def volunteer_to_oom_killer(score: int = 1000) -> None:
    """Make this process the OOM killer's first choice, or with a lower score one of the next."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def name_thread(name: str) -> None:
    """Have the kernel know the calling thread by this name (15 characters of it), as Python does only from 3.14 on."""
    # A thread without memory for its name does its work.
    with contextlib.suppress(OSError, AttributeError, MemoryError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


def suppress_core_dumps() -> None:
    """Leave no core dump: it would have the user's audio in it."""
    # Not 0: where core_pattern is a pipe (apport, systemd-coredump) the kernel dumps whatever the limit is, but for a
    # limit of exactly 1, which it takes for a crash of the dump's own reader (core(5)). And no core file is that small.
    # Refused where the hard limit is 0 already: that one stays.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))


def begin_as_child(parent: int, *, oom_score: int = 1000) -> None:
    """Do all three; end at once when the parent ended before it could be watched."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(0)
    if oom_score:
        volunteer_to_oom_killer(oom_score)
    suppress_core_dumps()


def python_arguments(module: str, *arguments: object) -> list[str]:
    """Give the arguments after the interpreter that run ``main`` of a module of ours with this process's import path.

    ``sys.argv[2:]`` there are the arguments, as text.
    """
    program = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; sys.exit(main())"
    root = str(Path(__file__).resolve().parents[1])
    path = [root, *(entry for entry in sys.path if entry != root)]
    return ["-P", "-c", program, json.dumps(path), *map(str, arguments)]
