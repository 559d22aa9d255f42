"""Key names and alphas of LoRA files: kohya's, peft's and diffusers' forms become the one of ``diffusion.lora``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_conversion_utils import (
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

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Metadata entry in which diffusers keeps peft's settings; without it a reader takes alpha = rank."""
KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
TRANSFORMER_READERS = {
    ("lora_unet_double_blocks_", "lora_unet_single_blocks_"): _convert_kohya_flux_lora_to_diffusers,
    ("lora_unet_transformer_blocks_",): _convert_non_diffusers_qwen_lora_to_diffusers,
    ("lora_unet_layers_", "lora_unet_noise_refiner_", "lora_unet_context_refiner_"):
        _convert_non_diffusers_z_image_lora_to_diffusers,
}  # fmt: skip
"""kohya's names of FLUX.1's, Qwen-Image's and Z-Image's blocks. Theirs begin with lora_unet too."""


def from_kohya(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """Module by module, so that each alpha stays with its module; the naming rules are diffusers' own.

    The weights under peft's names, the alphas, and the path of each of the file's module names. The last two are empty
    for a transformer: its reader takes whole files, cuts joined layers up and multiplies the weights by alpha / rank.
    Raises LoraInvalid.
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
