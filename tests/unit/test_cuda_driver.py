"""The NVIDIA driver: declared as cuda.h has it, refused where it is missing, and no fault where none is allowed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import pytest

from backends.contract import BackendError
from backends.errors import ErrorKind, classify
from backends.faults import cuda
from backends.faults.cuda import DriverError, NoDriver, open_driver
from backends.faults.cuda_ballast import DeviceBallast
from qualification import gpu

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
#: How a type of cuda.h is written here. A pointer to one of these is a POINTER to what it is.
C_TYPES: dict[str, Any] = {
    "int": c_int,
    "unsigned int": c_uint,
    "unsigned char": c_ubyte,
    "size_t": c_size_t,
    "CUdevice": c_int,
    "CUresult": c_int,
    "CUdeviceptr": c_uint64,
    "CUcontext": c_void_p,
    "CUmodule": c_void_p,
    "CUfunction": c_void_p,
    "CUstream": c_void_p,
    "CUuuid": c_ubyte * 16,
    "char *": c_char_p,
    "void *": c_void_p,
}


def _driver_missing() -> str | None:
    try:
        open_driver()
    except NoDriver as error:
        return str(error)
    return None


MISSING = _driver_missing()
without_driver = pytest.mark.skipif(MISSING is None, reason="not run: there is an NVIDIA driver here")


@pytest.fixture
def driver() -> cuda.Driver:
    if MISSING is not None:
        pytest.skip(f"not run: {MISSING}")
    return open_driver()


# The declarations.


def _ctype(text: str) -> Any:
    """Give the ctypes type of a C type."""
    text = re.sub(r"\bconst\b", "", text)
    text = re.sub(r"\s*\*", " *", text).strip()
    text = re.sub(r"_v[12]\b", "", text)
    if text in C_TYPES:
        return C_TYPES[text]
    assert text.endswith(" *"), f"an unknown type: {text!r}"
    return POINTER(_ctype(text[:-2]))


def test_every_function_is_declared_as_in_cuda_h() -> None:
    header, compiler = CUDA_HOME / "include/cuda.h", shutil.which("cc")
    if not header.is_file() or compiler is None:
        pytest.skip(f"not run: {header} or a C compiler is missing")
    command = [compiler, "-E", "-P", "-x", "c", str(header)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, declared in cuda._PARAMETERS.items():
        found = re.search(rf"CUresult\s+{name}\(([^)]*)\)", text)
        assert found is not None, f"cuda.h has no {name}"
        parameters = [each.strip() for each in found[1].split(",") if each.strip() != "void"]
        expected = [_ctype(re.sub(r"\w+$", "", each)) for each in parameters]
        if name == "cuModuleLoadData":
            expected[1] = c_char_p  # the image is PTX: text that ends with a zero byte
        assert list(declared) == expected, f"{name}({found[1]}) is declared as {declared}"


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", cuda.KERNELS)
def test_every_kernel_assembles(kernel: str, target: str, tmp_path: Path) -> None:
    ptxas = shutil.which("ptxas") or shutil.which("ptxas", path=str(CUDA_HOME / "bin"))
    if ptxas is None:
        pytest.skip("not run: there is no ptxas here (it comes with the CUDA toolkit)")
    if target not in subprocess.run([ptxas, "--help"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"not run: this ptxas does not know {target}")
    source = tmp_path / "kernel.ptx"
    source.write_text(cuda.KERNELS[kernel], encoding="ascii")
    # -c: what is declared extern is linked by the driver.
    command = [ptxas, "-arch", target, "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{kernel} for {target}: {done.stdout}{done.stderr}"
    assert f".entry {kernel}()" in cuda.KERNELS[kernel], "it is found by another name"


def test_the_driver_is_asked_before_anything_is_installed() -> None:
    program = "import sys; from backends.faults import cuda; print(sorted({'numpy', 'psutil'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", f"it imports {done.stdout}"


# What it says.


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (2, ErrorKind.DEVICE_OOM),
        (100, ErrorKind.DEVICE_LOST),
        (999, ErrorKind.DEVICE_STICKY),
        (700, ErrorKind.DEVICE_STICKY),
        (710, ErrorKind.DEVICE_STICKY),
        (719, ErrorKind.DEVICE_STICKY),
    ],
)
def test_an_error_is_classified_by_its_code(code: int, kind: ErrorKind) -> None:
    error = DriverError(code, f"CUDA driver error: something (code {code}, CUDA_ERROR_SOMETHING)")
    assert classify(error) is kind, f"code {code} is {classify(error)}"
    assert error.code == code


@without_driver
def test_a_missing_driver_is_named_with_what_to_do() -> None:
    with pytest.raises(
        NoDriver, match=r"NVIDIA driver.*(525 or newer for CUDA 12|refuses: CUDA driver error: .*code \d+)"
    ):
        open_driver()


@pytest.mark.parametrize(
    ("code", "visible", "expected"),
    [(100, "", True), (100, "7", True), (100, None, False), (803, "", False)],
)
def test_devices_that_are_hidden_are_named(
    monkeypatch: pytest.MonkeyPatch, code: int, visible: str | None, expected: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    hint = cuda._visibility_hint(code)
    assert (f"CUDA_VISIBLE_DEVICES is {visible!r}" in hint) is expected, f"the hint is {hint!r}"


# The guard.


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have no MPS daemon's pipe anywhere, and device faults allowed."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    monkeypatch.setenv(cuda.ALLOW_DEVICE_FAULTS, "1")
    if cuda._mps() is not None:
        pytest.skip(f"not run: MPS is in use here: {cuda._mps()}")
    return tmp_path


@pytest.mark.parametrize("strike", [cuda.trap, cuda.device_assert, cuda.illegal_address])
def test_a_process_that_is_not_expendable_is_never_poisoned(guarded: Path, strike: Callable[[int], object]) -> None:
    with pytest.raises(BackendError, match="only in a process started for it"):
        strike(0)


@pytest.mark.parametrize("allow", [None, "", "0", "yes"])
def test_device_faults_are_refused_unless_allowed(
    guarded: Path, monkeypatch: pytest.MonkeyPatch, allow: str | None
) -> None:
    cuda.require_device_faults_allowed(0)
    monkeypatch.delenv(cuda.ALLOW_DEVICE_FAULTS)
    if allow is not None:
        monkeypatch.setenv(cuda.ALLOW_DEVICE_FAULTS, allow)
    with pytest.raises(BackendError, match=r"device 0 .*Xid.*--allow-device-faults"):
        cuda.require_device_faults_allowed(0)


def test_device_faults_are_refused_where_an_mps_daemon_has_its_pipe(guarded: Path) -> None:
    (guarded / "mps").mkdir()
    cuda.require_device_faults_allowed(0)
    os.mkfifo(guarded / "mps/control")
    with pytest.raises(BackendError, match=r"refused under MPS \(.*/mps/control is there\).*nvidia-cuda-mps-control"):
        cuda.require_device_faults_allowed(0)


@pytest.mark.parametrize("name", ["nvidia-cuda-mps-control", "nvidia-cuda-mps-server"])
def test_device_faults_are_refused_while_a_process_of_mps_runs(guarded: Path, name: str) -> None:
    program = guarded / name
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, program)
    with subprocess.Popen([program, "30"]) as process:
        try:
            # Its name is set a moment after its program has taken over.
            deadline_s = time.monotonic() + 60.0
            while Path(f"/proc/{process.pid}/comm").read_text().strip() != name[:15]:
                assert time.monotonic() < deadline_s, "it has another name"
            with pytest.raises(BackendError, match=f"process {process.pid} is its daemon or server"):
                cuda.require_device_faults_allowed(0)
        finally:
            process.kill()
    cuda.require_device_faults_allowed(0)


@without_driver
def test_an_expendable_process_without_a_driver_says_so(guarded: Path, in_child: Callable[[str], Any]) -> None:
    program = """
