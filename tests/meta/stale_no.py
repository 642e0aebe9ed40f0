"""A pytest plugin that makes the cpu backend deny what it can do: a stale "no"."""

from __future__ import annotations

from backends.contract import Capability, no
from backends.cpu import Cpu

Cpu.capabilities = {**Cpu.capabilities, Capability.DEVICE_OOM: no("said once, and never looked at again", "none")}
