"""What is installed is what the environment promises, and what the driver can run; else it is said why not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from backends import _build
from backends.faults.cuda import NoDriver

ROOT = Path(__file__).resolve().parents[2]
Install = Callable[[str, str, str], None]
READERS = {"torch": _build.torch_cuda_version, "onnxruntime": _build.onnxruntime_cuda_version}
FILES = {"torch": "torch/version.py", "onnxruntime": "onnxruntime/capi/build_and_package_info.py"}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give a maker of an installed distribution, of which there are no others: its name, one file and its text."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def make(name: str, file: str, text: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-9.9.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n", encoding="utf-8")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")

    return make


def _driver(*found: int) -> Callable[[], tuple[int, int]]:
    return lambda: (found[0], found[1])


def _no_driver() -> tuple[int, int]:
    raise NoDriver("no NVIDIA driver: libcuda.so.1 is not there")


def _unasked() -> tuple[int, int]:
    raise AssertionError("the driver was asked about a build that is wrong anyway")


# What is promised.


@pytest.mark.parametrize(
    ("environment", "promised"),
    [("cuda12", 12), ("cuda13", 13), ("cpu", None), (None, None), ("", None), ("cuda", None), ("mycuda12", None)],
)
def test_an_environment_promises_what_its_name_says(environment: str | None, promised: int | None) -> None:
    assert _build.promised_cuda(environment) == promised


def test_the_environment_is_what_the_matrix_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_ENVIRONMENT", "cuda12")
    assert _build.environment() == "cuda12"
    monkeypatch.delenv("PLIMSOLL_ENVIRONMENT")
    assert _build.environment() is None


# What is installed.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n", (13, 0)),
        ("__version__ = '2.9.1+cu128'\ndebug = False\ncuda = '12.8'\n", (12, 8)),
        ("from typing import Optional\ncuda: Optional[str] = None\n", None),
        ("__version__ = '1'\n", None),
    ],
)
def test_torch_is_built_for_what_its_version_file_says(
    install: Install, text: str, expected: tuple[int, int] | None
) -> None:
    install("torch", FILES["torch"], text)
    assert _build.torch_cuda_version() == expected


@pytest.mark.parametrize(
    ("package", "text", "expected"),
    [
        ("onnxruntime-gpu", "package_name = 'onnxruntime-gpu'\n__version__ = '1'\ncuda_version = '12.8'\n", (12, 8)),
        ("onnxruntime-gpu", "package_name = 'onnxruntime-gpu'\n__version__ = '1'\ncuda_version = '13.0'\n", (13, 0)),
        ("onnxruntime", "package_name = 'onnxruntime'\n__version__ = '1'\n", None),
        # The CPU package was installed over the other one.
        ("onnxruntime-gpu", "package_name = 'onnxruntime'\n__version__ = '1'\n", None),
    ],
)
def test_onnxruntime_is_built_for_what_its_package_says(
    install: Install, package: str, text: str, expected: tuple[int, int] | None
) -> None:
    install(package, FILES["onnxruntime"], text)
    assert _build.onnxruntime_cuda_version() == expected


@pytest.mark.parametrize("runtime", READERS)
@pytest.mark.parametrize("text", ["cuda = cuda_version = 'twelve'\n", "cuda = cuda_version = '\n"])
def test_a_version_that_cannot_be_read_names_its_file(install: Install, runtime: str, text: str) -> None:
    install(runtime if runtime == "torch" else "onnxruntime-gpu", FILES[runtime], text)
    with pytest.raises(ValueError, match=rf"{FILES[runtime]}(: .*'twelve': expected such as '12.8'| cannot be read: )"):
        READERS[runtime]()


@pytest.mark.parametrize("runtime", READERS)
def test_a_runtime_that_is_missing_is_an_import_error(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match="is not installed"):
        READERS[runtime]()


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ("torch", "import torch; print(torch.version.cuda)"),
        ("onnxruntime", "import onnxruntime.capi.build_and_package_info as i; print(getattr(i, 'cuda_version', None))"),
    ],
)
def test_what_is_read_is_what_the_installed_runtime_says(runtime: str, says: str) -> None:
    try:
        found = READERS[runtime]()
    except ImportError as error:
        pytest.skip(f"not run: {error}")
    said = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, check=True).stdout.strip()
    assert ("None" if found is None else f"{found[0]}.{found[1]}") == said, f"read {found}, it says {said}"


def test_reading_imports_no_runtime() -> None:
    program = """
