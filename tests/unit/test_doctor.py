"""The doctor: what can run here, why the rest cannot, and nothing installed to find out."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backends
from qualification import doctor, platform_check

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3
CPU = next(declared for declared in backends.declared() if declared.name == "cpu")
CUDA = [cell for cell in doctor.cells() if cell.needs.cuda]


def checkout(folder: Path) -> Path:
    """Copy what the doctor looks at."""
    (folder / "backends").mkdir()
    for path in (ROOT / "backends").glob("*.py"):
        shutil.copy(path, folder / "backends")
    shutil.copytree(ROOT / "constraints", folder / "constraints")
    return folder


def proc(folder: Path, available_kib: int, cgroup: str) -> Path:
    """Write the files of /proc that are read."""
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_kib} kB\n")
    (folder / "self/cgroup").write_text(cgroup)
    return folder


def test_it_runs_in_seconds_without_any_installed_package() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from qualification import doctor; status = doctor.main(); "
        "sys.exit(0 if status in (0, 1) else 2)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code, ROOT], capture_output=True, text=True, timeout=100, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of the processor's time: that of the clock depends on who else is at work.
    took_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took_s < 10.0, f"it took {took_s:.1f} s"
    for cell in doctor.cells():
        assert cell.backend.name in done.stdout
        assert f"{cell.needs.download_mb} MB once" in done.stdout


def test_it_says_what_to_run_next_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    if all(cell.obstacle for cell in doctor.cells()):
        pytest.skip("no cell can run on this machine")
    assert doctor.main() == 0
    assert "nox -s memory-quick" in capsys.readouterr().out


def test_it_exits_1_with_the_reason_where_nothing_can_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(checkout(tmp_path) / "constraints")
    found = doctor.cells(tmp_path)
    monkeypatch.setattr(doctor, "cells", lambda: found)
    assert doctor.main() == 1
    assert "not run: cpu in cpu: constraints/cpu.txt is missing: nox -s lock makes it" in capsys.readouterr().out


def test_a_backend_for_a_later_python_is_not_run_with_the_reason() -> None:
    assert "Python 9.9 or newer is needed" in (platform_check.python_refusal((9, 9)) or "")


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    assert platform_check.disk_refusal(tmp_path, minimum_bytes=0) is None
    refusal = platform_check.disk_refusal(tmp_path, minimum_bytes=2**60)
    assert refusal is not None
    assert "of free disk is needed" in refusal


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert f"this is {system} {machine}" in (platform_check.refusal() or "")
    assert doctor.look(CPU, "cpu").obstacle == platform_check.refusal()


def test_another_c_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.confstr", unknown)
    assert "GNU C library" in (platform_check.refusal() or "")


@pytest.mark.parametrize(("version", "refused"), [("2.4", True), ("2.27", True), ("2.28", False), ("3.0", False)])
def test_an_older_c_library_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    monkeypatch.setattr("os.confstr", lambda _: f"glibc {version}")
    text = platform_check.refusal()
    assert (text is not None) == refused, f"glibc {version}: {text}"
    assert text is None or ("glibc 2.28 or newer is needed" in text and version in text)


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_memory_bytes", lambda: GIB)
    assert doctor.look(CPU, "cpu").obstacle == "2 GiB of available memory is needed; there is 1 GiB"


def test_the_declared_cells_are_these() -> None:
    assert [(cell.environment, cell.backend.name) for cell in doctor.cells()] == [
        ("cpu", "cpu"),
        ("cpu", "torch-cpu"),
        ("cuda12", "onnxruntime-cuda"),
        ("cuda12", "torch-cuda"),
        ("cuda13", "onnxruntime-cuda"),
        ("cuda13", "torch-cuda"),
    ]


def test_a_driver_that_is_not_there_is_no_driver() -> None:
    assert platform_check.nvidia_driver("libno-such-driver.so.1") == (
        "no NVIDIA driver: libno-such-driver.so.1 cannot be loaded"
    )


@pytest.mark.parametrize("cell", CUDA, ids=[f"{cell.environment}-{cell.backend.name}" for cell in CUDA])
def test_a_cuda_cell_needs_a_driver_for_its_cuda(cell: doctor.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = cell.needs.cuda
    assert cell.environment == f"cuda{cuda}"

    def obstacle_with(driver: tuple[int, int] | str) -> str:
        monkeypatch.setattr(platform_check, "nvidia_driver", lambda: driver)
        return doctor.look(cell.backend, cell.environment).obstacle or ""

    assert cuda is not None
    assert obstacle_with("no NVIDIA driver: it is not there") == "no NVIDIA driver: it is not there"
    assert obstacle_with((cuda - 1, 9)).startswith(f"CUDA {cuda} needs driver 5")
    assert "CUDA" not in obstacle_with((cuda, 0))
    assert "CUDA" not in obstacle_with((cuda + 1, 2))


def test_a_cell_that_is_installed_needs_no_disk_for_that(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    before = {cell.backend.name: cell.disk_bytes for cell in doctor.cells(root) if cell.environment == "cuda12"}
    assert before["torch-cuda"] > 10 * GIB
    stamp = root / ".nox" / doctor.session("torch-cuda", "cuda12") / doctor.STAMP
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    after = {cell.backend.name: cell.disk_bytes for cell in doctor.cells(root) if cell.environment == "cuda12"}
    assert after == {**before, "torch-cuda": platform_check.MINIMUM_FREE_DISK_BYTES}


def test_available_memory_is_the_machines_without_a_limit(tmp_path: Path) -> None:
    root = proc(tmp_path / "proc", 4 * 1024**2, "0::/\n")
    assert doctor.available_memory_bytes(root, tmp_path / "cgroup") == 4 * GIB


@pytest.mark.parametrize(
    ("line", "where", "limit", "used", "cache"),
    [
        ("0::/user/run\n", "user/run", "memory.max", "memory.current", "inactive_file"),
        ("0::/user/run\n", "user", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu:/\n7:memory:/x\n", "memory/x", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v2-above", "v1"],
)
def test_available_memory_is_the_cgroups_where_that_is_less(
    tmp_path: Path, line: str, where: str, limit: str, used: str, cache: str
) -> None:
    root = proc(tmp_path / "proc", 4 * 1024**2, line)
    group = tmp_path / "cgroup" / where
    group.mkdir(parents=True)
    (group / limit).write_text(f"{3 * GIB}\n")
    (group / used).write_text(f"{2 * GIB}\n")
    (group / "memory.stat").write_text(f"{cache} {GIB // 2}\nother 1\n")
    assert doctor.available_memory_bytes(root, tmp_path / "cgroup") == GIB + GIB // 2


@pytest.mark.parametrize(("size_bytes", "text"), [(2 * GIB, "2 GiB"), (2 * GIB - 1, "1.9 GiB"), (0, "0 GiB")])
def test_sizes_are_rounded_down(size_bytes: int, text: str) -> None:
    assert platform_check.gib(size_bytes) == text
