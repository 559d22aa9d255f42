"""A read LoRA file and a model: which layer each of its modules is for, and its weights in that layer's form.

A module of the original model may stand for several layers of diffusers' (queries, keys and values in one): its rows
are then shared out among them, which changes nothing of its effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.layer_names import LayerNames, component_of
from diffusion.lora import LoraFile, LoraLayer
from diffusion.lora_keys import shown
from diffusion.lycoris import Kronecker, pair_of
from diffusion.quantized import weight_shape

Layer: TypeAlias = nn.Linear | nn.Conv2d


def fit_layers(lora: LoraFile, components: Mapping[str, nn.Module]) -> dict[str, dict[str, LoraLayer]]:
    """The pairs by component, then by that module's own path names. Raises LoraMismatch unless every one fits.

    A name that tells no component is for the first. The weights get the shapes of the layers' own: a flat convolution
    pair its kernel's. Products on convolutions are among them: models of one architecture have some projections as
    linear layers or as 1x1 convolutions. Raises LoraInvalid where such a one is too wide, and where two modules are for
    one layer.
    """
    fitted: dict[str, dict[str, LoraLayer]] = {}
    layers = lora.layers()
    for name, place in _places(lora.modules, components).items():
        layer = layers.get(name)
        if layer is None and not place.takes_product(lora.products[name]):
            layer = _as_pair(name, lora.products[name], place)
        if layer is not None:
            for path, part in zip(place.paths, _shared_out(name, layer, place), strict=True):
                if part is not None:
                    fitted.setdefault(place.component, {})[path] = part
    return fitted


def fit_products(lora: LoraFile, components: Mapping[str, nn.Module]) -> dict[str, dict[str, Kronecker]]:
    """As ``fit_layers``, of the products on linear layers."""
    fitted: dict[str, dict[str, Kronecker]] = {}
    for name, place in _places(lora.products, components).items():
        product = lora.products[name]
        if not place.takes_product(product):
            continue
        if (product.outs, product.ins) != place.shape[:2]:
            raise LoraMismatch(
                f"layer {shown(name)} is {place.shape}, the LoKr was made for {product.outs, product.ins}"
            )
        rows = [outs // product.w2.shape[0] for outs in place.outs]
        for path, w1 in zip(place.paths, torch.split(product.w1, rows), strict=True):
            fitted.setdefault(place.component, {})[path] = Kronecker(w1, product.w2)
    return fitted


def fit_factors(factors: Mapping[str, Mapping[str, Tensor]], components: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What ``read_factors`` gives under diffusers' names, ``<component>.<path>.<part>``.

    Raises LoraMismatch for modules that the model has no layer for, or several; LoraInvalid as ``fit_layers``.
    """
    fitted: dict[str, Tensor] = {}
    for name, place in _places(factors, components).items():
        if len(place.paths) > 1 or place.is_swapped:
            raise LoraMismatch(f"{shown(name)} is for several of its layers at once")
        fitted |= {f"{place.component}.{place.paths[0]}.{part}": tensor for part, tensor in factors[name].items()}
    return fitted


@dataclass(frozen=True)
class _Place:
    """The layers that a module is for, in the order of its outputs."""

    component: str
    paths: tuple[str, ...]
    modules: tuple[Layer, ...]
    is_swapped: bool

    @property
    def outs(self) -> list[int]:
        return [weight_shape(module)[0] for module in self.modules]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the one weight that the module is made for."""
        return sum(self.outs), *weight_shape(self.modules[0])[1:]

    def takes_product(self, product: Kronecker) -> bool:
        """Whether the product can stay one: on linear layers, each with whole blocks of its rows."""
        is_linear = all(isinstance(module, nn.Linear) for module in self.modules)
        is_cut_cleanly = len(self.modules) == 1 or all(outs % product.w2.shape[0] == 0 for outs in self.outs)
        return is_linear and is_cut_cleanly and not self.is_swapped


class _Finder:
    """Finds layers by the names that a file has for them."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components
        self._layers: dict[str, dict[str, Layer]] = {}
        self._names: dict[str, LayerNames] = {}

    def place(self, name: str) -> _Place:
        """Raises LoraMismatch, LoraInvalid."""
        component, path = component_of(name, list(self._components))
        if component not in self._names:
            layers = self._layers[component] = dict(_adaptable_layers(self._components[component]))
            self._names[component] = LayerNames({at: weight_shape(layer) for at, layer in layers.items()})
        found = self._names[component].find(path)
        if found is None:
            raise LoraMismatch(_why_not(name, path, self._components[component]))
        modules = tuple(self._layers[component][at] for at in found.paths)
        return _Place(component, found.paths, modules, found.is_swapped)


