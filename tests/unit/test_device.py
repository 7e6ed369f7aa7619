"""model.device: what is asked for is what streams and graphs are made on, or it is refused."""

from __future__ import annotations

import pytest
import torch

from operando import parallel
from operando.errors import UserError
from operando.models.load import pick_device


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two CUDA devices; the list holds which was made the current one."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_a_numbered_device_becomes_the_current_one(two_cards: list[int]) -> None:
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert two_cards[-1] == 1


def test_without_a_number_the_current_device_stays(two_cards: list[int]) -> None:
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert two_cards == [0]


def test_a_device_that_is_not_there_is_refused(two_cards: list[int]) -> None:
    with pytest.raises(UserError, match='"cuda:2", but there are 2 CUDA devices'):
        pick_device("cuda:2")


def test_many_processes_on_one_numbered_device_are_refused(
    two_cards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    with pytest.raises(UserError, match="puts every process on one device"):
        pick_device("cuda:1")


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_kinds_of_device_are_refused_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(UserError, match='expected "auto", "cpu", "cuda" or "cuda:1"'):
        pick_device(device)
