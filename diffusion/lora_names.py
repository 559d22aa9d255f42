"""Key names and alphas of LoRA files: kohya's, peft's and diffusers' forms become the one of ``diffusion.lora``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
    _convert_non_diffusers_z_image_lora_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from torch import Tensor

from diffusion.errors import LoraInvalid
from diffusion.kohya_blocks import SD3, Blocks, original_order

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Metadata entry in which diffusers keeps peft's settings; without it a reader takes alpha = rank."""
KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")


def _read_flux(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1's and FLUX.2's layers have one set of names, but not of shapes."""
    if not _is_flux2(raw):
        flux1: dict[str, Tensor] = _convert_kohya_flux_lora_to_diffusers(dict(raw))
        return flux1
    left = dict(raw)
    read: dict[str, Tensor] = _convert_kohya_flux2_lora_to_diffusers(left)
    if left:
        raise LoraInvalid(f"unknown weights for {next(iter(left)).partition('.')[0]!r}")
    return read


TRANSFORMER_READERS = {
    ("lora_unet_double_blocks_", "lora_unet_single_blocks_"): _read_flux,
    ("lora_unet_transformer_blocks_",): _convert_non_diffusers_qwen_lora_to_diffusers,
    ("lora_unet_layers_", "lora_unet_noise_refiner_", "lora_unet_context_refiner_"):
        _convert_non_diffusers_z_image_lora_to_diffusers,
}  # fmt: skip
"""kohya's names of FLUX.1's and FLUX.2's, Qwen-Image's and Z-Image's blocks. Theirs begin with lora_unet too."""
SD3_PREFIX = "lora_unet_joint_blocks_"
FLUX1_WIDTHS = {"_mlp_0": (4, 1), "_mlp_2": (1, 4), "_linear1": (7, 1), "_linear2": (1, 5)}
"""Outputs and inputs of FLUX.1's layers, by how their names end."""


def from_kohya(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """Module by module, so that each alpha stays with its module; the naming rules are diffusers' own, where it has
    them.

    The weights under peft's names, the alphas, and the path of each of the file's module names. The last two are empty
    for a transformer that diffusers reads: that takes whole files, cuts joined layers up and multiplies the weights by
    alpha / rank. Raises LoraInvalid.
    """
    for starts, read in TRANSFORMER_READERS.items():
        if any(key.startswith(starts) for key in raw):
            try:
                return _peft_names(read(dict(raw))), {}, {}
            except (ValueError, KeyError, RuntimeError, AttributeError, AssertionError) as exc:
                raise LoraInvalid("its layers are not those of the model whose names it has") from exc
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in raw.items():
        groups.setdefault(key.partition(".")[0], {})[key] = tensor
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    paths: dict[str, str] = {}
    for name, group in groups.items():
        if name.startswith(SD3_PREFIX):
            converted, own_alphas = _read_block_layer(name, group, SD3)
            state |= converted
            alphas |= own_alphas
            continue
        converted, alpha = _convert_kohya_module(group)
        state.update(converted)
        paths[name] = next(iter(converted)).rpartition(".lora_")[0]
        if alpha is not None:
            alphas[paths[name]] = alpha
    return state, alphas, paths


def _convert_kohya_module(group: dict[str, Tensor]) -> tuple[dict[str, Tensor], float | None]:
    name = next(iter(group)).partition(".")[0]
    try:
        converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(group))
        converted = _peft_names(converted)
    except (ValueError, KeyError, RuntimeError) as exc:
        raise LoraInvalid(f"unknown weights for {name!r}") from exc
    if not converted or not all(".lora_A." in key or ".lora_B." in key for key in converted):
        raise LoraInvalid(f"unknown weights for {name!r}")
    return converted, float(next(iter(alphas.values()))) if alphas else None


def _is_flux2(raw: Mapping[str, Tensor]) -> bool:
    """Whether a layer has not the outputs per input that FLUX.1's of its name has: FLUX.1's MLP is four times as wide
    as the model, FLUX.2's is gated and three times as wide."""
    return any(
        raw[key].shape[0] * inputs != raw[down].shape[1] * outputs
        for end, (outputs, inputs) in FLUX1_WIDTHS.items()
        for key in raw
        if key.endswith(f"{end}.lora_up.weight") and (down := key.replace("lora_up", "lora_down")) in raw
    )


def _read_block_layer(
    name: str, group: Mapping[str, Tensor], lists: Sequence[Blocks]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The layers that the original's ``name`` stands for, under peft's names, and their alphas. Raises LoraInvalid."""
    down, up = group.get(f"{name}.lora_down.weight"), group.get(f"{name}.lora_up.weight")
    alpha = group.get(f"{name}.alpha")
    blocks = next((blocks for blocks in lists if name.startswith(f"lora_unet_{blocks.theirs}_")), None)
    known = len(group) == 2 + (alpha is not None) and (alpha is None or alpha.numel() == 1)
    if blocks is None or down is None or up is None or not known:
        raise LoraInvalid(f"unknown weights for {name!r}")
    if not down.ndim == up.ndim == 2 or down.shape[0] != up.shape[1]:
        raise LoraInvalid(f"the two weights of {name!r} do not belong together")
    index, _, layer = name.removeprefix(f"lora_unet_{blocks.theirs}_").partition("_")
    whole = {theirs: ours for ours, theirs in blocks.whole.items()}
    parts = blocks.stacks.get(layer) or ((whole[layer],) if layer in whole else ())
    if not parts or up.shape[0] % len(parts):
        raise LoraInvalid(f"unknown weights for {name!r}")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    rows_of = dict(zip(parts, original_order(layer, down, up).chunk(len(parts)), strict=True))
    # A stack of adapters has ranks for each of its parts alone, and none for those that are not adapted.
    ranks_of = {part: (rows != 0).any(0) for part, rows in rows_of.items()}
    if len(parts) == 1 or not any(bool(used.any()) for used in ranks_of.values()):
        ranks_of = dict.fromkeys(parts, torch.ones(down.shape[0], dtype=torch.bool))
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for part, used in ranks_of.items():
        if bool(used.any()):
            path = f"transformer.{blocks.ours}.{index}.{part}"
            state |= {f"{path}.lora_A.weight": down[used], f"{path}.lora_B.weight": rows_of[part][:, used]}
            alphas[path] = scale * int(used.sum())
    return state, alphas


def from_diffusers(
    raw: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights under peft's names, and the alphas of the layers for which the file tells one.

    Raises LoraInvalid for damaged metadata.
    """
    alphas = {
        key.removesuffix(".alpha"): float(tensor)
        for key, tensor in raw.items()
        if key.endswith(".alpha") and tensor.numel() == 1
    }
    state = {key: tensor for key, tensor in raw.items() if not key.endswith(".alpha")}
    state = _peft_names(state)
    return state, _alphas_from_metadata(ranks(state), metadata) | alphas


def _peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers used before peft, as peft's; others stay."""
    text = {key: tensor for key, tensor in state.items() if key.startswith("text_encoder")}
    rest = {key: tensor for key, tensor in state.items() if key not in text}
    # The type is given because diffusers guesses it from layers that a file need not have.
    return {
        **convert_unet_state_dict_to_peft(rest),
        **convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD),
    }


def ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """By ``<component>.<module path>``."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): tensor.shape[0] for key, tensor in state.items() if key.endswith(end)}


def _alphas_from_metadata(ranks: Mapping[str, int], metadata: Mapping[str, str]) -> dict[str, float]:
    """peft's settings as diffusers stores them: one JSON object, keys prefixed by component."""
    if ADAPTER_METADATA_KEY not in metadata:
        return {}
    try:
        settings = json.loads(metadata[ADAPTER_METADATA_KEY])
        return {path: alpha for path, rank in ranks.items() if (alpha := _alpha(path, rank, settings)) is not None}
    except (ValueError, TypeError, AttributeError) as exc:
        raise LoraInvalid(f"its {ADAPTER_METADATA_KEY} entry is damaged") from exc


def _alpha(full_path: str, rank: int, settings: Mapping[str, Any]) -> float | None:
    component, _, path = full_path.partition(".")
    pattern = settings.get(f"{component}.alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), path), settings.get(f"{component}.lora_alpha"))
    if alpha is None:
        return None
    # rank-stabilised LoRA divides by sqrt(rank), arXiv:2312.03732
    return float(alpha) * (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else 1.0)
