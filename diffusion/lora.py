"""LoRA files: safetensors only, in and out.

In memory a LoRA has one form whatever the file's: keys ``<module>.lora_A.weight`` and ``.lora_B.weight``, and one alpha
per module. A module's name stays what the file calls it, ``<component>.<module path>`` in diffusers' files, until
``diffusion.lora_fit`` finds its layer in a model. A layer's effect is ``scale * alpha / rank * B @ A``; with a
magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353) the rows of the changed weight are then scaled to that norm. LoHa
and LoKr become such pairs when they are read, but for the Kronecker products whose pair would be too large.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion.errors import LoraInvalid
from diffusion.lora_alphas import alphas_from_metadata, ranks
from diffusion.lora_keys import (
    ALPHA,
    DORA_SCALE,
    LOHA,
    LOKR,
    MAGNITUDE,
    PAIR,
    check_parts,
    has_underscores,
    inputs_scaled,
    modules_of,
    plain_name,
    scales_inputs,
    shown,
    target_of,
)
from diffusion.lycoris import Kronecker, expand, take_products

logger = logging.getLogger(__name__)

_MAGNITUDES = (DORA_SCALE, MAGNITUDE)
LoraFormat = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraLayer:
    """One adapted module: ``A`` is ``[rank, in, ...]``, ``B`` is ``[out, rank, ...]`` (with kernel sides for conv).

    ``magnitude`` is ``[out]``, only for DoRA.
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """A read file. ``state`` has the weights of the pairs under peft's names; the others are by module.

    ``source_format`` is kohya for names with underscores in the place of dots.
    """

    state: Mapping[str, Tensor]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    source_format: LoraFormat
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Kronecker] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its pairs; 0 where it has products alone."""
        return max(ranks(self.state).values(), default=0)

    @property
    def modules(self) -> list[str]:
        """Their names, those of pairs first."""
        return [*self.alphas, *self.products]

    def layers(self) -> dict[str, LoraLayer]:
        """Its pairs, by module."""
        return {
            path: LoraLayer(
                self.state[f"{path}.lora_A.weight"],
                self.state[f"{path}.lora_B.weight"],
                alpha,
                self.magnitudes.get(path),
            )
            for path, alpha in self.alphas.items()
        }


def read_lora(path: Path) -> LoraFile:
    """Read and check one file. Raises LoraInvalid; pickle formats (.ckpt, .pt, .bin) are refused unopened."""
    return _interpreted(*_read_safetensors(Path(path)))


def read_factors(path: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of a LoKr or LoHa file by module and part, without alphas. Raises LoraInvalid for any other file."""
    raw, _ = _read_safetensors(Path(path))
    factors = {
        plain_name(module): {part: tensor for part, tensor in parts.items() if part != ALPHA}
        for module, parts in modules_of(raw).items()
    }
    if not factors or not all(parts and parts.keys() <= {*LOKR, *LOHA} for parts in factors.values()):
        raise LoraInvalid("it holds no LoKr or LoHa weights")
    return factors


def save_lora(
    path: Path, state_dict: Mapping[str, Tensor], *, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write atomically (beside it, then renamed). ``dtype`` casts the weights; None keeps them.

    ``stock_pipeline.load_lora_weights(path)`` reads the result; alpha different from rank needs
    ``ADAPTER_METADATA_KEY`` in ``metadata`` (``TrainableLora.metadata`` makes it). Raises LoraInvalid for a state that
    ``read_lora`` would refuse.
    """
    path = Path(path)
    _check_suffix(path)
    _interpreted(state_dict, {})
    tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state_dict.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from another user's uploader
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# -- reading


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() != ".safetensors":
        raise LoraInvalid("only .safetensors files are accepted; pickle formats can run code when opened")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _check_suffix(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, dict(file.metadata() or {})
    except FileNotFoundError as exc:
        raise LoraInvalid("the file does not exist") from exc
    except (SafetensorError, OSError, UnicodeDecodeError) as exc:
        logger.info("unreadable safetensors file: %s", type(exc).__name__)
        raise LoraInvalid("damaged, or not really a safetensors file") from exc


def _interpreted(raw: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoraFile:
    """Raises LoraInvalid."""
    modules: dict[str, dict[str, Tensor]] = {}
    for module, parts in modules_of(raw).items():
        check_parts(module, parts)
        target_of(module)
        if plain_name(module) in modules:
            raise LoraInvalid(f"it adapts a layer twice: {shown(module)}")
        modules[plain_name(module)] = parts
    if not modules:
        raise LoraInvalid("it holds no LoRA weights")
    scales = {name: (part, parts[part]) for name, parts in modules.items() for part in _MAGNITUDES if part in parts}
    weights = {
        f"{name}.{part}.weight" if part in PAIR else f"{name}.{part}": tensor
        for name, parts in modules.items()
        for part, tensor in parts.items()
        if part not in _MAGNITUDES
    }
    weights, products = take_products(weights, but_not=scales.keys())
    expanded = expand(weights, down="lora_A.weight", up="lora_B.weight")
    state = {key: tensor for key, tensor in expanded.items() if not key.endswith(f".{ALPHA}")}
    _check_pairs(state)
    _check_products(products)
    alphas = alphas_from_metadata(ranks(state), metadata) | _alphas(expanded)
    return LoraFile(
        state=state,
        alphas={name: alphas.get(name, float(rank)) for name, rank in ranks(state).items()},
        metadata=metadata,
        source_format="kohya" if all(map(has_underscores, modules)) else "diffusers",
        magnitudes={name: _magnitude(name, *scale, state) for name, scale in scales.items()},
        products=products,
    )


def _alphas(weights: Mapping[str, Tensor]) -> dict[str, float]:
    found = {key.removesuffix(f".{ALPHA}"): tensor for key, tensor in weights.items() if key.endswith(f".{ALPHA}")}
    for name, tensor in found.items():
        if tensor.numel() != 1 or not bool(torch.isfinite(tensor).all()):
            raise LoraInvalid(f"the alpha of {shown(name)} is not one number")
    return {name: float(tensor) for name, tensor in found.items()}


def _check_pairs(state: Mapping[str, Tensor]) -> None:
    """Every module's A and B are of one rank, finite and floating."""
    for key, tensor in state.items():
        if not tensor.is_floating_point() or tensor.ndim not in (2, 4) or not bool(torch.isfinite(tensor).all()):
            raise LoraInvalid(f"weight {shown(key)} is not a matrix of finite numbers")
    for name in ranks(state):
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        if a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise LoraInvalid(f"the two weights of {shown(name)} do not belong together")


def _check_products(products: Mapping[str, Kronecker]) -> None:
    for name, product in products.items():
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (product.w1, product.w2)):
            raise LoraInvalid(f"a weight of {shown(name)} is not a matrix of finite numbers")


def _magnitude(name: str, part: str, scale: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """``[out]``. Raises LoraInvalid."""
    if part == DORA_SCALE and scales_inputs(scale.shape):
        raise inputs_scaled(name)
    b = state[f"{name}.lora_B.weight"]
    if scale.numel() != b.shape[0]:
        raise LoraInvalid(f"the DoRA magnitude of {shown(name)} is not one number per output of its layer")
    if not scale.is_floating_point() or not bool(torch.isfinite(scale).all()):
        raise LoraInvalid(f"the DoRA magnitude of {shown(name)} is not made of finite numbers")
    return scale.flatten()
