"""The shapes of a model's layers, from the headers of its files: no weight is read, and torch is not needed."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffusion.errors import ModelNotFound, UnsupportedModel
from diffusion.family_layers import FAMILY_LAYERS, FAMILY_OF_PIPELINE, unnumbered
from diffusion.layer_names import LayerNames


def model_layers(folder: Path) -> dict[str, LayerNames]:
    """The layers of a diffusers folder that an adapter may be for, by component, the denoiser first.

    Raises ModelNotFound, UnsupportedModel.
    """
    try:
        pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelNotFound("model_index.json") from exc
    if pipeline not in FAMILY_OF_PIPELINE:
        raise UnsupportedModel(f"pipeline class {pipeline!r}")
    family = FAMILY_LAYERS[FAMILY_OF_PIPELINE[pipeline]]
    return {component: LayerNames(_shapes(folder / component, paths)) for component, paths in family.items()}


def _shapes(folder: Path, paths: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """``paths``: the layers that there may be."""
    known = {unnumbered(path) for path in LayerNames(dict.fromkeys(paths, (1, 1)))}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    path, _, end = name.rpartition(".")
                    if end == "weight" and unnumbered(path) in known:
                        shapes[path] = tuple(tensors.get_slice(name).get_shape())
    except (OSError, SafetensorError) as exc:
        raise ModelNotFound(folder.name) from exc
    if not shapes:
        raise ModelNotFound(folder.name)
    return shapes
