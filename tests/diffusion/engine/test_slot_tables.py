"""What the slots' tables hold and take, also after memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.engine import Engine, LoraRef, lora_slots
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.slot_table import Combo, SlotTable
from diffusion.errors import OutOfGpuMemory
from diffusion.families import StableDiffusion1
from tests.diffusion.engine.lora_pictures import TOLERANCE, difference, pixels, with_loras


@pytest.fixture
def combo(family: StableDiffusion1, write_lora: Callable[..., Path]) -> Iterator[Callable[[int], Combo]]:
    """One adapter of this rank."""
    engine = Engine(family)

    def of(rank: int) -> Combo:
        lease = engine.adapters.borrow(write_lora(f"r{rank}", rank=rank))
        return ((lease.adapter(), 1.0),)

    yield of
    engine.close()


@contextmanager
def memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Once an adapter's values are in a slot."""
    copy = SlotTable._copy

    def full(*args: Any) -> None:
        copy(*args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(SlotTable, "_copy", full)
        yield


def test_a_slot_that_was_filled_half_way_is_filled_anew(
    family: StableDiffusion1, write_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, each_kind_of_slot: None
) -> None:
    small, large = (with_loras(LoraRef(write_lora(f"r{rank}", rank=rank, seed=rank))) for rank in (4, 8))
    engine = Engine(family)
    pixels(engine, large)
    expected = pixels(engine, small)[0]
    with memory_runs_out(monkeypatch), pytest.raises(OutOfGpuMemory):
        pixels(engine, large)
    assert difference(pixels(engine, small)[0], expected) < TOLERANCE


def test_rows_that_only_a_failed_filling_wrote_are_zero_again(
    combo: Callable[[int], Combo], family: StableDiffusion1, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, small, large = LoraSlots(family), combo(4), combo(8)
    slots.arrange("unet", [large], table="t")
    slots.arrange("unet", [small], table="t")
    with memory_runs_out(monkeypatch), pytest.raises(torch.OutOfMemoryError):
        slots.arrange("unet", [large], table="t")
    slots.arrange("unet", [small], table="t")
    table = slots._components["unet"]._pairs._tables["t"]
    for factors in table.factors(next(iter(table.layout.names)), 1):
        assert factors[:, :4].any()
        assert not factors[:, 4:].any()


def test_a_large_rank_costs_only_its_own_calls(combo: Callable[[int], Combo], family: StableDiffusion1) -> None:
    slots, small, large = LoraSlots(family), combo(2), combo(16)
    slots.arrange("unet", [small] * 4, table="t")
    alone_bytes = slots.size_bytes
    slots.arrange("unet", [large], table="t")
    slots.arrange("unet", [small] * 4, table="other")
    slots.arrange("unet", [small] * 4, table="t")
    assert slots.size_bytes == 2 * alone_bytes
    assert slots.growth_bytes("unet", [small] * 4, table="t") == 0


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_rank_that_did_not_fit_leaves_no_trace(
    fixed_shapes: bool, combo: Callable[[int], Combo], family: StableDiffusion1, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, small, large = LoraSlots(family, fixed_shapes=fixed_shapes), combo(2), combo(16)
    slots.arrange("unet", [small], table="t")
    before_bytes = slots.size_bytes

    def limited(*args: Any, rank: int, **options: Any) -> SlotTable[Any]:
        if rank > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return SlotTable(*args, rank=rank, **options)

    monkeypatch.setattr(lora_slots, "SlotTable", limited)
    with pytest.raises(torch.OutOfMemoryError):
        slots.arrange("unet", [large], table="t")
    slots.arrange("unet", [small], table="t")
    assert slots.size_bytes == before_bytes
