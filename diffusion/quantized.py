"""Frozen weights in 8 bits, through torchao, which is imported only where it is asked for.

Only the weights of linear layers are rounded; they are widened again where they are multiplied, so gradients flow
through them to an adapter. ``float8`` and ``int8`` take one byte a weight, and so does ``int4``, whose values are
rounded to 16 levels in groups of 32: torchao's packed kernels for it take no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from diffusion.errors import SettingNotSupported

Weights = Literal["float8", "int8", "int4"]
INT4_GROUP = 32
SETTING = "model.quantize"


@dataclass(frozen=True)
class Quantization:
    """What is rounded to what; None leaves it. Layers whose name matches a pattern of ``exclude`` are left, too."""

    denoiser: Weights | None = None
    text_encoders: Weights | None = None
    exclude: tuple[str, ...] = ()

    def apply(self, part: str, module: nn.Module) -> None:
        """Round the weights of a model's part as it was read; the VAE is left. Raises SettingNotSupported."""
        wanted = self.text_encoders if part.startswith("text_encoder") else self.denoiser
        if wanted is not None and part != "vae":
            quantize(module, wanted, self.exclude)


def check_quantization() -> None:
    """Raises SettingNotSupported where torchao is missing."""
    if find_spec("torchao") is None:
        raise SettingNotSupported(
            SETTING, "the training node lacks torchao; install raylora[quantized] there, or set it to false"
        )


def quantize(module: nn.Module, weights: Weights, exclude: Sequence[str] = ()) -> None:
    """In place. Raises SettingNotSupported where torchao is missing or finds nothing that it can round."""
    check_quantization()
    from torchao.quantization import quantize_

    def chosen(layer: nn.Module, name: str) -> bool:
        if not isinstance(layer, nn.Linear) or any(fnmatchcase(name, pattern) for pattern in exclude):
            return False
        return weights != "int4" or layer.in_features % INT4_GROUP == 0

    if not any(chosen(layer, name) for name, layer in module.named_modules()):
        raise SettingNotSupported(SETTING, f"the model has no layer that can be rounded to {weights}")
    quantize_(module, _config(weights), filter_fn=chosen)


def _config(weights: Weights) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    if weights == "float8":
        return Float8WeightOnlyConfig()
    if weights == "int8":
        return Int8WeightOnlyConfig()
    # torch's annotations leave out the types of less than a byte.
    int4 = torch.int4  # type: ignore[attr-defined]
    return IntxWeightOnlyConfig(
        weight_dtype=int4, granularity=PerGroup(INT4_GROUP), mapping_type=MappingType.ASYMMETRIC
    )
