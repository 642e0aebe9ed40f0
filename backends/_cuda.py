"""All that the CUDA backends have in common, and that no other has: the card, its neighbour, its sticky faults.

The card is used in workers only: a user's process makes no context on it, and cannot be poisoned.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import backends
from backends._build import environment, promised_cuda, refusal
from backends._device import HostDevice
from backends._keeper import KeptDevice
from backends.contract import (
    YES,
    Allocation,
    Availability,
    Backend,
    BackendError,
    Capability,
    FaultPlan,
    MemoryReading,
    Provenance,
    Site,
)
from backends.faults.cuda import (
    NoDriver,
    device_assert,
    illegal_address,
    open_driver,
    require_device_faults_allowed,
    trap,
)
from backends.faults.cuda_ballast import DeviceBallast

#: What each CUDA backend can do. ``CACHE_OOM`` and ``EXACT_MEMORY_READING`` are their runtimes' matter.
CAPABILITIES = {
    Capability.MEMORY_LIMIT: YES,
    Capability.RELEASE_CACHED: YES,
    Capability.DEVICE_OOM: YES,
    Capability.HOST_OOM: YES,
    Capability.FALLBACK: YES,
    Capability.DEVICE_ERROR: YES,
    Capability.RUNTIME_CRASH: YES,
    Capability.DEVICE_MEMORY_OF_OTHERS: YES,
    Capability.ALLOCATION_FAULTS: YES,
    Capability.DEVICE_ALLOCATION_FAULTS: YES,
}
_STRIKES = {Site.DEVICE_ERROR: trap, Site.DEVICE_ASSERT: device_assert, Site.DEVICE_ADDRESS: illegal_address}
#: A neighbour is there for as long as its plan at most: this is for one whose plan was lost.
_BALLAST_LIMIT_S = 600.0


class _Neighbour(Allocation):
    """What a neighbour process holds of the card."""

    def __init__(self, ballast: DeviceBallast) -> None:
        self._ballast = ballast
        self.size_bytes = ballast.held_bytes

    def free(self) -> None:
        self._ballast.close()

    @property
    def is_there(self) -> bool:
        return self._ballast.alive


class CudaDevice(KeptDevice):
    """The part of a CUDA backend that does not depend on its runtime."""

    #: So much more than what is asked for stays free beside a neighbour: what the runtime rounds requests up to.
    granularity_bytes: ClassVar[int]

    @classmethod
    def _built(cls) -> tuple[str, tuple[int, int] | None]:
        """Name the installed runtime with its version, and give the CUDA version that it is built for.

        Raises ImportError where it is not installed.
        """
        raise NotImplementedError

    @classmethod
    def probe(cls) -> Availability:
        """Compare what is installed with what the environment promises, and with the driver; import nothing."""
        try:
            runtime, built_for = cls._built()
        except (ImportError, ValueError) as error:
            return Availability(False, f"{error}: nox -s memory-quick-cuda12 or -cuda13 installs it")
        reason = refusal(runtime, built_for, promised_cuda(environment()), lambda: open_driver().version)
        if reason is None and not open_driver().device_count():
            reason = f"{runtime} finds a driver and no device: CUDA_VISIBLE_DEVICES may hide it"
        if reason is not None:
            return Availability(False, reason)
        cuda = ".".join(map(str, built_for or ()))
        return Availability(
            True, runtime=f"{runtime}, CUDA {cuda}, driver for {'.'.join(map(str, open_driver().version))}"
        )

    def _named(self, device: str | None) -> tuple[str, int]:
        name = device or "cuda:0"
        found = re.fullmatch(r"cuda:(0|[1-9][0-9]*)", name)
        if found is None:
            raise BackendError(f"{self.name} has no device {name!r}: expected such as 'cuda:0'")
        try:
            count = open_driver().device_count()
        except NoDriver as error:
            raise BackendError(f"{self.name} has no device here: {error}") from None
        index = int(found[1])
        if index >= count:
            there = ", ".join(f"cuda:{each}" for each in range(count)) or "none: CUDA_VISIBLE_DEVICES may hide it"
            raise BackendError(f"{self.name} has no device {name!r}: expected one of {there}")
        return name, index

    def _has_the_device(self) -> None:
        super()._has_the_device()
        found = type(self).probe()
        if not found.available:
            raise BackendError(found.reason)

    def _variant(self) -> dict[str, Any]:
        return {"device": self.device}

    def _total_bytes(self) -> int:
        return open_driver().total_bytes(self._index)

    def _most_bytes(self) -> tuple[int, str]:
        return self._total_bytes(), f"what {self.device} has"

    def _card_reading(
        self,
        used_bytes: int,
        source: str,
        *,
        exact: bool,
        cached_bytes: int = 0,
        reserved_bytes: int | None = None,
        fragmented_bytes: int = 0,
    ) -> MemoryReading:
        """Give a reading from what the runtime says, and from what is free on the card.

        What others hold is not to be had: the limit is not all that binds. ``cached_bytes`` are ours and free;
        ``reserved_bytes`` is None where the runtime does not say.
        """
        free, total = open_driver().memory(self._index)
        bound = total if self._limit_bytes is None else min(self._limit_bytes, total)
        taken = bound - max(0, min(bound - used_bytes, free + cached_bytes))
        by_others = taken > used_bytes
        return MemoryReading(
            used_bytes=taken,
            reserved_bytes=taken if reserved_bytes is None else reserved_bytes,
            limit_bytes=self._limit_bytes,
            total_bytes=total,
            scope="device" if by_others else "process",
            exact=exact,
            source="the card's free memory, others' use included" if by_others else source,
            fragmented_bytes=fragmented_bytes,
        )

    def _on_the_cpu(self, name: str) -> Backend:
        """Make the backend of this name to take over; it runs where no card can be seen."""
        made = backends.create(name)
        assert issubclass(made, HostDevice)
        return made.taking_over(self._board)

    # Faults.

    def _check_arming(self, plan: FaultPlan) -> None:
        if plan.site in _STRIKES:
            require_device_faults_allowed(self._index)

    def _strike_device(self, site: Site) -> None:
        # The error that it gives is the driver's; the runtime meets its own at its next call, and that one counts.
        _STRIKES[site](self._index)

    def _fill(self, held: list[Allocation], free_bytes: int) -> list[Allocation]:
        # A neighbour that is there already goes on taking what others free.
        there: list[Allocation] = [each for each in held if isinstance(each, _Neighbour) and each.is_there]
        return there or [_Neighbour(DeviceBallast(self._index, free_bytes + self.granularity_bytes, _BALLAST_LIMIT_S))]

    def _provenance(self, site: Site) -> Provenance:
        # A neighbour has it: nothing is left. The other faults fill the runtime's own cap.
        return Provenance.EXHAUSTED if site is Site.DEVICE_MEMORY else super()._provenance(site)
