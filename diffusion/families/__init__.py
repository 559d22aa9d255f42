"""The model families, and choosing one for a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from diffusion.errors import ModelNotFound, UnsupportedModel
from diffusion.families.base import Family, LoraTargets, TextEmbeds
from diffusion.families.sd1 import StableDiffusion1

__all__ = ["Family", "LoraTargets", "StableDiffusion1", "TextEmbeds", "load_family"]

FAMILIES: dict[str, type[Family]] = {"StableDiffusionPipeline": StableDiffusion1}
"""By ``_class_name`` in ``model_index.json``."""


def load_family(model_path: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> Family:
    """The family of a local diffusers folder, loaded. Nothing is ever downloaded.

    Raises ModelNotFound, UnsupportedModel.
    """
    folder = Path(model_path)
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelNotFound("model_index.json") from exc
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise UnsupportedModel(f"pipeline class {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name].load(folder, device=torch.device(device), dtype=dtype)
