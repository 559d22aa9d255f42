"""Adapters under kohya-ss/sd-scripts' key names, from diffusers' names.

A module's dots become underscores behind a prefix; weights are ``lora_down`` and ``lora_up`` and each module has an
``alpha``. FLUX.1's attention is one layer in the original model: its parts are stacked, which keeps their effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import SettingNotSupported
from diffusion.families.base import Family
from diffusion.lora import LoraLayer

PREFIXES = {
    "sd1": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "flux1": {"transformer": "lora_unet", "text_encoder": "lora_te1"},
    "qwen_image": {"transformer": "lora_unet"},
    "z_image": {"transformer": "lora_unet"},
}
"""By family, then by component. Other families have no kohya names that stock diffusers reads."""
FLUX_DOUBLE = {
    "attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp_0",
    "ff.net.2": "img_mlp_2", "ff_context.net.0.proj": "txt_mlp_0", "ff_context.net.2": "txt_mlp_2",
    "norm1.linear": "img_mod_lin", "norm1_context.linear": "txt_mod_lin",
}  # fmt: skip
FLUX_DOUBLE_STACKS = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX_SINGLE = {"proj_out": "linear2", "norm.linear": "modulation_lin"}
FLUX_SINGLE_STACKS = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def has_kohya_names(family: Family) -> bool:
    return family.name in PREFIXES


def to_kohya(layers: Mapping[str, LoraLayer], family: Family) -> dict[str, Tensor]:
    """``layers`` by ``<component>.<module path>``. Raises SettingNotSupported for a family or kind without such names.

    DoRA is such a kind: stock diffusers does not read its magnitudes from these names.
    """
    if not has_kohya_names(family):
        raise SettingNotSupported("format", f"{family.name} has no kohya key names")
    if any(layer.magnitude is not None for layer in layers.values()):
        raise SettingNotSupported("format", "a DoRA has no kohya key names")
    named: dict[str, LoraLayer] = {}
    stacked: dict[str, dict[str, LoraLayer]] = {}
    for full_path, layer in layers.items():
        component, _, path = full_path.partition(".")
        if family.name == "flux1" and component == "transformer":
            _sort_flux(f"{PREFIXES[family.name][component]}_", path, layer, named, stacked)
        else:
            named[_module_name(component, path, family)] = layer
    named |= {name: _stack(name, parts, family) for name, parts in stacked.items()}
    state: dict[str, Tensor] = {}
    for name, layer in named.items():
        state |= _module(name, layer)
    return state


def to_kohya_factors(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """A LoKr's or LoHa's ``<component>.<module path>.<part>`` as LyCORIS names them for kohya's scripts.

    Raises SettingNotSupported for a family without such names, or with layers that the original model has in one: a
    stack of Kronecker products is none.
    """
    if not has_kohya_names(family):
        raise SettingNotSupported("format", f"{family.name} has no kohya key names")
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        path, _, part = rest.rpartition(".")
        if family.name == "flux1" and component == "transformer":
            raise SettingNotSupported("format", "a LoKr or LoHa of FLUX.1 has no kohya key names")
        named[f"{_module_name(component, path, family)}.{part}"] = tensor
    return named


def _module_name(component: str, path: str, family: Family) -> str:
    if component.startswith("text_encoder"):
        path = f"text_model.{path.removeprefix('text_model.')}"
    return f"{PREFIXES[family.name][component]}_{path.replace('.', '_')}"


def _module(name: str, layer: LoraLayer) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": layer.A,
        f"{name}.lora_up.weight": layer.B,
        f"{name}.alpha": torch.tensor(float(layer.alpha)),
    }


def _sort_flux(
    prefix: str, path: str, layer: LoraLayer, named: dict[str, LoraLayer], stacked: dict[str, dict[str, LoraLayer]]
) -> None:
    blocks, _, rest = path.partition(".")
    index, _, part = rest.partition(".")
    is_single = blocks == "single_transformer_blocks"
    block = f"{prefix}{'single' if is_single else 'double'}_blocks_{index}_"
    whole, stacks = (FLUX_SINGLE, FLUX_SINGLE_STACKS) if is_single else (FLUX_DOUBLE, FLUX_DOUBLE_STACKS)
    if part in whole:
        named[block + whole[part]] = layer
        return
    stack = next((name for name, parts in stacks.items() if part in parts), None)
    if stack is None:
        raise SettingNotSupported("format", f"{path} has no kohya name")
    stacked.setdefault(block + stack, {})[part] = layer


def _stack(name: str, parts: Mapping[str, LoraLayer], family: Family) -> LoraLayer:
    """One layer whose output is the parts' outputs one after another: A stacked, B block-diagonal, parts that are not
    adapted zero. ``alpha / rank`` stays what it was, so alpha grows with the rank."""
    kind, block = ("single", "single_transformer_blocks") if "_single_" in name else ("double", "transformer_blocks")
    index = name.split("_blocks_")[1].split("_")[0]
    stacks = FLUX_SINGLE_STACKS if kind == "single" else FLUX_DOUBLE_STACKS
    order = next(members for stack, members in stacks.items() if name.endswith(stack))
    module = family.denoiser.get_submodule(f"{block}.{index}")
    sizes = [_outputs(module.get_submodule(part)) for part in order]
    first = next(iter(parts.values()))
    # The reader splits A evenly, so every part has its share of the rank.
    rank = max(layer.rank for layer in parts.values())
    scale = first.alpha / first.rank
    A = torch.zeros(rank * len(order), first.A.shape[1])
    B = torch.zeros(sum(sizes), rank * len(order))
    for place, part in enumerate(order):
        if part in parts:
            layer, row = parts[part], sum(sizes[:place])
            column = place * rank
            A[column : column + layer.rank] = layer.A.float()
            own_scale = layer.alpha / layer.rank / scale
            B[row : row + sizes[place], column : column + layer.rank] = layer.B.float() * own_scale
    return LoraLayer(A, B, scale * A.shape[0])


def _outputs(module: torch.nn.Module) -> int:
    layer: Any = getattr(module, "base_layer", module)
    return int(layer.weight.shape[0])
