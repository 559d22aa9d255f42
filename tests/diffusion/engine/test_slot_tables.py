"""What the slots' tables hold and take, also after memory ran out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.engine import Engine, LoraRef
from diffusion.engine.slot_table import SlotTable
from diffusion.errors import OutOfGpuMemory
from diffusion.families import StableDiffusion1
from tests.diffusion.engine.lora_pictures import TOLERANCE, difference, pixels, with_loras


def test_a_slot_that_was_filled_half_way_is_filled_anew(
    family: StableDiffusion1, write_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, each_kind_of_slot: None
) -> None:
    small, large = (with_loras(LoraRef(write_lora(f"r{rank}", rank=rank, seed=rank))) for rank in (4, 8))
    engine = Engine(family)
    expected = [pixels(engine, request)[0] for request in (large, small)]
    copy = SlotTable._copy

    def full(*args: Any) -> None:
        copy(*args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(SlotTable, "_copy", full)
        with pytest.raises(OutOfGpuMemory):
            pixels(engine, large)
    assert difference(pixels(engine, small)[0], expected[1]) < TOLERANCE
    with monkeypatch.context() as patch:
        patch.setattr(SlotTable, "_copy", full)
        with pytest.raises(OutOfGpuMemory):
            pixels(engine, large)
    # Beside one of rank 8, rows of the slot are seen that only the failed filling wrote.
    assert difference(pixels(engine, small, large)[0], expected[1]) < TOLERANCE
