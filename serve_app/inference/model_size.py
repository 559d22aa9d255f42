"""How much memory a model folder's weights will take, from the headers of its files. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusion.families import family_of
from diffusion.quantized import Quantization, Weights

ROUNDED_BYTES: dict[Weights, float] = {"float8": 1.0, "int8": 1.0, "int4": 1.0, "nf4": 0.5 + 4 / 64}
"""For one weight; nf4's with a float32 scale for every block of 64."""
EMBEDDINGS = {"token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias"}
"""Modules whose matrices are no linear layer's, in the text encoders that there are."""
MIB = 2**20


class ModelSize:
    """Of a folder loaded in `dtype` with its linear layers rounded by `quantization`."""

    def __init__(self, dtype: torch.dtype, quantization: Quantization | None = None) -> None:
        self._dtype, self._quantization = dtype, quantization

    def whole(self, headroom_mb: int) -> Callable[[str], int]:
        """Bytes of a folder's weights, and room for their work."""
        return lambda folder: sum(self.part_bytes(folder).values()) + headroom_mb * MIB

    def largest_part(self, headroom_mb: int) -> Callable[[str], int]:
        """As `whole`, for a model of which one part at a time is on the device."""
        return lambda folder: max(self.part_bytes(folder).values(), default=0) + headroom_mb * MIB

    def part_bytes(self, folder: str) -> dict[str, int]:
        """By the name of each part that is loaded. A file whose header cannot be read counts as it is: loading it says
        what is wrong. Raises ModelNotFound, UnsupportedModel."""
        path = Path(folder).expanduser()
        parts: dict[str, dict[str, float]] = {}
        for file in (file for part in family_of(path).weights for file in (path / part).glob("*.safetensors")):
            # By tensor: a folder may hold the same weights in files of two dtypes.
            parts.setdefault(file.parent.name, {}).update(self._tensors(file))
        return {part: math.ceil(sum(sizes.values())) for part, sizes in parts.items()}

    def _tensors(self, file: Path) -> dict[str, float]:
        rounded = None if self._quantization is None else self._quantization.of(file.parent.name)
        try:
            with safe_open(file, "numpy") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return {file.name: file.stat().st_size}
        return {name: math.prod(shape) * self._element_bytes(name, shape, rounded) for name, shape in shapes.items()}

    def _element_bytes(self, name: str, shape: list[int], rounded: Weights | None) -> float:
        module, _, parameter = name.rpartition(".")
        is_linear = len(shape) == 2 and parameter == "weight" and module.rpartition(".")[2] not in EMBEDDINGS
        if rounded is None or not is_linear:
            return self._dtype.itemsize
        scale = self._dtype.itemsize / shape[1]  # one for each row
        return ROUNDED_BYTES[rounded] + scale
