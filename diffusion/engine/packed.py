"""A LoRA as two matrices per component, ready to be copied into a slot at once.

Row ``k`` holds rank ``k`` of every adapted layer, those of equal size side by side: ``A [rank, sum of in]``
and ``B [rank, sum of out]``, with ``alpha / rank`` folded into B. Layers of a smaller rank are padded with zero rows.
Several LoRAs for one picture then lie one below the other, and a slot is filled with two copies whatever the number of
layers: the cost of an activation is not Python per module. Kronecker products are packed in the same way, as one row
each: A has all first matrices side by side, B all second ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diffusion.engine.arena import ALIGNMENT
from diffusion.errors import LoraInvalid
from diffusion.families.base import Family
from diffusion.lora import LoraLayer, read_lora
from diffusion.lora_fit import fit_layers, fit_products
from diffusion.lycoris import Kronecker
from diffusion.quantized import dense_weight

FileStamp = tuple[str, int, int]
"""Path, modification time in nanoseconds and size in bytes: another file under the same name is another LoRA."""
Allocate = Callable[[int], Tensor]
"""``[bytes]`` of uint8 on the CPU, pinned where that speeds copies up."""
Run = tuple[int, int, int]
"""Columns to copy: from, to, how many."""
K = TypeVar("K", bound=Hashable)


class Product(NamedTuple):
    """A layer and the shapes of its two matrices: those of another shape have another place."""

    path: str
    outs: tuple[int, int]
    ins: tuple[int, int]

    @classmethod
    def of(cls, path: str, product: Kronecker) -> Product:
        (o1, i1), (o2, i2) = product.w1.shape, product.w2.shape
        return cls(path, (o1, o2), (i1, i2))

    @property
    def widths(self) -> tuple[int, int]:
        """The elements of the two matrices."""
        return self.outs[0] * self.ins[0], self.outs[1] * self.ins[1]


@dataclass(frozen=True, slots=True)
class Columns:
    """Where a layer's columns are in A and in B."""

    a_start: int
    a_width: int
    b_start: int
    b_width: int