import contextlib, sys
from backends import _build
for read in (_build.torch_cuda_version, _build.onnxruntime_cuda_version):
    with contextlib.suppress(ImportError):
        read()
print(sorted({"torch", "onnxruntime", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", f"it imports {done.stdout}"


# What is refused.


@pytest.mark.parametrize(
    ("built_for", "promised", "newest"),
    [
        # Later minor versions of the same major run on an older driver of it.
        ((12, 8), 12, (12, 0)),
        ((12, 8), 12, (12, 9)),
        ((12, 8), 12, (13, 0)),
        ((13, 0), 13, (13, 0)),
        ((13, 1), 13, (13, 0)),
        ((13, 0), None, (13, 0)),
        ((12, 8), None, (13, 0)),
    ],
)
def test_what_fits_is_not_refused(built_for: tuple[int, int], promised: int | None, newest: tuple[int, int]) -> None:
    assert _build.refusal("torch 2.13.0", built_for, promised, _driver(*newest)) is None


@pytest.mark.parametrize(
    ("built_for", "promised", "driver", "expected"),
    [
        (
            *((13, 0), 12, _unasked),
            "onnxruntime-gpu 1.27.0 is built for CUDA 13.0, and the environment cuda12 promises CUDA 12: reinstall it "
            "with -c constraints/cuda12.txt (nox --reuse-venv=never -s memory-quick-cuda12 does)",
        ),
        (
            *((12, 8), 13, _unasked),
            "onnxruntime-gpu 1.27.0 is built for CUDA 12.8, and the environment cuda13 promises CUDA 13: reinstall it "
            "with -c constraints/cuda13.txt (nox --reuse-venv=never -s memory-quick-cuda13 does)",
        ),
        (
            *(None, 13, _unasked),
            "onnxruntime-gpu 1.27.0 is built without CUDA, and the environment cuda13 promises CUDA 13: reinstall it "
            "with -c constraints/cuda13.txt (nox --reuse-venv=never -s memory-quick-cuda13 does)",
        ),
        (
            *(None, None, _unasked),
            "onnxruntime-gpu 1.27.0 is built without CUDA, and CUDA is needed: reinstall it with "
            "-c constraints/cuda12.txt or constraints/cuda13.txt",
        ),
        (
            *((13, 0), 13, _no_driver),
            "onnxruntime-gpu 1.27.0 cannot run here: no NVIDIA driver: libcuda.so.1 is not there",
        ),
        (
            *((13, 0), 13, _driver(12, 4)),
            "the NVIDIA driver runs programs up to CUDA 12.4, and onnxruntime-gpu 1.27.0 needs CUDA 13: update the "
            "driver to 580 or newer, or take the environment cuda12",
        ),
        (
            *((12, 8), None, _driver(11, 8)),
            "the NVIDIA driver runs programs up to CUDA 11.8, and onnxruntime-gpu 1.27.0 needs CUDA 12: update the "
            "driver to 525 or newer",
        ),
    ],
)
def test_a_refusal_says_what_was_found_what_was_needed_and_what_to_do(
    built_for: tuple[int, int] | None, promised: int | None, driver: Callable[[], tuple[int, int]], expected: str
) -> None:
    assert _build.refusal("onnxruntime-gpu 1.27.0", built_for, promised, driver) == expected


def test_the_onnxruntime_installed_here_is_refused_where_cuda_is_promised() -> None:
    try:
        runtime = f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        pytest.skip("not run: the CPU build of ONNX Runtime is not installed here")
    found = _build.refusal(runtime, _build.onnxruntime_cuda_version(), 12, _unasked)
    assert found is not None and found.startswith(f"{runtime} is built without CUDA, and the environment cuda12"), found
