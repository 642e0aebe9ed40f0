"""Readings of a card: whose its memory is, when it is shared, and a reason for all that cannot be read."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qualification import gpu
from qualification.gpu import GpuReading, attribute, sharing

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
GIB = 1 << 30
CARD = "GPU-00112233-4455-6677-8899-aabbccddeeff"
#: An idle card.
IDLE = GpuReading(4 * MIB, 8 * GIB - 4 * MIB, 8 * GIB, 0, (), "580.95.05", "A card")

Users = dict[int, int | None]


@pytest.mark.parametrize(
    ("users", "own_bytes", "others"),
    [
        ({}, 0, ()),
        ({10: 100, 11: 50}, 150, ()),
        ({10: 100, 99: 7}, 100, ((99, 7),)),
        ({99: 7, 98: None}, 0, ((98, None), (99, 7))),
    ],
)
def test_a_cards_memory_is_told_apart_by_process(
    users: Users, own_bytes: int, others: tuple[tuple[int, int | None], ...]
) -> None:
    assert attribute(users, frozenset({10, 11})) == (own_bytes, others, "")


@pytest.mark.parametrize(
    ("users", "ours", "others", "says"),
    [
        ({10: None, 99: None}, frozenset({10}), ((99, None),), "no memory by process"),
        ({10: 5}, None, ((10, 5),), "process ids are the host's"),
        ({}, None, (), "process ids are the host's"),
    ],
)
def test_what_cannot_be_told_apart_is_not_guessed(
    users: Users, ours: frozenset[int] | None, others: tuple[tuple[int, int | None], ...], says: str
) -> None:
    own_bytes, found, message = attribute(users, ours)
    assert own_bytes is None and found == others and says in message, f"{own_bytes}, {found}: {message}"


def test_processes_that_are_not_known_are_not_none_at_all() -> None:
    assert attribute(None, frozenset({10})) == (None, None, "")


def test_this_process_and_its_children_are_ours() -> None:
    if not gpu._first_namespace():
        assert gpu._ours() is None
        return
    with subprocess.Popen(["sleep", "30"]) as child:
        ours = gpu._ours()
        child.kill()
    assert ours is not None and {os.getpid(), child.pid} <= ours and os.getppid() not in ours, f"ours: {ours}"


# A card that is shared.


def _with(**changed: object) -> GpuReading:
    return GpuReading(**{**vars(IDLE), **changed})


@pytest.mark.parametrize(
    "reading",
    [
        IDLE,
        _with(used_bytes=6 * GIB, own_bytes=6 * GIB),
        # A MIG instance does not say whether it drives a display; it cannot.
        _with(message="whether it drives a display cannot be read: Not Supported"),
    ],
)
def test_a_card_that_nobody_else_uses_is_not_refused(reading: GpuReading) -> None:
    assert sharing(CARD, reading) is None


@pytest.mark.parametrize(
    ("reading", "says"),
    [
        (_with(displays=True), "it drives a display"),
        (_with(others=((1, 512 * MIB),)), r"process 1\b.* holds 512 MiB"),
        (_with(others=((1, None),)), r"process 1\b.* holds an unknown amount"),
        (
            _with(others=((1, MIB), (2, MIB)), message="ids are the host's"),
            r"process 1\b.*; process 2\b.*\(ids are the",
        ),
        (_with(used_bytes=3 * GIB), "3072 MiB are held by processes that cannot be seen from here"),
        (_with(used_bytes=3 * GIB, own_bytes=None), "3072 MiB are held by processes that cannot be seen from here"),
    ],
)
def test_a_card_that_is_shared_is_refused_by_who_uses_it(reading: GpuReading, says: str) -> None:
    found = sharing(CARD, reading)
    assert found is not None and found.startswith(f"{CARD} (A card) is not ours alone: "), f"it says {found}"
    assert re.search(says, found), f"it says {found}"
    assert "CUDA_VISIBLE_DEVICES" in found and "--allow-shared-gpu" in found, f"no way out in {found}"


@pytest.mark.parametrize("reading", [GpuReading(message="no NVML here"), _with(others=None, message="no NVML here")])
def test_a_card_is_refused_where_it_is_not_known_who_uses_it(reading: GpuReading) -> None:
    found = sharing(0, reading)
    assert found is not None and "whether others use GPU 0 is not known (no NVML here)" in found, f"it says {found}"
    assert "--allow-shared-gpu" in found


def test_a_shared_card_that_is_allowed_is_not_refused() -> None:
    assert gpu.refuse_shared(CARD, allow=True) is None


# What is here.


def _unavailable() -> str | None:
    try:
        gpu._nvml()
    except gpu._Unavailable as error:
        return str(error)
    return None


def test_nothing_raises_where_there_is_nothing_to_read() -> None:
    reason = _unavailable()
    if reason is None:
        pytest.skip("not run: there is an NVIDIA driver here")
    for card in (CARD, 0):
        assert gpu.read(card) == GpuReading(message=reason)
        assert gpu.others_on(card) is None
        refused = gpu.refuse_shared(card, allow=False)
        assert refused is not None and reason in refused
    assert gpu.machine_gpus() == ([], reason)


def test_the_library_that_is_missing_is_named() -> None:
    # In a process that sees our files and the standard library only.
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qualification import gpu; print(gpu.read(0).message)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "nvidia-ml-py is not installed: pip install nvidia-ml-py\n", f"it says {done.stdout}"


def test_the_driver_that_is_missing_is_named() -> None:
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("not run: nvidia-ml-py is not installed here")
    reason = _unavailable()
    if reason is None:
        pytest.skip("not run: there is an NVIDIA driver here")
    assert reason.startswith("the NVIDIA driver's NVML cannot be used: "), f"it says {reason}"


def test_there_is_no_card_behind_a_device_without_a_driver() -> None:
    from backends.faults.cuda import NoDriver, open_driver

    try:
        open_driver()
    except NoDriver as error:
        with pytest.raises(NoDriver, match=re.escape(str(error))):
            gpu.card_of("cuda:0")
        return
    pytest.skip("not run: there is an NVIDIA driver here")


@pytest.mark.gpu
def test_a_card_is_read_by_its_number_and_by_its_uuid_alike() -> None:
    reason = _unavailable()
    if reason is not None:
        pytest.skip(f"not run: {reason}")
    from backends.faults.cuda import NoDriver, open_driver

    try:
        driver = open_driver()
    except NoDriver as error:
        pytest.skip(f"not run: {error}")
    reading = gpu.read(driver.uuid(0))
    assert reading.total_bytes is not None and reading.total_bytes >= driver.total_bytes(0), f"read {reading}"
    assert reading.name == driver.name(0) and reading.driver, f"read {reading}"
    card = gpu.card_of("cuda:0")
    assert (card.uuid, card.name, card.total_bytes) == (driver.uuid(0), driver.name(0), driver.total_bytes(0))
    assert card.driver == reading.driver and card.message == reading.message, f"the card is {card}"
    cards, reason = gpu.machine_gpus()
    assert reason == "" and reading.name in [card["name"] for card in cards], f"the machine has {cards}"
