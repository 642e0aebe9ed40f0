"""A memory cgroup of our own: for real where one can be made, the search for its place on folders of our own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.faults import cgroup
from backends.faults.cgroup import CgroupUnavailable, MemoryCgroup

MIB = 1 << 20
HOLDING = """
import sys
input()
held = bytearray(b"\\xa5") * int(sys.argv[1])
print("held", flush=True)
input()
"""


@pytest.fixture
def own() -> Iterator[MemoryCgroup]:
    """Make a cgroup; not run where there can be none."""
    try:
        made = MemoryCgroup()
    except CgroupUnavailable as reason:
        pytest.skip(f"not run: {reason}")
    with made:
        yield made


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Start a process that takes 64 MiB when it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(64 * MIB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def _go(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def _ended_process_id() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_its_processes_hold_is_counted(own: MemoryCgroup, holder: subprocess.Popen[str]) -> None:
    own.add(holder.pid)
    before = own.used_bytes()
    assert _go(holder) == "held\n"
    held = own.used_bytes() - before
    assert 63 * MIB < held < 80 * MIB, f"64 MiB were taken, {held} bytes are counted"


def test_beyond_its_limit_the_oom_killer_kills_and_counts(own: MemoryCgroup, holder: subprocess.Popen[str]) -> None:
    own.add(holder.pid)
    own.limit(32 * MIB)
    before, said = own.oom_kills(), _go(holder)
    status = holder.wait(60)
    assert (said, status) == ("", -9), f"it said {said!r} and ended with {status}"
    assert own.oom_kills() == before + 1, f"{own.oom_kills() - before} kills were counted, and one was made"


def test_a_limit_that_the_kernel_refuses_is_a_clear_error(own: MemoryCgroup, holder: subprocess.Popen[str]) -> None:
    if not (own.processes_path.parent / "memory.limit_in_bytes").exists():
        pytest.skip("not run: cgroup v2 refuses no limit, it kills")
    if len(Path("/proc/swaps").read_text().splitlines()) > 1:
        pytest.skip("not run: what is held here may be swapped out")
    own.add(holder.pid)
    assert _go(holder) == "held\n"
    with pytest.raises(RuntimeError, match=rf"the kernel does not limit \S+ to {16 * MIB} bytes"):
        own.limit(16 * MIB)
    assert holder.poll() is None, "it was killed"


def test_a_process_that_is_gone_is_not_moved(own: MemoryCgroup) -> None:
    own.add(_ended_process_id())


def test_it_waits_for_its_processes_and_is_gone_afterwards(own: MemoryCgroup, holder: subprocess.Popen[str]) -> None:
    own.add(holder.pid)
    holder.kill()
    own.remove()
    own.remove()
    assert not own.processes_path.parent.exists(), "the folder is there still"


def test_what_a_killed_run_has_left_is_swept(own: MemoryCgroup) -> None:
    parent = own.processes_path.parent.parent
    left, foreign = parent / f"plimsoll-{_ended_process_id()}-1", parent / "plimsoll-of-another"
    for folder in (left, foreign):
        folder.mkdir()
    try:
        with MemoryCgroup() as other:
            found = (left.exists(), foreign.exists(), own.processes_path.exists())
        beside = other.processes_path.parent.parent
    finally:
        for folder in (left, foreign):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()
    assert beside == parent, f"it was made in {beside}, and the one before in {parent}"
    assert found == (False, True, True), f"of the dead, a foreign and a living one there are {found}"


def test_a_number_that_is_taken_is_skipped(tmp_path: Path) -> None:
    first = cgroup._make(tmp_path)
    number = int(first.name.rsplit("-", 1)[1])
    taken = tmp_path / f"plimsoll-{os.getpid()}-{number + 1}"
    taken.mkdir()
    made = cgroup._make(tmp_path)
    assert made.parent == tmp_path and made not in (first, taken), f"{made} was made beside {first} and {taken}"


def test_only_empty_folders_of_processes_that_are_gone_are_swept(tmp_path: Path) -> None:
    dead = _ended_process_id()
    for name in (f"plimsoll-{dead}-1", f"plimsoll-{dead}-2", f"plimsoll-{os.getpid()}-1", "plimsoll-x-1", "other-1-1"):
        (tmp_path / name).mkdir()
    (tmp_path / f"plimsoll-{dead}-2" / "in-use").mkdir()
    cgroup._sweep(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    expected = sorted([f"plimsoll-{dead}-2", f"plimsoll-{os.getpid()}-1", "plimsoll-x-1", "other-1-1"])
    assert left == expected, f"left are {left}"


# Where it may be.


class Tree:
    """Folders that look like a cgroup file system."""

    def __init__(self, folder: Path) -> None:
        self.mounts, self.own_groups = folder / "cgroup", folder / "own"
        self.mounts.mkdir()

    def group(self, path: str, controllers: str, passed_on: str) -> Path:
        folder = self.mounts / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.controllers").write_text(f"{controllers}\n")
        (folder / "cgroup.subtree_control").write_text(f"{passed_on}\n")
        return folder

    def parents(self, own_groups: str) -> list[tuple[Path, int, str]]:
        self.own_groups.write_text(own_groups)
        return list(cgroup._parents(self.mounts, self.own_groups))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_version_2_goes_to_the_nearest_that_passes_the_controller_on(tree: Tree) -> None:
    root = tree.group("", "cpu memory", "cpu memory")
    slice_ = tree.group("user.slice", "cpu memory", "memory pids")
    scope = tree.group("user.slice/run.scope", "memory", "")
    found = tree.parents("0::/user.slice/run.scope\n")
    assert [each[0] for each in found] == [scope, slice_, root], f"they are {found}"
    assert [each[1] for each in found] == [2, 2, 2], f"they are {found}"
    assert [bool(each[2]) for each in found] == [True, False, False], f"they are {found}"
    assert f"echo +memory > {scope / 'cgroup.subtree_control'}" in found[0][2], f"the reason is {found[0][2]!r}"


def test_version_2_without_the_controller_has_no_place(tree: Tree) -> None:
    tree.group("", "cpu", "cpu")
    assert tree.parents("0::/\n") == []


def test_version_2_beside_version_1_and_version_1_itself(tree: Tree) -> None:
    unified = tree.group("unified/a", "memory", "memory")
    root, below = tree.mounts / "memory", tree.mounts / "memory" / "a" / "b"
    below.mkdir(parents=True)
    for folder in (root, below):
        (folder / "memory.limit_in_bytes").write_text("0")
    found = tree.parents("4:cpu,memory:/a/b\n1:cpu:/\n0::/a\n")
    # One that is not seen in here, as in a container, is passed over.
    assert found == [(below, 1, ""), (root, 1, ""), (unified, 2, "")], f"they are {found}"


def test_without_cgroups_there_is_no_place(tmp_path: Path) -> None:
    assert list(cgroup._parents(tmp_path, tmp_path / "missing")) == []


def test_the_message_says_what_is_true_and_what_helps(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.group("", "memory", "")
    found, not_passed_on = list[tuple[Path, int, str]](), tree.parents("0::/\n")
    monkeypatch.setattr(cgroup, "_parents", lambda: iter(found))
    with pytest.raises(CgroupUnavailable, match="tried none: no memory controller is mounted"):
        MemoryCgroup()
    found += not_passed_on
    with pytest.raises(CgroupUnavailable, match=r"does not pass it on \(what helps: echo \+memory"):
        MemoryCgroup()
