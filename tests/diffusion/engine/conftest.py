"""Both ways in which a linear layer gets its LoRAs: the test models are so small that they would only see the one."""

from __future__ import annotations

import pytest

from diffusion.engine import merged


def keep_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is small enough to be merged, as in full-size models."""
    monkeypatch.setattr(merged, "ELEMENTS_MAX", 0)


@pytest.fixture(params=["merged", "factors"])
def each_kind_of_slot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "factors":
        keep_factors(monkeypatch)


@pytest.fixture
def kind_of_slot_by_mix(mix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other mix keeps the factors."""
    if mix % 2:
        keep_factors(monkeypatch)
