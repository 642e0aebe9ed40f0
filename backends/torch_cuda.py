# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy>=2", "nvidia-ml-py>=13", "psutil>=7.2"]
#
# [tool.plimsoll]
# backend = "torch-cuda"
# tags = ["cuda", "torch"]
#
# [tool.plimsoll.environments.cuda12]
# cuda = 12
# dependencies = ["torch>=2.9,<2.11"]
# reason = "torch 2.9 and 2.10 are built for CUDA 12.8, from 2.11 on for CUDA 13"
# download-mb = 4150
# disk-mb = 7500
#
# [tool.plimsoll.environments.cuda13]
# cuda = 13
# dependencies = ["torch>=2.11,<2.14"]
# reason = """\
#     from 2.11 on torch is built for CUDA 13, before for CUDA 12; newer than 2.13 was not tried, and there only the \
#     CPU build"""
# download-mb = 3020
# disk-mb = 5800
# ///
"""Torch on an NVIDIA card: its caching allocator under a fraction of the card, the fallback torch on the CPU."""

from __future__ import annotations

from importlib.metadata import version
from typing import ClassVar

from backends._build import torch_cuda_version
from backends._cuda import CAPABILITIES, CudaDevice
from backends._torch import TorchBackend, quiet_torch
from backends.contract import YES, Allocation, Backend, Capability, MemoryReading, no


class TorchCuda(CudaDevice, TorchBackend):
    """A card's memory as the device: torch's caching allocator, capped by a fraction of what the card has."""

    name = "torch-cuda"
    #: Requests of 1 to 10 MiB are served from segments of 20 MiB (c10/cuda/CUDACachingAllocator.h, kLargeBuffer).
    granularity_bytes: ClassVar[int] = 24 << 20
    capabilities = {
        **CAPABILITIES,
        Capability.EXACT_MEMORY_READING: YES,
        Capability.CACHE_OOM: no(
            "torch gives its cached blocks back and asks again before it raises: its cache is never in the way",
            "https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management",
        ),
    }

    @classmethod
    def _built(cls) -> tuple[str, tuple[int, int] | None]:
        cuda = torch_cuda_version()
        return f"torch {version('torch')}", cuda

    def torch_device(self) -> str:
        """Say what torch calls this device."""
        return self.device

    def fallback(self) -> Backend:
        """Give torch on the CPU, uncapped: it sees no card, and shares the plans that are armed."""
        return self._on_the_cpu("torch-cpu")

    def _has_the_device(self) -> None:
        super()._has_the_device()
        quiet_torch()
        import torch

        torch.cuda.set_device(self._index)
        # The first product and the first convolution load libraries and take their workspaces: before any cap.
        x = torch.ones(1, 1, 64, 64, device=self.device)
        torch.nn.functional.conv2d(x, torch.ones(1, 1, 3, 3, device=self.device)) @ x[..., :62, :62]
        torch.cuda.synchronize(self._index)
        del x
        torch.cuda.empty_cache()

    def _apply_limit(self, limit_bytes: int | None) -> None:
        import torch

        total = torch.cuda.get_device_properties(self._index).total_memory
        torch.cuda.set_per_process_memory_fraction(_fraction(limit_bytes, total), self._index)

    def _in_use_bytes(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated(self._index))

    def _memory_here(self) -> MemoryReading:
        import torch

        stats = torch.cuda.memory_stats(self._index)
        # Nothing is in the statistics before the first allocation.
        names = ("allocated_bytes", "reserved_bytes", "inactive_split_bytes")
        allocated, reserved, fragmented = (stats.get(f"{name}.all.current", 0) for name in names)
        return self._card_reading(
            self._used_bytes(),
            "torch.cuda.memory_stats, and what a run like the last one needs",
            exact=not self._wanted_bytes(),
            cached_bytes=max(0, reserved - allocated),
            reserved_bytes=reserved,
            fragmented_bytes=fragmented,
        )

    def _allocate_here(self, size_bytes: int) -> Allocation:
        import torch

        block = super()._allocate_here(size_bytes)
        torch.cuda.synchronize(self._index)
        return block

    def _release_here(self) -> int:
        import torch

        before = torch.cuda.memory_reserved(self._index)
        torch.cuda.empty_cache()
        return max(0, before - torch.cuda.memory_reserved(self._index))


def _fraction(limit_bytes: int | None, total_bytes: int) -> float:
    """Give the share of a card that is a limit to the byte: half a byte more, since torch rounds it down."""
    return 1.0 if limit_bytes is None else min(1.0, (limit_bytes + 0.5) / total_bytes)


BACKEND = TorchCuda
