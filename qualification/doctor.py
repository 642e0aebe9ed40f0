"""Say what this machine can qualify, in seconds and without installing anything.

    python -m qualification.doctor

For each declared cell: whether it can run, or why not; what it downloads, and the memory, disk and time it needs; and
what to type next. Exits 0 where at least one cell can run, else 1.
"""

from __future__ import annotations

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import backends
import qualification
from qualification.platform_check import (
    MINIMUM_FREE_DISK_BYTES,
    cuda_refusal,
    disk_refusal,
    gib,
    glibc_version,
    python_refusal,
    refusal,
)

ROOT = Path(__file__).resolve().parents[1]
#: 500 MB held under load, the runtime and the tests around it, and 1 GiB that is left to the rest of the machine.
MEMORY_NEEDED_BYTES = 2 * 1024**3
#: What CUDA's libraries take on the host besides, in the few processes that load them at a time. An estimate.
CUDA_MEMORY_NEEDED_BYTES = 2 * 1024**3
MB = 10**6
#: The file in a cell's virtual environment that says what is installed there.
STAMP = "installed-pins"
#: What a user should plan for, environment already installed.
QUICK_MIN = 6
SOAK_MIN = 100


@dataclass(frozen=True)
class Cell:
    """A backend in an environment, and what stands in its way on this machine (None: it can run)."""

    backend: backends.Declared
    needs: backends.Environment
    memory_bytes: int
    disk_bytes: int
    obstacle: str | None

    @property
    def environment(self) -> str:
        """The name of its environment."""
        return self.needs.name


def session(backend: str, environment: str) -> str:
    """Name the nox session that runs this cell. Its virtual environment is the folder of that name in .nox."""
    return f"cell-{environment}-{backend}"


def cells(root: Path = ROOT) -> tuple[Cell, ...]:
    """Look at every declared cell, environment by environment."""
    declared = backends.declared(root / "backends")
    environments = sorted({environment for backend in declared for environment in backend.environments})
    return tuple(
        look(backend, environment, root)
        for environment in environments
        for backend in declared
        if environment in backend.environments
    )


def look(backend: backends.Declared, environment: str, root: Path = ROOT) -> Cell:
    """Look at one cell: what it needs, and whether this machine has that."""
    needs = backend.needs[environment]
    memory_bytes = MEMORY_NEEDED_BYTES + (CUDA_MEMORY_NEEDED_BYTES if needs.cuda else 0)
    disk_bytes = MINIMUM_FREE_DISK_BYTES
    if not (root / ".nox" / session(backend.name, environment) / STAMP).is_file():
        # A download is on the disk twice while it is installed: in pip's cache, and where pip unpacks it from.
        disk_bytes += (2 * needs.download_mb + needs.disk_mb) * MB
    pins = root / "constraints" / f"{environment}.txt"
    obstacle = (
        refusal()
        or python_refusal(backend.minimum_python)
        or (None if needs.cuda is None else cuda_refusal(needs.cuda))
        or (None if pins.is_file() else f"constraints/{pins.name} is missing: nox -s lock makes it")
        or disk_refusal(root, disk_bytes)
        or _memory_refusal(memory_bytes)
    )
    return Cell(backend, needs, memory_bytes, disk_bytes, obstacle)


def table(found: tuple[Cell, ...]) -> str:
    """Show the cells: what each needs, and why it cannot run where it cannot."""
    head = ("backend", "environment", "can run", "download", "memory", "disk", "memory-quick", "memory-soak")
    rows = [head] + [
        (
            cell.backend.name,
            cell.environment,
            "no" if cell.obstacle else "yes",
            f"{cell.needs.download_mb} MB once",
            gib(cell.memory_bytes),
            gib(cell.disk_bytes),
            f"{QUICK_MIN} min",
            f"{SOAK_MIN} min",
        )
        for cell in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"not run: {c.backend.name} in {c.environment}: {c.obstacle}" for c in found if c.obstacle]
    return "\n".join(lines)


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Read what the machine can still give without swapping, or a memory cgroup of this process where that is less."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    free_bytes = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        # A limit further up binds as well.
        groups = (group for group in (folder, *folder.parents) if group.is_relative_to(top))
        free_bytes += [_cgroup_free_bytes(group, *names) for group in groups]
    return max(0, min(free_bytes))


def main() -> int:
    """Print the report and give the exit status."""
    if reason := python_refusal():
        print(f"Plimsoll cannot run here: {reason}")
        return 1
    found = cells()
    memory = f"{gib(available_memory_bytes())} of memory free, " if platform.system() == "Linux" else ""
    print(
        f"Plimsoll {qualification.__version__} on {platform.system()} {platform.machine()}, "
        f"C library {glibc_version() or 'not GNU'}, Python {platform.python_version()}, "
        f"{memory}{gib(shutil.disk_usage(ROOT).free)} of disk free\n\n{table(found)}\n"
    )
    runnable = [cell for cell in found if cell.obstacle is None]
    if not runnable:
        print("Nothing can run here until one of the reasons above is gone.")
        return 1
    install = "" if shutil.which("nox") else "python3 -m pip install nox && "
    print(f"next: {install}nox -s memory-quick")
    return 0


def _memory_refusal(needed_bytes: int) -> str | None:
    """Say why there is too little memory, or None where there is enough."""
    free_bytes = available_memory_bytes()
    if free_bytes >= needed_bytes:
        return None
    return f"{gib(needed_bytes)} of available memory is needed; there is {gib(free_bytes)}"


def _cgroup_free_bytes(folder: Path, limit_name: str, used_name: str, cache_name: str) -> int:
    """Read what one cgroup can still give: practically unlimited where it has no limit."""
    try:
        limit_bytes = int((folder / limit_name).read_text())
        used_bytes = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup, or "max"
        return sys.maxsize
    # The page cache of files is given back before anything is killed: it is not use.
    return limit_bytes - used_bytes + int(stat.get(cache_name, 0))


if __name__ == "__main__":
    sys.exit(main())