import json
from backends.faults import cuda
try:
    cuda.trap(0)
except cuda.NoDriver as error:
    print(json.dumps(str(error)))
"""
    assert "NVIDIA driver" in in_child(program)


# The ballast.


@without_driver
def test_ballast_without_a_driver_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"could not hold device 0: .*NVIDIA driver.* \(exit status 1\)"):
        DeviceBallast(0, 0, 10.0)


def test_ballast_refuses_a_negative_rest() -> None:
    with pytest.raises(ValueError, match="free_bytes is -1: expected 0 or more"):
        DeviceBallast(0, -1, 10.0)


def test_ballast_whose_parent_ended_before_it_began_ends_at_once() -> None:
    parent = subprocess.Popen(["true"])
    parent.wait()
    command = [sys.executable, "-m", "backends.faults.cuda_ballast", "0", "0", "30", str(parent.pid)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, ""), f"it said {done.stdout!r} and ended with {done.returncode}"


# With a GPU.


@pytest.mark.gpu
def test_the_driver_describes_its_devices(driver: cuda.Driver) -> None:
    assert driver.version >= (12, 0), f"the driver supports CUDA {driver.version}"
    for device in range(driver.device_count()):
        free, total = driver.memory(device)
        found = driver.uuid(device)
        assert re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found), f"the uuid is {found!r}"
        assert driver.name(device), "it has no name"
        assert 0 < free <= total <= driver.total_bytes(device), f"{free} of {total} bytes are free"


@pytest.mark.gpu
def test_device_memory_is_taken_and_given_back(driver: cuda.Driver) -> None:
    with driver.context(0):
        before = driver.free_bytes(0)
        memory = driver.allocate(0, 64 * MIB)
        during = driver.free_bytes(0)
        memory.free()
        memory.free()
        after = driver.free_bytes(0)
    assert during <= before - 64 * MIB and after >= during + 64 * MIB, f"free: {before}, {during}, {after} bytes"


@pytest.mark.gpu
def test_more_than_there_is_is_out_of_memory_and_the_context_goes_on(driver: cuda.Driver) -> None:
    with pytest.raises(DriverError, match=r"^CUDA driver error: .*\(code 2, CUDA_ERROR_OUT_OF_MEMORY\)$") as caught:
        driver.allocate(0, 2 * driver.total_bytes(0))
    assert classify(caught.value) is ErrorKind.DEVICE_OOM
    driver.allocate(0, MIB).free()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", cuda.KERNELS)
def test_a_device_fault_poisons_its_process_and_no_other(
    driver: cuda.Driver, kernel: str, in_child: Callable[[str], Any]
) -> None:
    try:
        cuda.require_device_faults_allowed(0)
    except BackendError as error:
        pytest.skip(f"not run: {error}")
    program = f"""
import json
from backends.errors import classify
from backends.faults import cuda
first = cuda.{kernel}(0)
try:
    cuda.open_driver().allocate(0, 1 << 20)
    later = None
except cuda.DriverError as error:
    later = error
print(json.dumps([str(first), classify(first).value, later and later.code, first.code]))
"""
    text, kind, later, first = in_child(program)
    assert kind == "device_sticky" and later == first, f"{text}, and later code {later}"
    driver.allocate(0, MIB).free()


@pytest.mark.gpu
def test_ballast_leaves_only_what_was_asked_for(driver: cuda.Driver) -> None:
    if refused := gpu.refuse_shared(driver.uuid(0), allow=False):
        pytest.skip(f"not run: {refused}")
    with driver.context(0):
        before = driver.free_bytes(0)
        rest = 256 * MIB
        with DeviceBallast(0, rest, 60.0) as ballast:
            during = driver.free_bytes(0)
            assert ballast.free_bytes <= rest and during <= rest, f"{ballast.free_bytes} and {during} bytes are free"
            assert ballast.held_bytes > 0
        assert driver.free_bytes(0) >= before - rest, "the memory did not come back"
