"""The LoRAs of one batch, stacked: slot ``i`` holds everything that the rows at place ``i`` of the batch use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic

import torch
from torch import Tensor

from diffusion.engine.merged import MergedWeights
from diffusion.engine.packed import Adapter, FileStamp, K, Layout, Packed

Combo = tuple[tuple[Adapter, float], ...]
"""The adapters of one picture with their scales, in order; each adapter once."""


class SlotTable(Generic[K]):
    """``A [slots, rank, sum of a]``, ``B [slots, rank, sum of b]``: the pairs, or the products, of one component.

    Each layer's part is a view. Filling a slot changes values only, never a shape, a stride or an address.
    """

    def __init__(
        self, part_of: Callable[[Adapter], Packed[K] | None], layout: Layout[K], *, slots: int, rank: int, dora: bool,
        device: torch.device, dtype: torch.dtype, merged: MergedWeights | None = None,
    ) -> None:  # fmt: skip
        """``part_of``: what of an adapter is kept here. ``merged``: the layers that get their weights per slot."""
        self.layout, self.slots, self.rank, self.merged = layout, slots, rank, merged
        self._part_of = part_of
        self._A = torch.zeros(slots, rank, layout.a_width, device=device, dtype=dtype)
        self._B = torch.zeros(slots, rank, layout.b_width, device=device, dtype=dtype)
        self._scale = torch.ones(slots, layout.b_width, device=device, dtype=dtype) if dora else None
        # By name: the adapters themselves may leave memory while a slot still has their values.
        self._contents: list[tuple[tuple[FileStamp, float], ...] | None] = [()] * slots
        self._ranks = [0] * slots

    @property
    def dora(self) -> bool:
        return self._scale is not None

    @property
    def factor_bytes(self) -> int:
        """Of A and B."""
        return self._A.nbytes + self._B.nbytes

    @property
    def size_bytes(self) -> int:
        scale_bytes = 0 if self._scale is None else self._scale.nbytes
        return self.factor_bytes + scale_bytes + (0 if self.merged is None else self.merged.size_bytes)

    def fill(self, combos: Sequence[Combo]) -> None:
        """Slot ``i`` gets ``combos[i]``, where it does not have that already."""
        for slot, combo in enumerate(combos):
            content = tuple((a.stamp, scale) for a, scale in combo if self._part_of(a) is not None)
            if content != self._contents[slot]:
                # Unknown until all is written: memory may run out half way.
                self._contents[slot] = None
                self._write(slot, combo)
                self._contents[slot] = content

    def factors(self, name: K, slots: int) -> tuple[Tensor, Tensor]:
        """A layer's ``[slots, rank, a]`` and ``[slots, rank, b]``, of the first ``slots`` slots."""
        at = self.layout.columns[name]
        A = self._A[:slots, :, at.a_start : at.a_start + at.a_width]
        return A, self._B[:slots, :, at.b_start : at.b_start + at.b_width]

    def output_scale(self, name: K, slots: int) -> Tensor | None:
        """A layer's ``[slots, b]``; None for a table without."""
        at = self.layout.columns[name]
        return None if self._scale is None else self._scale[:slots, at.b_start : at.b_start + at.b_width]

    def _write(self, slot: int, combo: Combo) -> None:
        if self._scale is not None:
            self._scale[slot] = 1
        # Until all is written, any of its rows may be filled.
        first, filled, self._ranks[slot] = 0, self._ranks[slot], self.rank
        for adapter, scale in combo:
            part = self._part_of(adapter)
            if part is None:
                continue
            self._copy(slot, first, part, scale)
            if part.dora:
                self._apply_dora(slot, first, part, scale)
            first += part.rank
        if first < filled:
            self._A[slot, first:filled] = 0
            self._B[slot, first:filled] = 0
        self._ranks[slot] = first
        if self.merged is not None:
            output_scale = None if self._scale is None else self._scale[slot]
            self.merged.write(slot, self._A[slot, :first], self._B[slot, :first], output_scale)

    def _copy(self, slot: int, first: int, part: Packed[K], scale: float) -> None:
        A, B = self._A[slot, first : first + part.rank], self._B[slot, first : first + part.rank]
        a_runs, b_runs = part.runs(self.layout)
        A_own, B_own = part.A, part.B
        if part.layout.a_width < self.layout.a_width:
            A.zero_()
            B.zero_()
            # Each goes to the device in one copy and is spread there: torch makes copies of columns wait for the host.
            A_own, B_own = (matrix.to(A.device, non_blocking=True) for matrix in (A_own, B_own))
        for start, to, width in a_runs:
            A[:, to : to + width].copy_(A_own[:, start : start + width], non_blocking=True)
        for start, to, width in b_runs:
            B[:, to : to + width].copy_(B_own[:, start : start + width], non_blocking=True)
        if scale != 1.0:
            B.mul_(scale)

    def _apply_dora(self, slot: int, first: int, part: Packed[K], scale: float) -> None:
        """One LoRA after another, as peft does: a DoRA scales what came before it, its own change included."""
        if self._scale is None:
            raise RuntimeError("the table has no room for output scales")
        for path, dora in part.dora.items():
            at = self.layout.columns[path]
            columns = slice(at.b_start, at.b_start + at.b_width)
            factor = dora.output_scale(scale).to(self._scale.device, self._scale.dtype)
            self._scale[slot, columns] *= factor
            self._B[slot, : first + part.rank, columns] *= factor
