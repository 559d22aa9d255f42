"""The model families, and choosing one for a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from diffusion.errors import ModelNotFound, UnsupportedModel
from diffusion.families.base import ALL_LEVELS, Family, LoraTargets, NoiseLevels, TextEmbeds
from diffusion.families.flux1 import Flux1
from diffusion.families.flux2 import Flux2Dev, Flux2Klein
from diffusion.families.parts import quantized
from diffusion.families.qwen_image import QwenImage
from diffusion.families.sd1 import StableDiffusion1
from diffusion.families.sd3 import StableDiffusion3
from diffusion.families.sdxl import StableDiffusionXL
from diffusion.families.z_image import ZImage
from diffusion.quantized import Quantization

__all__ = [
    "ALL_LEVELS",
    "FAMILIES",
    "Family",
    "Flux1",
    "Flux2Dev",
    "Flux2Klein",
    "LoraTargets",
    "NoiseLevels",
    "QwenImage",
    "StableDiffusion1",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TextEmbeds",
    "ZImage",
    "family_of",
    "load_family",
]

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion1,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux1,
    "Flux2KleinPipeline": Flux2Klein,
    "Flux2Pipeline": Flux2Dev,
    "QwenImagePipeline": QwenImage,
    "ZImagePipeline": ZImage,
}
"""By ``_class_name`` in ``model_index.json``."""


def family_of(folder: Path) -> type[Family]:
    """The family of a local diffusers folder. Raises ModelNotFound, UnsupportedModel."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelNotFound("model_index.json") from exc
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise UnsupportedModel(f"pipeline class {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load_family(
    model_path: str | Path, *, device: torch.device | str, dtype: torch.dtype, quantization: Quantization | None = None
) -> Family:
    """The family of a local diffusers folder, loaded. Nothing is ever downloaded.

    Raises ModelNotFound, UnsupportedModel, and with ``quantization`` SettingNotSupported.
    """
    folder = Path(model_path)
    family = family_of(folder)
    with quantized(quantization):
        return family.load(folder, device=torch.device(device), dtype=dtype)
