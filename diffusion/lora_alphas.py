"""Ranks of a LoRA file's layers, and the alphas that peft's settings in its metadata tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor

from diffusion.lora_keys import DENOISER, Target, target_of
from diffusion.lora_settings import damaged, settings_of

_DENOISERS = ("transformer.", "unet.", "")
"""What diffusers puts before a denoiser's settings; nothing where the file is of one module alone."""


def ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """By module."""
    end = ".lora_A.weight"
    return {key.removesuffix(end): tensor.shape[0] for key, tensor in state.items() if key.endswith(end)}


def alphas_from_metadata(ranks: Mapping[str, int], metadata: Mapping[str, str]) -> dict[str, float]:
    """By module, for those that the settings say something of. Raises LoraInvalid for damaged metadata."""
    settings = settings_of(metadata)
    try:
        found = {module: _alpha(target_of(module), rank, settings) for module, rank in ranks.items()}
    except (ValueError, TypeError, AttributeError) as exc:
        raise damaged() from exc
    return {module: alpha for module, alpha in found.items() if alpha is not None}


def _alpha(target: Target, rank: int, settings: Mapping[str, Any]) -> float | None:
    prefixes = _DENOISERS if target.component == DENOISER else (f"{target.component}.",)
    for prefix in prefixes:
        pattern = settings.get(f"{prefix}alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), target.path), settings.get(f"{prefix}lora_alpha"))
        if alpha is not None:
            # rank-stabilised LoRA divides by sqrt(rank), arXiv:2312.03732
            return float(alpha) * (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else 1.0)
    return None
