"""A slot holds the layer's own weight plus its LoRAs after any change; only small layers are merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffusion.engine.merged import ELEMENTS_MAX, MergedWeights, own_weight
from diffusion.engine.packed import Layout
from diffusion.engine.slot_layers import give_slot

CPU = torch.device("cpu")
# Two of equal size with another between them by name, one that is not merged, and one that is not square.
SIZES = {"a": (6, 4), "b": (5, 5), "c": (6, 4), "d": (6, 4), "e": (3, 8)}
NOT_MERGED = "c"


@pytest.fixture
def own() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {path: torch.randn(outs, ins) for path, (ins, outs) in SIZES.items() if path != NOT_MERGED}


@pytest.fixture
def layout() -> Layout:
    return Layout(SIZES, list(SIZES).index)


def test_a_slot_is_its_last_content_and_its_neighbours_stay(layout: Layout, own: dict[str, Tensor]) -> None:
    merged = MergedWeights(layout, own, 3)
    for rank, dora in ((4, False), (2, True), (0, False), (1, False)):
        A, B = torch.randn(rank, layout.a_width), torch.randn(rank, layout.b_width)
        scale = torch.rand(layout.b_width) + 0.5 if dora else None
        merged.write(1, A, B, scale)
        for path, weight in own.items():
            at = layout.columns[path]
            outs = slice(at.b_start, at.b_start + at.b_width)
            expected = weight if scale is None else weight * scale[outs, None]
            expected = expected + B[:, outs].T @ A[:, at.a_start : at.a_start + at.a_width]
            view = merged.view(path, 3)
            assert view is not None
            torch.testing.assert_close(view[1], expected)
            assert torch.equal(view[0], weight)
            assert torch.equal(view[2], weight)
    assert merged.view(NOT_MERGED, 3) is None


def test_memory_is_the_merged_layers_once_per_slot_and_once_more(layout: Layout, own: dict[str, Tensor]) -> None:
    assert MergedWeights(layout, own, 3).size_bytes == 4 * sum(weight.nbytes for weight in own.values())


def test_only_small_float32_linear_layers_are_merged() -> None:
    side = int(ELEMENTS_MAX**0.5)
    layer = nn.Linear(side, side)
    assert own_weight(layer, CPU) is not None
    give_slot(layer)
    assert own_weight(layer, CPU) is not None
    assert own_weight(nn.Linear(side, side + 1), CPU) is None
    assert own_weight(nn.Linear(4, 4, dtype=torch.bfloat16), CPU) is None
    assert own_weight(nn.Conv2d(4, 4, 1), CPU) is None
    assert own_weight(nn.Linear(4, 4), torch.device("cuda")) is None
