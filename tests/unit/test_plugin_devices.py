"""Which device a run is about: chosen by name, locked, not shared, and told in the records."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from backends.cpu import Cpu
from backends.faults.cuda import ALLOW_DEVICE_FAULTS, NoDriver, open_driver
from backends.model import DEFAULT_MODEL
from backends.torch_cpu import TorchCpu
from backends.torch_cuda import TorchCuda
from qualification import records, run
from qualification.gpu import Card
from qualification.run import DEFAULT_AUDIO, Refused, Run, prepare
from qualification.subject import DEFAULT_SUBJECT


def _prepared(backend: str | None = "cpu", device: str | None = None, subject: str = DEFAULT_SUBJECT) -> Run:
    return prepare(backend=backend, device=device, subject=subject, model=DEFAULT_MODEL, audio=DEFAULT_AUDIO)


def _card() -> Card:
    """Describe a card that no machine has: its lock is nobody else's."""
    return Card(f"GPU-{uuid4()}", "A card", 8_000_000_000, "580.95.05", "13.0", "")


def _require_no_driver() -> None:
    try:
        open_driver()
    except NoDriver:
        return
    pytest.skip("not run: there is an NVIDIA driver here")


# The name.


def test_a_backend_is_made_on_the_device_that_was_named() -> None:
    prepared = _prepared(device="cpu:arena")
    assert prepared.device == "cpu:arena" and prepared.new_backend().device == "cpu:arena"


def test_without_a_name_it_is_the_backends_own() -> None:
    assert _prepared().device == Cpu().device
    assert _prepared().card is None


@pytest.mark.parametrize("backend", ["cpu", "torch-cpu"])
def test_a_device_that_the_backend_does_not_have_is_refused(backend: str) -> None:
    with pytest.raises(Refused, match=rf"--device cuda:1: {backend} has no device 'cuda:1': expected '{backend}:"):
        _prepared(backend, "cuda:1")


def test_what_is_wrong_with_a_card_is_a_refusal() -> None:
    _require_no_driver()
    with pytest.raises(Refused, match="--device cuda:1: torch-cuda has no device here: no NVIDIA driver"):
        run._choose_device(TorchCuda, "cuda:1", is_card=True)


# The lock.


def test_two_backends_on_one_card_exclude_each_other() -> None:
    card = _card()
    first = replace(_prepared(), card=card, allow_shared_gpu=True)
    second = replace(first, backend=TorchCpu, device="torch-cpu:process")
    other = replace(first, card=_card())
    first.take_device(0)
    try:
        with pytest.raises(Refused, match=rf"process {os.getpid()}\) runs on {card.uuid} of this machine"):
            second.take_device(0)
        other.take_device(0)
        other.release_lock()
    finally:
        first.release_lock()
        assert first.lock is None
    for each in (first, other):
        Path(f"/tmp/plimsoll-{each.card.uuid if each.card else ''}.lock").unlink()


def test_a_card_of_which_it_is_not_known_who_uses_it_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    card = _card()
    # A model that does not load would be refused for that, and after it.
    held = replace(_prepared(), card=card, model=tmp_path / "missing.onnx")
    try:
        with pytest.raises(Refused, match=f"whether others use {card.uuid} is not known .* --allow-shared-gpu"):
            held.take_device(0)
        held.release_lock()
        with pytest.raises(Refused, match=r"--model .*missing\.onnx"):
            replace(held, allow_shared_gpu=True).take_device(0)
    finally:
        Path(f"/tmp/plimsoll-{card.uuid}.lock").unlink()


# The environment.


def test_what_is_installed_decides_where_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLIMSOLL_ENVIRONMENT", raising=False)
    if TorchCuda.probe().available:
        found = run._environment_of(TorchCuda)
        assert found.cuda is not None and f"CUDA {found.cuda}." in TorchCuda.probe().runtime
    else:
        with pytest.raises(Refused, match=r"none of torch-cuda's environments: cuda12: .*; cuda13: "):
            run._environment_of(TorchCuda)
    assert "PLIMSOLL_ENVIRONMENT" not in os.environ


def test_what_is_promised_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIMSOLL_ENVIRONMENT", "cuda13")
    assert run._environment_of(TorchCuda).name == "cuda13"
    with pytest.raises(Refused, match="PLIMSOLL_ENVIRONMENT is 'cuda13': backend cpu is declared for cpu"):
        run._environment_of(Cpu)


# The records.


def test_the_first_line_tells_the_device_and_what_was_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_DEVICE_FAULTS, "1")
    card = _card()
    qualified = replace(_prepared(), device="cuda:1", card=card)
    path = qualified.begin_records(tmp_path)
    qualified.end_records()
    line = records.read(path).run
    assert line["device"] == {"name": "cuda:1", "card": vars(card)}
    assert line["allowed"] == {"shared_gpu": False, "device_faults": True}
    assert isinstance(line["machine"]["gpus"], list)
    assert bool(line["machine"]["gpus"]) != bool(line["machine"]["gpus_unread"])
    assert line["versions"]["numpy"] and line["versions"]["psutil"]
    assert f"  device cuda:1: A card, 8.0 GB, driver 580.95.05 for CUDA 13.0, {card.uuid}" in qualified.header()


def test_runs_on_two_cards_are_not_parts_of_one() -> None:
    first = replace(_prepared(), card=_card())
    assert replace(first, card=_card()).resume_key() != first.resume_key() == replace(first).resume_key()