def _places(names: Iterable[str], components: Mapping[str, nn.Module]) -> dict[str, _Place]:
    """By module. Raises LoraMismatch, LoraInvalid."""
    finder = _Finder(components)
    places = {name: finder.place(name) for name in names}
    taken: dict[tuple[str, str], str] = {}
    for name, place in places.items():
        for path in place.paths:
            other = taken.setdefault((place.component, path), name)
            if other != name:
                raise LoraInvalid(f"{shown(name)} and {shown(other)} in it are for one layer")
    return places


def _adaptable_layers(component: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Layers that carry a peft adapter are at the path they had without it; its own layers are none."""
    wrapped: list[str] = []
    for path, module in component.named_modules():
        if any(path.startswith(outer) for outer in wrapped[-1:]):
            continue
        if hasattr(module, "base_layer"):
            wrapped.append(f"{path}.")
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            yield path, layer


def _why_not(name: str, path: str, component: nn.Module) -> str:
    try:
        component.get_submodule(path)
    except AttributeError:
        return f"this model has no layer {shown(name)}"
    return f"layer {shown(name)} cannot carry a LoRA"


def _as_pair(name: str, product: Kronecker, place: _Place) -> LoraLayer:
    """Raises LoraInvalid: it is too wide."""
    try:
        A, B = pair_of(name, product)
    except LoraInvalid as exc:
        if len(place.paths) == 1:
            raise
        reason = "for layers that are one in the original model, and its matrices cannot be cut between them"
        raise LoraInvalid(f"the LoKr of {shown(name)} is {reason}") from exc
    return LoraLayer(A, B, float(A.shape[0]))


def _shared_out(name: str, layer: LoraLayer, place: _Place) -> list[LoraLayer | None]:
    """A layer for each of the place's, None for one that the module does nothing to. Raises LoraMismatch."""
    if place.is_swapped:
        magnitude = None if layer.magnitude is None else _swapped(layer.magnitude)
        layer = replace(layer, B=_swapped(layer.B), magnitude=magnitude)
    if len(place.modules) == 1:
        return [_shaped(name, layer, place.shape)]
    if layer.B.shape[0] != place.shape[0]:
        made_for = layer.B.shape[0], layer.A.shape[1]
        raise LoraMismatch(f"layer {shown(name)} is {place.shape}, the LoRA was made for {made_for}")
    parts = zip(_cut(layer, place.outs), place.modules, strict=True)
    return [None if part is None else _shaped(name, part, weight_shape(module)) for part, module in parts]


def _swapped(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


def _cut(layer: LoraLayer, outs: Sequence[int]) -> list[LoraLayer | None]:
    """The rows of B shared out. A stack of adapters has ranks for each of its parts alone, and none for those that are
    not adapted."""
    rows = torch.split(layer.B, list(outs))
    magnitudes = [None] * len(outs) if layer.magnitude is None else torch.split(layer.magnitude, list(outs))
    used = [(part != 0).reshape(len(part), layer.rank, -1).any(2).any(0) for part in rows]
    if layer.magnitude is not None or not any(bool(ranks.any()) for ranks in used):
        used = [torch.ones(layer.rank, dtype=torch.bool)] * len(outs)
    return [
        replace(
            layer, A=layer.A[ranks], B=part[:, ranks], alpha=layer.alpha / layer.rank * int(ranks.sum()),
            magnitude=magnitude,
        )
        if bool(ranks.any()) else None
        for part, ranks, magnitude in zip(rows, used, magnitudes, strict=True)
    ]  # fmt: skip


def _shaped(name: str, layer: LoraLayer, shape: tuple[int, ...]) -> LoraLayer:
    """The pair in the shapes of the layer that it adapts. Raises LoraMismatch where it is not for that layer."""
    if layer.A.ndim == 2 and len(shape) == 4 and layer.A.shape[1] == math.prod(shape[1:]):
        kernel = layer.A.reshape(layer.rank, *shape[1:])
        layer = replace(layer, A=kernel, B=layer.B.reshape(*layer.B.shape[:2], 1, 1))
    if len(shape) == 2 and layer.A.ndim == 4 and layer.A.shape[2:] == (1, 1):
        # Models of one architecture have these projections as 1x1 convolutions or as linear layers.
        layer = replace(layer, A=layer.A.flatten(1), B=layer.B.flatten(1))
    expected = (shape[0], shape[1], len(shape))
    found = (layer.B.shape[0], layer.A.shape[1], layer.A.ndim)
    if found != expected or layer.A.shape[2:] != shape[2:]:
        raise LoraMismatch(f"layer {shown(name)} is {shape}, the LoRA was made for {found[:2]}")
    return layer
