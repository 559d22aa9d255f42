"""Frozen weights in 8 or 4 bits, through torchao and bitsandbytes, imported only where they are asked for.

Only the weights of linear layers are rounded; they are widened again where they are multiplied, so gradients flow
through them to an adapter. ``float8`` and ``int8`` take one byte a weight, and so does ``int4``, whose values are
rounded to 16 levels in groups of 32: torchao's packed kernels for it take no gradients. ``nf4`` is bitsandbytes':
half a byte a weight, 16 levels at the quantiles of a normal distribution in blocks of 64 (arXiv:2305.14314).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.errors import SettingNotSupported

Weights = Literal["float8", "int8", "int4", "nf4"]
INT4_GROUP = 32
NF4_BLOCK = 64
SETTING = "model.quantize"
FP8_CAPABILITY = (8, 9)
"""CUDA devices below it have no arithmetic for float8, and compilers refuse it there."""
READS_ITS_DTYPE = "wo"
"""T5 casts what it multiplies to the dtype of this layer's weight, which is that of the packed bytes with ``nf4``."""


@dataclass(frozen=True)
class Quantization:
    """What is rounded to what; None leaves it. Layers whose name matches a pattern of ``exclude`` are left, too."""

    denoiser: Weights | None = None
    text_encoders: Weights | None = None
    exclude: tuple[str, ...] = ()
    setting: str = SETTING
    """What asked for it, for errors."""

    def of(self, part: str) -> Weights | None:
        """What the linear layers of a model's part become."""
        if part == "vae":
            return None
        return self.text_encoders if part.startswith("text_encoder") else self.denoiser

    def check(self, device: torch.device) -> None:
        """Before anything is loaded. Raises SettingNotSupported for what the device or the installation cannot do."""
        for weights in {self.denoiser, self.text_encoders} - {None}:
            check_quantization(weights, self.setting)
        wanted = {self.denoiser, self.text_encoders}
        if "nf4" in wanted and device.type != "cuda":
            raise SettingNotSupported(self.setting, "nf4 needs a GPU; use int8, or leave it unset")
        if "float8" not in wanted or device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise SettingNotSupported(
                self.setting, f"this GPU (compute capability {capability[0]}.{capability[1]}) has no float8; use int8"
            )

    def apply(self, part: str, module: nn.Module) -> None:
        """Round the weights of a model's part as it was read; the VAE is left. Raises SettingNotSupported."""
        wanted = self.of(part)
        if wanted is not None:
            quantize(module, wanted, self.exclude, setting=self.setting)


def check_quantization(weights: Weights | None = None, setting: str = SETTING) -> None:
    """Raises SettingNotSupported where the package that does it is missing."""
    package, extra = ("bitsandbytes", "nf4") if weights == "nf4" else ("torchao", "quantized")
    if find_spec(package) is None:
        raise SettingNotSupported(
            setting, f"the node lacks {package}; install raylora[{extra}] there, or set it to false"
        )


def quantize(module: nn.Module, weights: Weights, exclude: Sequence[str] = (), *, setting: str = SETTING) -> None:
    """In place. Raises SettingNotSupported where the package is missing or nothing can be rounded."""
    check_quantization(weights, setting)

    def chosen(layer: nn.Module, name: str) -> bool:
        if not isinstance(layer, nn.Linear) or any(fnmatchcase(name, pattern) for pattern in exclude):
            return False
        if weights == "nf4":
            own_name = name.rpartition(".")[2]
            return type(layer) is nn.Linear and own_name != READS_ITS_DTYPE and layer.in_features % NF4_BLOCK == 0
        return weights != "int4" or layer.in_features % INT4_GROUP == 0

    if not any(chosen(layer, name) for name, layer in module.named_modules()):
        raise SettingNotSupported(setting, f"the model has no layer that can be rounded to {weights}")
    if weights == "nf4":
        for name in [name for name, layer in module.named_modules() if chosen(layer, name)]:
            module.set_submodule(name, _nf4(module.get_submodule(name)))
        return
    from torchao.quantization import quantize_

    quantize_(module, _config(weights), filter_fn=chosen)


def dense_weight(layer: nn.Module) -> Tensor:
    """``[out, in, ...]``, float32, on the CPU: what a linear or convolution layer multiplies with, rounded or not."""
    parameter: Any = layer.weight
    weight: Any = parameter.detach()
    if getattr(parameter, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, parameter.quant_state)
    elif type(weight) is not Tensor:
        weight = weight.dequantize()
    dense: Tensor = weight.float().cpu()
    return dense


def weight_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """``(out, in, ...)``, which a rounded layer's own weight need not have."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def _nf4(layer: nn.Module) -> nn.Module:
    """The weight is rounded when the layer is moved to its device, the CPU included."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    if not isinstance(layer, nn.Linear):
        raise TypeError("only linear layers are rounded")
    rounded: nn.Module = Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    rounded.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    rounded.bias = layer.bias
    return rounded


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
