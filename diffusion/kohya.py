"""Adapters under kohya-ss/sd-scripts' key names, from diffusers' names.

A module's dots become underscores behind a prefix; weights are ``lora_down`` and ``lora_up`` and each module has an
``alpha``. SDXL's UNet, FLUX.1, FLUX.2 and SD 3 have the names that the original models have for their layers, as
sd-scripts trains those; layers that are one there are stacked, which keeps their effect. Stock diffusers reads the
files of every family but SD 3, for which it has no reader of such names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import SettingNotSupported
from diffusion.families.base import Family
from diffusion.lora import LoraLayer
from diffusion.original_names import JOINED, Blocks, swaps_halves
from diffusion.sgm_names import sgm_names

_TRANSFORMER = {"transformer": "lora_unet"}
PREFIXES = {
    "sd1": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {**_TRANSFORMER, "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux1": {**_TRANSFORMER, "text_encoder": "lora_te1"},
    "flux2_klein": _TRANSFORMER,
    "flux2_dev": _TRANSFORMER,
    "qwen_image": _TRANSFORMER,
    "z_image": _TRANSFORMER,
}
"""By family, then by component."""


def to_kohya(layers: Mapping[str, LoraLayer], family: Family) -> dict[str, Tensor]:
    """``layers`` by ``<component>.<module path>``. Raises SettingNotSupported for a kind or layer without such names.

    DoRA is such a kind: stock diffusers does not read its magnitudes from these names.
    """
    if any(layer.magnitude is not None for layer in layers.values()):
        raise SettingNotSupported("format", "a DoRA has no kohya key names")
    named: dict[str, LoraLayer] = {}
    stacked: dict[str, _Stack] = {}
    originals = _originals(family)
    for full_path, layer in layers.items():
        component, _, path = full_path.partition(".")
        if family.name in JOINED and component == "transformer":
            _sort(f"{PREFIXES[family.name][component]}_", path, layer, family, named, stacked)
        else:
            named[_module_name(component, path, family, originals)] = layer
    named |= {name: stack.joined() for name, stack in stacked.items()}
    state: dict[str, Tensor] = {}
    for name, layer in named.items():
        state |= _module(name, layer)
    return state


def to_kohya_factors(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """A LoKr's or LoHa's ``<component>.<module path>.<part>`` as LyCORIS names them for kohya's scripts.

    Raises SettingNotSupported for a family with layers that the original model has in one: a stack of Kronecker
    products is none.
    """
    named: dict[str, Tensor] = {}
    originals = _originals(family)
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        path, _, part = rest.rpartition(".")
        if family.name in JOINED and component == "transformer":
            raise SettingNotSupported("format", f"a LoKr or LoHa of {family.name} has no kohya key names")
        named[f"{_module_name(component, path, family, originals)}.{part}"] = tensor
    return named


def _originals(family: Family) -> Mapping[str, str]:
    """The original's names, by path in the denoiser, of SDXL: sd-scripts trains its other UNets under diffusers'."""
    if family.name != "sdxl":
        return {}
    names = (name.removesuffix(".base_layer") for name, _ in family.denoiser.named_modules())
    return sgm_names(dict.fromkeys(names))


def _module_name(component: str, path: str, family: Family, originals: Mapping[str, str]) -> str:
    if component.startswith("text_encoder"):
        path = f"text_model.{path.removeprefix('text_model.')}"
    elif originals:
        if path not in originals:
            raise SettingNotSupported("format", f"{path} has no kohya name")
        path = originals[path]
    return f"{PREFIXES[family.name][component]}_{path.replace('.', '_')}"


def _module(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": layer.A,
        f"{name}.lora_up.weight": layer.B,
        f"{name}.alpha": torch.tensor(float(layer.alpha)),
    }


def _sort(
    prefix: str, path: str, layer: LoraLayer, family: Family, named: dict[str, LoraLayer], stacked: dict[str, _Stack]
) -> None:
    """Into the layers that the original has too, or the parts of its joined ones."""
    list_path, _, rest = path.partition(".")
    index, _, part = rest.partition(".")
    blocks = next((blocks for blocks in JOINED[family.name] if blocks.ours == list_path), None)
    if blocks is None:
        raise SettingNotSupported("format", f"{path} has no kohya name")
    block = f"{prefix}{blocks.theirs}_{index}_"
    stack = blocks.stack_of(part)
    if stack is not None:
        stacked.setdefault(block + stack, _Stack.of(blocks, stack, index, family)).parts[part] = layer
    elif part in blocks.whole:
        if swaps_halves(blocks.whole[part], (layer.B.shape[0], layer.A.shape[1])):
            layer = replace(layer, B=torch.cat(layer.B.chunk(2)[::-1]))
        named[block + blocks.whole[part]] = layer
    else:
        raise SettingNotSupported("format", f"{path} has no kohya name")


@dataclass(frozen=True)
class _Stack:
    """A joined layer: its parts' paths in the block and their outputs, in order; and those that are adapted."""

    order: Sequence[str]
    sizes: Sequence[int]
    parts: dict[str, LoraLayer] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: Blocks, name: str, index: str, family: Family) -> _Stack:
        module = family.denoiser.get_submodule(f"{blocks.ours}.{index}")
        order = blocks.stacks[name]
        return cls(order, [_outputs(module.get_submodule(part)) for part in order])

    def joined(self) -> LoraLayer:
        """One layer whose output is the parts' outputs one after another: A stacked, B block-diagonal, parts that are
        not adapted zero. ``alpha / rank`` stays what it was, so alpha grows with the rank."""
        first = next(iter(self.parts.values()))
        # Readers split A evenly, so every part has its share of the rank.
        rank = max(layer.rank for layer in self.parts.values())
        scale = first.alpha / first.rank
        A = torch.zeros(rank * len(self.order), first.A.shape[1])
        B = torch.zeros(sum(self.sizes), rank * len(self.order))
        for place, part in enumerate(self.order):
            if part in self.parts:
                layer, row, column = self.parts[part], sum(self.sizes[:place]), place * rank
                A[column : column + layer.rank] = layer.A.float()
                own_scale = layer.alpha / layer.rank / scale
                B[row : row + self.sizes[place], column : column + layer.rank] = layer.B.float() * own_scale
        return LoraLayer(A, B, scale * A.shape[0])


def _outputs(module: torch.nn.Module) -> int:
    layer: Any = getattr(module, "base_layer", module)
    return int(layer.weight.shape[0])
