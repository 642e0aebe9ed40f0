"""Ballast on an NVIDIA device: real memory that a neighbour process holds, so that a program finds none.

    python -m backends.faults.cuda_ballast DEVICE FREE_BYTES SECONDS PARENT_PROCESS_ID

takes device memory until no more than FREE_BYTES of it are free, says ``held N free M``, and goes on taking what others
free, the program under test included: what it lets go is gone. It ends with its parent or at its time limit, and then
all is given back. DEVICE is its number as the driver counts in the neighbour's environment, which is the caller's.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from backends.faults.ballast import MIB, Neighbour
from backends.faults.cuda import DeviceMemory, Driver, DriverError, NoDriver, open_driver
from backends.process import begin_as_child

#: The driver hands out memory in blocks of 2 MiB: below 1 MiB little is left to be had.
_PIECES = (1024 * MIB, 256 * MIB, 64 * MIB, 16 * MIB, 4 * MIB, MIB)
_REFILL_S = 0.005
_OUT_OF_MEMORY = 2


def take(driver: Driver, device: int, free_bytes: int, held: list[DeviceMemory]) -> int:
    """Add pieces to ``held`` until at most ``free_bytes`` are free or no more can be had; return the bytes still free.

    Raises DriverError for anything but a device that is full.
    """
    # No more than the device has: under WSL2 the driver may go on with the host's memory.
    total_bytes = driver.total_bytes(device)
    for piece in _PIECES:
        # The smallest may take a little too much, so that never more than that is free; the others may not.
        spare = free_bytes + (piece if piece > _PIECES[-1] else 1)
        while driver.free_bytes(device) >= spare and _size_bytes(held) + piece <= total_bytes:
            try:
                held.append(driver.allocate(device, piece))
            except DriverError as error:
                if error.code != _OUT_OF_MEMORY:
                    raise
                break
    return driver.free_bytes(device)


def _size_bytes(held: list[DeviceMemory]) -> int:
    """Add up what is held."""
    return sum(piece.size_bytes for piece in held)


class DeviceBallast(Neighbour):
    """Real memory of an NVIDIA device in a neighbour process, all but ``free_bytes`` of it.

    ``held_bytes`` and ``free_bytes`` are what it held, and what was free, once it was in place. The neighbour's own
    context takes some hundred MB more. More than what was asked for may be free: what the driver does not hand out.
    """

    def __init__(self, device: int, free_bytes: int, limit_s: float) -> None:
        """Start the neighbour, for at most ``limit_s`` seconds, and wait until it holds the memory.

        Raises ValueError for a negative ``free_bytes``, and RuntimeError, with what it said, when it cannot.
        """
        if free_bytes < 0:
            raise ValueError(f"free_bytes is {free_bytes}: expected 0 or more")
        super().__init__(
            *("backends.faults.cuda_ballast", str(device), str(free_bytes), str(limit_s), str(os.getpid()))
        )
        found = re.fullmatch(r"held (\d+) free (\d+)\n", self.said)
        if found is None:
            status = self._process.wait()
            self.close()
            said = self.said.strip() or "it said nothing"
            raise RuntimeError(f"the ballast process could not hold device {device}: {said} (exit status {status})")
        self.held_bytes, self.free_bytes = int(found[1]), int(found[2])


def main(argv: list[str]) -> int:
    """Hold all but FREE_BYTES of DEVICE for at most SECONDS, and no longer than its parent lives."""
    device, free_bytes, limit_s, parent = int(argv[0]), int(argv[1]), float(argv[2]), int(argv[3])
    begin_as_child(parent)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    held: list[DeviceMemory] = []
    try:
        driver = open_driver()
        # Kept: otherwise each reading would make a context and take it down again.
        with driver.context(device):
            left = take(driver, device, free_bytes, held)
            print(f"held {_size_bytes(held)} free {left}", flush=True)
            # The parent may have ended before it could be watched.
            while os.getppid() == parent:
                time.sleep(_REFILL_S)
                take(driver, device, free_bytes, held)
    except (NoDriver, DriverError) as error:
        print(error, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
