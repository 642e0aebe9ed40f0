"""ONNX Runtime's CUDA builds, for CUDA 12 and for 13, on a machine without a card: they install, import, and refuse.

``nox -t refusals`` installs each in turn, without NVIDIA's libraries, and runs this file there.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from backends import _build
from backends.contract import BackendError
from backends.faults.cuda import NoDriver, open_driver
from backends.model import BLOCK_MODEL, DEFAULT_MODEL, PROBE_MODEL
from backends.onnxruntime_cuda import OnnxruntimeCuda


def _installed() -> str | None:
    try:
        return version("onnxruntime-gpu")
    except PackageNotFoundError:
        return None


INSTALLED = _installed()
pytestmark = pytest.mark.skipif(
    INSTALLED is None, reason="not run: onnxruntime-gpu is not installed here; nox -t refusals installs it"
)

ROOT = Path(__file__).resolve().parents[2]
MODELS = pytest.mark.parametrize("model", [BLOCK_MODEL, PROBE_MODEL, DEFAULT_MODEL], ids=lambda path: path.stem)
OTHER = {12: 13, 13: 12}


@pytest.fixture
def built_for() -> tuple[int, int]:
    """Give the CUDA version that the installed build is for."""
    found = _build.onnxruntime_cuda_version()
    assert found is not None, f"onnxruntime-gpu {INSTALLED} is built without CUDA"
    return found


@pytest.fixture
def no_driver() -> str:
    """Give what is said of the driver that is missing."""
    try:
        open_driver()
    except NoDriver as error:
        return str(error)
    pytest.skip("not run: there is an NVIDIA driver here")


class Named(OnnxruntimeCuda):
    """The backend of a card that is only named: there is none."""

    def _named(self, device: str | None) -> tuple[str, int]:
        return "cuda:0", 0


def _child(program: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"the child ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


# What is installed.


def test_it_is_the_build_that_the_environment_promises(built_for: tuple[int, int]) -> None:
    promised = _build.promised_cuda(_build.environment())
    if promised is None:
        pytest.skip("not run: no environment promises anything here; nox -t refusals sets it")
    assert built_for[0] == promised, f"onnxruntime-gpu {INSTALLED} is built for CUDA {built_for}"


def test_it_imports_without_a_card_and_without_a_warning(built_for: tuple[int, int]) -> None:
    program = """