class Layout(Generic[K]):
    """The columns of a set of layers, by size, and then in ``order``. Immutable.

    Pairs are named by their layer's path, products by ``Product``.
    """

    def __init__(self, widths: Mapping[K, tuple[int, int]], order: Callable[[K], int]) -> None:
        """``widths``: of a pair its layer's inputs (times the kernel) and outputs, of a product as ``Product`` does."""
        self.columns: dict[K, Columns] = {}
        self.widths = dict(sorted(widths.items(), key=lambda item: (item[1], order(item[0]))))
        a_start = b_start = 0
        for path, (a_width, b_width) in self.widths.items():
            self.columns[path] = Columns(a_start, a_width, b_start, b_width)
            a_start, b_start = a_start + a_width, b_start + b_width
        self.a_width, self.b_width = a_start, b_start
        self.names = frozenset(self.columns)
        self._order = order

    def with_layers(self, widths: Mapping[K, tuple[int, int]]) -> Layout[K]:
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
class Packed(Generic[K]):
    """One LoRA's part for one component. ``A [rank, a]``, ``B [rank, b]`` in the component's dtype, on the CPU.

    Products have one row.
    """

    A: Tensor
    B: Tensor
    layout: Layout[K]
    dora: dict[K, DoraLayer] = field(default_factory=dict)
    _runs: tuple[Layout[K], list[Run], list[Run]] | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def runs(self, target: Layout[K]) -> tuple[list[Run], list[Run]]:
        """What goes where when the columns are copied into ``target``, in as few pieces as can be."""
        if self._runs is None or self._runs[0] is not target:
            pairs = [(columns, target.columns[name]) for name, columns in self.layout.columns.items()]
            a = _merged((own.a_start, to.a_start, own.a_width) for own, to in pairs)
            b = _merged((own.b_start, to.b_start, own.b_width) for own, to in pairs)
            self._runs = (target, a, b)
        return self._runs[1], self._runs[2]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file fitted to a family, by component: its pairs and its Kronecker products."""

    stamp: FileStamp
    parts: Mapping[str, Packed[str]]
    products: Mapping[str, Packed[Product]] = field(default_factory=dict)

    @property
    def components(self) -> set[str]:
        return {*self.parts, *self.products}

    def rescales(self, other: Adapter) -> bool:
        """Whether a DoRA of this one would have to scale a product of ``other``, which came before it."""
        return any(
            not part.dora.keys().isdisjoint(product.path for product in other.products[name].layout.names)
            for name, part in self.parts.items()
            if part.dora and name in other.products
        )

    @property
    def size_bytes(self) -> int:
        packed: list[Packed[str] | Packed[Product]] = [*self.parts.values(), *self.products.values()]
        tensors = [t for part in packed for t in (part.A, part.B)]
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
    file, components = read_lora(Path(stamp[0])), family.lora_components
    fitted, products = fit_layers(file, components), fit_products(file, components)
    layouts = {name: _layout(layers, components[name]) for name, layers in fitted.items()}
    product_layouts = {name: _product_layout(found, components[name]) for name, found in products.items()}
    ranks = {name: max(layer.rank for layer in layers.values()) for name, layers in fitted.items()}
    shapes = [(ranks[name], width) for name, at in layouts.items() for width in (at.a_width, at.b_width)]
    shapes += [(1, width) for at in product_layouts.values() for width in (at.a_width, at.b_width)]
    matrices = iter(_carved(allocate, shapes, family.dtype))
    return Adapter(
        stamp,
        {
            name: _pack(layers, components[name], layouts[name], next(matrices), next(matrices))
            for name, layers in fitted.items()
        },
        {
            name: _pack_products(found, product_layouts[name], next(matrices), next(matrices))
            for name, found in products.items()
        },
    )


def layer_order(component: nn.Module) -> dict[str, int]:
    """Path to position. Layers that carry a peft adapter keep the path they had without it."""
    names = (name.removesuffix(".base_layer") for name, _ in component.named_modules())
    return {name: position for position, name in enumerate(dict.fromkeys(names))}


def base_layer(component: nn.Module, path: str) -> nn.Module:
    """The layer itself, under whatever peft has put around it."""
    module = component.get_submodule(path)
    inner = getattr(module, "base_layer", module)
    return inner if isinstance(inner, nn.Module) else module


def pair_layout(component: nn.Module, widths: Mapping[str, tuple[int, int]] | None = None) -> Layout[str]:
    """In the order in which ``component`` names its layers."""
    return Layout(widths or {}, layer_order(component).__getitem__)


def product_layout(component: nn.Module, products: Iterable[Product] = ()) -> Layout[Product]:
    """As ``pair_layout``."""
    order = layer_order(component)
    return Layout({product: product.widths for product in products}, lambda product: order[product.path])


def _layout(layers: Mapping[str, LoraLayer], component: nn.Module) -> Layout[str]:
    return pair_layout(component, {path: (layer.A[0].numel(), layer.B.shape[0]) for path, layer in layers.items()})


def _product_layout(products: Mapping[str, Kronecker], component: nn.Module) -> Layout[Product]:
    return product_layout(component, (Product.of(path, product) for path, product in products.items()))


def _carved(allocate: Allocate, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """Matrices of unset values, one behind the other in one allocation, each at an aligned place."""
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    rooms = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    pieces = torch.split(allocate(sum(rooms)), rooms)
    return [piece[:size].view(dtype).view(shape) for piece, size, shape in zip(pieces, sizes, shapes, strict=True)]


@torch.no_grad()
def _pack(
    layers: Mapping[str, LoraLayer], component: nn.Module, layout: Layout[str], A: Tensor, B: Tensor
) -> Packed[str]:
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


def _pack_products(products: Mapping[str, Kronecker], layout: Layout[Product], A: Tensor, B: Tensor) -> Packed[Product]:
    """Fills A and B."""
    for path, product in products.items():
        at = layout.columns[Product.of(path, product)]
        A[0, at.a_start : at.a_start + at.a_width] = product.w1.flatten()
        B[0, at.b_start : at.b_start + at.b_width] = product.w2.flatten()
    return Packed(A, B, layout)


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
