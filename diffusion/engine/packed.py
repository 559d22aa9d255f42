"""A LoRA as two matrices per component, ready to be copied into a slot at once.

Row ``k`` holds rank ``k`` of every adapted layer, those of equal size side by side: ``A [rank, sum of in]``
and ``B [rank, sum of out]``, with ``alpha / rank`` folded into B. Layers of a smaller rank are padded with zero rows.
Several LoRAs for one picture then lie one below the other, and a slot is filled with two copies whatever the number of
layers: the cost of an activation is not Python per module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.engine.arena import ALIGNMENT
from diffusion.errors import LoraInvalid
from diffusion.families.base import Family
from diffusion.lora import LoraLayer, fit_layers, read_lora
from diffusion.quantized import dense_weight

FileStamp = tuple[str, int, int]
"""Path, modification time in nanoseconds and size in bytes: another file under the same name is another LoRA."""
Allocate = Callable[[int], Tensor]
"""``[bytes]`` of uint8 on the CPU, pinned where that speeds copies up."""
Run = tuple[int, int, int]
"""Columns to copy: from, to, how many."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a layer's columns are in A and in B."""

    a_start: int
    a_width: int
    b_start: int
    b_width: int


class Layout:
    """The columns of a set of layers, by size, and then in the order in which their module names them. Immutable."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], order: Mapping[str, int]) -> None:
        """``widths``: a layer's inputs (times its kernel) and outputs, by path."""
        self.columns: dict[str, Columns] = {}
        self.widths = dict(sorted(widths.items(), key=lambda item: (item[1], order[item[0]])))
        a_start = b_start = 0
        for path, (a_width, b_width) in self.widths.items():
            self.columns[path] = Columns(a_start, a_width, b_start, b_width)
            a_start, b_start = a_start + a_width, b_start + b_width
        self.a_width, self.b_width = a_start, b_start
        self._order = order

    def with_layers(self, widths: Mapping[str, tuple[int, int]]) -> Layout:
        """Itself where it has all of them already."""
        if widths.keys() <= self.widths.keys():
            return self
        return Layout({**self.widths, **widths}, self._order)


@dataclass(frozen=True)
class DoraLayer:
    """What the output scale of a DoRA layer is made of; each ``[out]``, float32.

    The norm of row ``i`` of ``W + s D`` is ``sqrt(w_w + 2 s w_d + s^2 d_d)``, so any scale ``s`` is a few operations.
    """

    magnitude: Tensor
    w_w: Tensor
    w_d: Tensor
    d_d: Tensor

    def output_scale(self, scale: float) -> Tensor:
        """``[out]``: the magnitude over the norm of each row of the changed weight, arXiv:2402.09353 equation 5."""
        return self.magnitude / (self.w_w + 2 * scale * self.w_d + scale**2 * self.d_d).clamp_min(0).sqrt()


