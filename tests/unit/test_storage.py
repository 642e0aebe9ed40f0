"""Disks that fail: seen by one process alone, gone with it, and never the machine's own."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qualification.host import EXIT_UNAVAILABLE, Hosted, Job
from qualification.storage import Disk, DiskOutside, StorageUnavailable, limit_file_size, make_image

ROOT = Path(__file__).resolve().parents[2]
SIZE_BYTES = 1 << 20
MOUNTED = """
import sys
from pathlib import Path
from qualification.storage import Disk, StorageUnavailable
try:
    Disk(sys.argv[1], int(sys.argv[2])).mount()
except StorageUnavailable as error:
    print(error, flush=True)
    sys.exit()
(Path(sys.argv[1]) / "spool").mkdir()
(Path(sys.argv[1]) / "spool" / "a").write_text("kept")
print("mounted", flush=True)
input()
from qualification.storage import _mount
_mount("none", sys.argv[1], "", 0x21, "")
print("read-only", flush=True)
input()
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process with a disk of its own at ``disk``; not run where that is not allowed."""
    command = [sys.executable, "-c", MOUNTED, str(tmp_path / "disk"), str(SIZE_BYTES)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = child.stdout.readline().strip()
    if said != "mounted":
        child.communicate()
        pytest.skip(said)
    yield child
    child.kill()
    child.communicate()


def test_a_disk_is_full_to_the_last_byte_and_has_room_again(process: subprocess.Popen[str], tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "disk"), SIZE_BYTES)
    inside = Path(f"/proc/{process.pid}/root{disk.folder}")
    with DiskOutside(disk, process.pid) as outside:
        filled_bytes = outside.fill()
        with pytest.raises(OSError, match="No space left"):
            (inside / "more").write_text("x")
        outside.make_room()
        (inside / "more").write_text("x")
    assert SIZE_BYTES - 16_384 < filled_bytes <= SIZE_BYTES, f"{filled_bytes} of {SIZE_BYTES} bytes were filled"


def test_whether_a_disk_is_read_only_is_tried(process: subprocess.Popen[str], tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "disk"), SIZE_BYTES)
    assert process.stdin is not None and process.stdout is not None
    with DiskOutside(disk, process.pid) as outside:
        before = outside.is_read_only()
        left = [path.name for path in Path(f"/proc/{process.pid}/root{disk.folder}").iterdir()]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "read-only\n"
        after = outside.is_read_only()
    assert (before, after) == (False, True), f"before and after a remount it says {before} and {after}"
    assert left == ["spool"], f"the attempt left {left}"


def test_a_disk_is_seen_by_its_process_alone_and_gone_with_it(process: subprocess.Popen[str], tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "disk"), SIZE_BYTES)
    seen = [path.name for path in Path(disk.folder).iterdir()]
    with DiskOutside(disk, process.pid) as outside:
        process.kill()
        process.communicate()
        # What it left can still be read, until this is closed.
        outside.copy("spool", tmp_path / "kept")
    assert (tmp_path / "kept" / "a").read_text() == "kept"
    assert not seen, f"other processes see {seen}"
    assert disk.folder not in Path("/proc/mounts").read_text(), f"{disk.folder} is mounted for all"


def test_the_disk_of_the_machine_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with pytest.raises(RuntimeError, match=r"nothing is mounted at .*the machine's own disk is never touched"):
        DiskOutside(Disk(str(tmp_path / "disk"), SIZE_BYTES), os.getpid())


def test_a_host_without_its_disk_says_so_and_runs_nothing(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "disk"), SIZE_BYTES, str(tmp_path / "none.img"))
    host = Hosted(Job("none", "none", "none", "none", "none", 0, disk=dataclasses.asdict(disk)), tmp_path)
    try:
        with pytest.raises(StorageUnavailable, match="no disk can be mounted for one process here"):
            host.wait_for("ready", 30)
        status = host.end(30)
    finally:
        host.close()
    assert status == EXIT_UNAVAILABLE, f"the host ended with {status}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may mount it")
def test_an_image_needs_root(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="only root may mount"):
        make_image(tmp_path / "a.img", SIZE_BYTES)


def test_a_limit_on_file_sizes_reaches_a_running_process_and_is_taken_back() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        before = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
        told = limit_file_size([child.pid], 1000)
        during = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
        limit_file_size([child.pid], None)
        after = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    finally:
        child.communicate(b"\n")
    gone = limit_file_size([child.pid], 1000)
    assert (told, gone) == ([1000], []), f"it tells of {told}, and of {gone} once it is gone"
    assert during == (1000, before[1]), f"the limit was {during}"
    assert after == (before[1], before[1]), f"the limit is {after}, and was {before}"