import json, onnxruntime as ort
from onnxruntime.capi import build_and_package_info as info
print(json.dumps([ort.get_available_providers(), info.cuda_version]))
"""
    providers, cuda = _child(program)
    assert OnnxruntimeCuda.provider in providers, f"it has {providers}"
    assert cuda == f"{built_for[0]}.{built_for[1]}", f"read {built_for}, it says {cuda}"


def test_the_options_that_are_set_are_options_of_this_build() -> None:
    import onnxruntime as ort

    library = Path(ort.__file__).parent / "capi/libonnxruntime_providers_cuda.so"
    device = Named()
    ((_, options),) = device._providers()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        unknown = [name for name in (*options, "gpu_mem_limit") if text.find(name.encode() + b"\0") < 0]
        assert text.find(b"an_option_that_is_none\0") < 0, "anything is found"
    assert not unknown, f"onnxruntime-gpu {INSTALLED} does not know {unknown}"
    sessions = device._options()
    assert sessions.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert sessions.use_deterministic_compute


# What is refused.


def test_another_environment_is_refused_before_the_driver_is_asked(
    built_for: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    major, other = built_for[0], OTHER[built_for[0]]
    monkeypatch.setenv(_build.ENVIRONMENT, f"cuda{other}")
    found = OnnxruntimeCuda.probe()
    assert not found.available
    assert found.reason == (
        f"onnxruntime-gpu {INSTALLED} is built for CUDA {major}.{built_for[1]}, and the environment cuda{other} "
        f"promises CUDA {other}: reinstall it with -c constraints/cuda{other}.txt "
        f"(nox --reuse-venv=never -s memory-quick-cuda{other} does)"
    )


@pytest.mark.parametrize("named", [True, False], ids=["its-environment", "no-environment"])
def test_a_machine_without_a_driver_is_refused_with_which_to_install(
    named: bool, built_for: tuple[int, int], no_driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(_build.ENVIRONMENT, raising=False)
    if named:
        monkeypatch.setenv(_build.ENVIRONMENT, f"cuda{built_for[0]}")
    found = OnnxruntimeCuda.probe()
    assert not found.available and not found.runtime
    assert found.reason == f"onnxruntime-gpu {INSTALLED} cannot run here: {no_driver}"
    assert "525 or newer for CUDA 12, 580 or newer for CUDA 13" in found.reason


def test_a_device_is_refused_where_there_is_none(no_driver: str) -> None:
    with pytest.raises(BackendError) as caught:
        OnnxruntimeCuda("cuda:0")
    assert str(caught.value) == f"onnxruntime-cuda has no device here: {no_driver}"


def test_the_process_that_is_to_have_the_card_refuses(no_driver: str) -> None:
    with pytest.raises(BackendError, match="onnxruntime-cuda has no device here: no NVIDIA driver"):
        Named().load(DEFAULT_MODEL)


@MODELS
def test_a_session_that_would_run_on_the_cpu_without_a_word_is_refused(
    model: Path, no_driver: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime as ort

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        silent = ort.InferenceSession(str(model), providers=[OnnxruntimeCuda.provider])
    # What it has to be guarded against: no error, and to Python not even a warning.
    assert (silent.get_providers(), said) == (["CPUExecutionProvider"], [])
    assert "Failed to load library" in capfd.readouterr().err, "it is for another reason than the provider's libraries"
    with pytest.raises(BackendError, match=rf"^{model.name} would run on the CPU: CUDAExecutionProvider did not load"):
        Named()._session(model)


def test_the_refusal_names_the_libraries_that_are_missing_and_what_brings_them(
    built_for: tuple[int, int], no_driver: str
) -> None:
    program = """
import json
from backends.contract import BackendError
from backends.model import BLOCK_MODEL
from backends.onnxruntime_cuda import OnnxruntimeCuda

class Named(OnnxruntimeCuda):
    def _named(self, device):
        return "cuda:0", 0

device = Named()
device._load_libraries()
try:
    device._session(BLOCK_MODEL)
except BackendError as error:
    print(json.dumps([device._missing, str(error)]))
"""
    missing, refusal = _child(program)
    if not missing:
        pytest.skip("not run: NVIDIA's libraries are installed here")
    assert f"libcublasLt.so.{built_for[0]}" in missing, f"the runtime says {missing!r}"
    assert f"libcublasLt.so.{built_for[0]}" in refusal, f"it is refused with {refusal!r}"
    assert refusal.endswith("CUDA and cuDNN come with pip install 'onnxruntime-gpu[cuda,cudnn]'")


# What goes on without a card.


def test_the_fallback_runs_and_its_working_set_is_measured() -> None:
    program = """
import json
import numpy as np
from backends.model import DEFAULT_MODEL, reference, read_onnx
from backends.onnxruntime_cuda import OnnxruntimeCuda

class Named(OnnxruntimeCuda):
    def _named(self, device):
        return "cuda:0", 0

features = np.random.RandomState(3).standard_normal((2, 150, 80)).astype(np.float32)
fallback = Named().fallback()
model = fallback.load(DEFAULT_MODEL)
scores = model.run(features)
exact = reference(*read_onnx(DEFAULT_MODEL), features)[:, -scores.shape[1]:]
sizes = [model.working_set_bytes(batch) for batch in (1, 16)]
print(json.dumps([fallback.device, float(np.max(np.abs(scores - exact))), sizes]))
"""
    device, worst, (one, sixteen) = _child(program, CUDA_VISIBLE_DEVICES="")
    assert device == "cpu" and worst < 1e-3, f"{device} differs by {worst}"
    # The second convolution takes 32 images of a window, and gives 32 of half the width and height.
    assert one >= 32 * 150 * 80 * 4 * 5 // 4, f"a window is said to need {one} bytes"
    assert 15 * one <= sixteen <= 17 * one, f"a window {one} bytes, sixteen {sixteen}"
