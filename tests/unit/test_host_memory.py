"""Readings of host memory are true, and the nearest limit is the one that counts."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import psutil

from backends.host import available_bytes, data_bytes, host_memory

MIB = 1 << 20


def test_private_writable_memory_is_seen_and_gone_when_freed() -> None:
    before = data_bytes()
    held = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    during = data_bytes()
    held.close()
    after = data_bytes()
    assert 64 * MIB <= during - before < 65 * MIB, f"64 MiB held changed it by {during - before} bytes"
    assert abs(after - before) < MIB, f"64 MiB freed left {after - before} bytes"


def test_what_is_available_is_no_more_than_the_machine_has() -> None:
    total = psutil.virtual_memory().total
    assert 0 < available_bytes() <= total, f"{available_bytes()} bytes available of {total}"


def test_the_reading_is_a_share_of_the_machine_or_of_a_nearer_limit() -> None:
    reading = host_memory()
    total = psutil.virtual_memory().total
    assert reading.total_bytes == total, f"the total is {reading.total_bytes}, expected {total}"
    assert 0 < reading.fraction < 1, f"the share in use is {reading.fraction}: {reading}"
    assert reading.exact and reading.source, f"the reading does not say how it was made: {reading}"


def test_a_process_limit_counts_as_the_total_once_it_is_the_nearest(in_child: Callable[[str], Any]) -> None:
    found = in_child("""
import json, resource
from backends.host import data_bytes, host_memory
free = host_memory().source
limit = limits.cap_host_memory(64 << 20)
soft = resource.getrlimit(resource.RLIMIT_DATA)[0]
low = host_memory()
held = bytearray(48 << 20)
high = host_memory()
print(json.dumps([free, limit, soft, low.limit_bytes, low.source, low.used_bytes, high.used_bytes, high.fraction]))
""")
    free, limit, soft, reading_limit, source, low, high, fraction = found
    assert "RLIMIT_DATA" not in free, f"without a limit the source is {free}"
    assert limit == soft == reading_limit, f"set {limit}, in force {soft}, read {reading_limit}"
    assert source == "VmData under RLIMIT_DATA", f"the source is {source}"
    assert abs(high - low - 48 * MIB) < 2 * MIB, f"48 MiB held changed the reading by {high - low}"
    assert abs(fraction - high / limit) < 1e-9, f"the share is {fraction}, {high} of {limit}"


def test_a_capped_process_really_stops_there(in_child: Callable[[str], Any]) -> None:
    refused, before, after = in_child("""
import json, resource
from backends.host import host_memory
limits.cap_host_memory(64 << 20)
refused = False
try:
    bytearray(80 << 20)
except MemoryError:
    refused = True
held = bytearray(40 << 20)
print(json.dumps([refused, len(held), host_memory().fraction]))
""")
    assert refused, "80 MiB could be had with 64 MiB of headroom"
    assert before == 40 * MIB, f"{before} bytes could be had with 64 MiB of headroom"
    assert 0 < after < 1, f"the share in use is {after}"
