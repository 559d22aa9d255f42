"""The weights of small layers with each slot's LoRAs added to them: one product in a call instead of three.

A LoRA of rank 16 on a layer of 32 inputs and outputs is no smaller than the layer: ``x A B`` costs as much as ``x W``,
and two calls more. For such layers ``W + (A B)^T`` is made once, when a slot is filled, and serves every step after it.
In float32 only: in 16 bits the sum would be rounded to the weight's last place, which a LoRA may lie below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from diffusion.engine.packed import Layout
from diffusion.engine.slot_layers import SlotLinear

ELEMENTS_MAX = 2**14
"""Of a layer's weight: 128 x 128. On a CPU the product over a merged weight is faster up to 256 x 256, but a whole
step of a model of such layers was not, while a slot took five times as long to fill and four times the memory."""


def own_weight(layer: nn.Module, device: torch.device) -> Tensor | None:
    """``[out, in]``, where it is small, exact and on the slots' device (one that is offloaded may not be)."""
    # A rounded weight is a subclass of its own, of the layer or of the tensor.
    if type(layer) not in (nn.Linear, SlotLinear) or type(layer.weight) is not nn.Parameter:
        return None
    weight = layer.weight
    fits = weight.dtype == torch.float32 and weight.device.type == device.type and weight.numel() <= ELEMENTS_MAX
    return weight.detach() if fits else None


@dataclass(frozen=True, eq=False)
class _Group:
    """Neighbours of equal size. ``weights [slots + 1, layers, out, in]``: the last is the layers' own."""

    weights: Tensor
    a_start: int
    b_start: int


class MergedWeights:
    """One table's. ``own``: the weights ``[out, in]`` of the layers that are merged, by path; they must not change."""

    def __init__(self, layout: Layout[str], own: Mapping[str, Tensor], slots: int) -> None:
        self._groups: list[_Group] = []
        self._places: dict[str, tuple[Tensor, int]] = {}
        for (is_merged, _), group in groupby(layout.widths.items(), lambda item: (item[0] in own, item[1])):
            if not is_merged:
                continue
            paths = [path for path, _ in group]
            first = layout.columns[paths[0]]
            plain_Loi = torch.stack([own[path] for path in paths])
            weights_SLoi = plain_Loi.repeat(slots + 1, 1, 1, 1)
            self._groups.append(_Group(weights_SLoi, first.a_start, first.b_start))
            self._places |= {path: (weights_SLoi, place) for place, path in enumerate(paths)}

    @property
    def size_bytes(self) -> int:
        return sum(group.weights.nbytes for group in self._groups)

    def write(self, slot: int, A: Tensor, B: Tensor, scale: Tensor | None) -> None:
        """``A [rank, sum of in]`` and ``B [rank, sum of out]`` of the slot, and its DoRA scales ``[sum of out]``."""
        rank = A.shape[0]
        for group in self._groups:
            _, layers, outs, ins = group.weights.shape
            plain_Loi = group.weights[-1]
            if scale is not None:
                plain_Loi = plain_Loi * scale[group.b_start : group.b_start + layers * outs].view(layers, outs, 1)
            up_Lor = B[:, group.b_start : group.b_start + layers * outs].view(rank, layers, outs).permute(1, 2, 0)
            down_Lri = A[:, group.a_start : group.a_start + layers * ins].view(rank, layers, ins).transpose(0, 1)
            torch.baddbmm(plain_Loi, up_Lor, down_Lri, out=group.weights[slot])

    def view(self, path: str, slots: int) -> Tensor | None:
        """``[slots, out, in]``; None for a layer that is not merged."""
        if path not in self._places:
            return None
        weights_SLoi, place = self._places[path]
        return weights_SLoi[:slots, place]