@dataclass
class Packed:
    """One LoRA's part for one component. ``A [rank, a]``, ``B [rank, b]`` in the component's dtype, on the CPU."""

    A: Tensor
    B: Tensor
    layout: Layout
    dora: dict[str, DoraLayer]
    _runs: tuple[Layout, list[Run], list[Run]] | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def runs(self, target: Layout) -> tuple[list[Run], list[Run]]:
        """What goes where when the columns are copied into ``target``, in as few pieces as can be."""
        if self._runs is None or self._runs[0] is not target:
            pairs = [(columns, target.columns[path]) for path, columns in self.layout.columns.items()]
            a = _merged((own.a_start, to.a_start, own.a_width) for own, to in pairs)
            b = _merged((own.b_start, to.b_start, own.b_width) for own, to in pairs)
            self._runs = (target, a, b)
        return self._runs[1], self._runs[2]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file fitted to a family, by component."""

    stamp: FileStamp
    parts: Mapping[str, Packed]

    @property
    def size_bytes(self) -> int:
        tensors = [t for part in self.parts.values() for t in (part.A, part.B)]
        tensors += [t for p in self.parts.values() for d in p.dora.values() for t in (d.magnitude, d.w_w, d.w_d, d.d_d)]
        return sum(tensor.nbytes for tensor in tensors)


def stamp_of(path: Path) -> FileStamp:
    """Raises LoraInvalid where there is no file."""
    try:
        status = path.stat()
    except OSError as exc:
        raise LoraInvalid("the file does not exist") from exc
    return str(path), status.st_mtime_ns, status.st_size


def load_adapter(stamp: FileStamp, family: Family, allocate: Allocate) -> Adapter:
    """Read, fit and pack one file. Raises LoraInvalid, LoraMismatch. Touches neither modules nor random state."""
    fitted = fit_layers(read_lora(Path(stamp[0])), family.lora_components)
    layouts = {name: _layout(layers, family.lora_components[name]) for name, layers in fitted.items()}
    ranks = {name: max(layer.rank for layer in layers.values()) for name, layers in fitted.items()}
    shapes = {name: [(ranks[name], at.a_width), (ranks[name], at.b_width)] for name, at in layouts.items()}
    matrices = iter(_carved(allocate, [shape for own in shapes.values() for shape in own], family.dtype))
    parts = {
        name: _pack(layers, family.lora_components[name], layouts[name], next(matrices), next(matrices))
        for name, layers in fitted.items()
    }
    return Adapter(stamp, parts)


def layer_order(component: nn.Module) -> dict[str, int]:
    """Path to position. Layers that carry a peft adapter keep the path they had without it."""
    names = (name.removesuffix(".base_layer") for name, _ in component.named_modules())
    return {name: position for position, name in enumerate(dict.fromkeys(names))}


def base_layer(component: nn.Module, path: str) -> nn.Module:
    """The layer itself, under whatever peft has put around it."""
    module = component.get_submodule(path)
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def _layout(layers: Mapping[str, LoraLayer], component: nn.Module) -> Layout:
    widths = {path: (layer.A[0].numel(), layer.B.shape[0]) for path, layer in layers.items()}
    return Layout(widths, layer_order(component))


def _carved(allocate: Allocate, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Matrices of unset values, one behind the other in one allocation, each at an aligned place."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    pieces = torch.split(allocate(sum(rooms)), rooms)
    return [piece[:size].view(dtype).view(shape) for piece, size, shape in zip(pieces, sizes, shapes, strict=True)]


@torch.no_grad()
def _pack(layers: Mapping[str, LoraLayer], component: nn.Module, layout: Layout, A: Tensor, B: Tensor) -> Packed:
    """Fills A and B."""
    if any(layer.rank < A.shape[0] for layer in layers.values()):
        A.zero_()
        B.zero_()
    dora: dict[str, DoraLayer] = {}
    for path, layer in layers.items():
        at = layout.columns[path]
        down, up = layer.A.flatten(1).float(), layer.B.flatten(1).float() * (layer.alpha / layer.rank)
        A[: layer.rank, at.a_start : at.a_start + at.a_width] = down
        B[: layer.rank, at.b_start : at.b_start + at.b_width] = up.T
        if layer.magnitude is not None:
            dora[path] = _dora(base_layer(component, path), layer.magnitude, up @ down)
    return Packed(A, B, layout, dora)


def _dora(module: nn.Module, magnitude: Tensor, change: Tensor) -> DoraLayer:
    flat = dense_weight(module).flatten(1)
    return DoraLayer(magnitude.float(), flat.square().sum(1), (flat * change).sum(1), change.square().sum(1))


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Neighbours joined. The runs come in ascending order on both sides."""
    merged: list[Run] = []
    for start, to, width in runs:
        if merged and merged[-1][0] + merged[-1][2] == start and merged[-1][1] + merged[-1][2] == to:
            merged[-1] = (merged[-1][0], merged[-1][1], merged[-1][2] + width)
        else:
            merged.append((start, to, width))
    return merged
