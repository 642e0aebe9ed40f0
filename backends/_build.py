"""Whether the installed runtime is the one that the environment promises, and whether the driver can run it.

The names of ``torch`` and ``onnxruntime-gpu`` say nothing about the CUDA version that they are built for: only the pin
chooses it. So it is read from what is installed, without importing the runtime, which takes seconds and the device.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from backends.faults.cuda import NoDriver

#: The matrix sets it to the environment's name; without it nothing is promised.
ENVIRONMENT = "PLIMSOLL_ENVIRONMENT"
#: The oldest driver for all programs of a CUDA major version. What is built for a later minor version runs on it too:
#: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
_OLDEST_DRIVER = {12: 525, 13: 580}


def environment() -> str | None:
    """Give the name of the environment that this process runs in, or None outside the matrix."""
    return os.environ.get(ENVIRONMENT) or None


def promised_cuda(environment: str | None) -> int | None:
    """Give the CUDA major version that an environment's name promises: 12 for "cuda12", None for "cpu" and None."""
    found = re.fullmatch(r"cuda(\d+)", environment or "")
    return None if found is None else int(found[1])


def torch_cuda_version() -> tuple[int, int] | None:
    """Read which CUDA version the installed torch is built for; None for a build without CUDA.

    Raises ImportError where it is not installed, and ValueError for a version that cannot be read.
    """
    return _cuda_version(_file("torch/version.py", "torch"), "cuda")


def onnxruntime_cuda_version() -> tuple[int, int] | None:
    """Read which CUDA version the installed ONNX Runtime is built for; None for a build without CUDA.

    Raises ImportError where none is installed, and ValueError for a version that cannot be read.
    """
    # Both packages have the same files: where both are installed, the file is that of the last.
    return _cuda_version(
        _file("onnxruntime/capi/build_and_package_info.py", "onnxruntime-gpu", "onnxruntime"), "cuda_version"
    )


def refusal(
    runtime: str, built_for: tuple[int, int] | None, promised: int | None, driver: Callable[[], tuple[int, int]]
) -> str | None:
    """Say why an installed runtime cannot run on an NVIDIA device here, or None where it can.

    ``runtime`` is its name and version. ``driver`` gives the newest CUDA version that the driver supports, or raises
    NoDriver (``open_driver().version``); it is asked only when the build is the right one.
    """
    if built_for is None:
        return f"{runtime} is built without CUDA, and {_needed(promised)}: {_reinstall(promised)}"
    if promised is not None and built_for[0] != promised:
        return f"{runtime} is built for CUDA {_dotted(built_for)}, and {_needed(promised)}: {_reinstall(promised)}"
    try:
        newest = driver()
    except NoDriver as error:
        return f"{runtime} cannot run here: {error}"
    if newest[0] >= built_for[0]:
        return None
    oldest = _OLDEST_DRIVER.get(built_for[0])
    update = "update the driver" if oldest is None else f"update the driver to {oldest} or newer"
    other = f", or take the environment cuda{newest[0]}" if newest[0] in _OLDEST_DRIVER else ""
    return (
        f"the NVIDIA driver runs programs up to CUDA {_dotted(newest)}, and {runtime} needs CUDA {built_for[0]}: "
        f"{update}{other}"
    )


def _needed(promised: int | None) -> str:
    """Say what was expected."""
    return "CUDA is needed" if promised is None else f"the environment cuda{promised} promises CUDA {promised}"


def _reinstall(promised: int | None) -> str:
    """Say how to get the right build."""
    if promised is None:
        choices = " or ".join(f"constraints/cuda{major}.txt" for major in _OLDEST_DRIVER)
        return f"reinstall it with -c {choices}"
    name = f"cuda{promised}"
    return f"reinstall it with -c constraints/{name}.txt (nox --reuse-venv=never -s memory-quick-{name} does)"


def _dotted(version: tuple[int, int]) -> str:
    """Write a version."""
    return ".".join(map(str, version))


def _file(path: str, *packages: str) -> Path:
    """Find a file of the first of these packages that is installed. Raises ImportError where none is."""
    for package in packages:
        try:
            return Path(str(distribution(package).locate_file(path)))
        except PackageNotFoundError:
            continue
    raise ImportError(f"{packages[0]} is not installed")


def _cuda_version(path: Path, variable: str) -> tuple[int, int] | None:
    """Read a version that a Python file assigns to a variable; None where it assigns none."""
    try:
        text = _assigned(path.read_text(encoding="utf-8"), variable)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if text is None:
        return None
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise ValueError(f"{path}: {variable} is {text!r}: expected such as '12.8'")
    return int(found[1]), int(found[2])


def _assigned(source: str, variable: str) -> str | None:
    """Find the string that a Python source assigns to a variable at its top."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        named = any(isinstance(target, ast.Name) and target.id == variable for target in targets)
        if named and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return node.value.value
    return None
