"""LoRA files: safetensors only, in and out.

In memory a LoRA has one form whatever the file's: keys ``<component>.<module path>.lora_A.weight`` and
``.lora_B.weight`` (what diffusers writes), and one alpha per module. A layer's effect is
``scale * alpha / rank * B @ A``; with a magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353) the rows of the changed
weight are then scaled to that norm. LoHa and LoKr become such pairs when they are read, but for the Kronecker products
whose pair would be too large.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.lora_names import KOHYA_PREFIXES, from_diffusers, from_kohya, ranks
from diffusion.lycoris import Kronecker, expand, pair_of, take_products
from diffusion.quantized import weight_shape

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
UNSUPPORTED_KEYS = {
    "lora_mid": "Tucker LoCon", "hada_t": "Tucker LoHa", "lokr_t": "Tucker LoKr", "oft_": "OFT", "boft_": "BOFT",
    "glora_": "GLoRA", "lora_embedding_": "an adapted embedding",
}  # fmt: skip
MAGNITUDE_ENDS = (".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
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
    """A read file. ``state`` has diffusers key names; the others are keyed by ``<component>.<module path>``."""

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

    def layers(self) -> dict[str, LoraLayer]:
        """Its pairs, by ``<component>.<module path>``."""
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
    raw, metadata = _read_safetensors(Path(path))
    for mark, kind in UNSUPPORTED_KEYS.items():
        if any(mark in key for key in raw):
            raise LoraInvalid(f"{kind} is not supported")
    weights, magnitudes = _without_magnitudes(raw)
    products: dict[str, Kronecker] = {}
    if raw and all(key.startswith(KOHYA_PREFIXES) for key in raw):
        state, alphas, paths = from_kohya(expand(weights, down="lora_down.weight", up="lora_up.weight"))
        if not magnitudes.keys() <= paths.keys():
            raise LoraInvalid("DoRA under kohya's names is supported for SD 1.x and SDXL only")
        magnitudes = {paths[name]: tensor for name, tensor in magnitudes.items()}
        source_format: LoraFormat = "kohya"
    else:
        weights = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
        magnitudes = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in magnitudes.items()}
        weights, products = take_products(weights, but_not=magnitudes.keys())
        state, alphas = from_diffusers(expand(weights, down="lora_A.weight", up="lora_B.weight"), metadata)
        source_format = "diffusers"
    _check_weights(state, magnitudes, products)
    alphas = {path: alphas.get(path, float(rank)) for path, rank in ranks(state).items()}
    return LoraFile(state, alphas, metadata, source_format, magnitudes, products)


def read_factors(path: Path) -> dict[str, Tensor]:
    """The weights of a LoKr or LoHa file as it names them, without alphas. Raises LoraInvalid for any other file."""
    raw, _ = _read_safetensors(Path(path))
    factors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in raw.items() if not key.endswith(".alpha")}
    if not factors or not all(key.rpartition(".")[2].startswith(("lokr_w", "hada_w")) for key in factors):
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
    weights, magnitudes = _without_magnitudes(state_dict)
    weights, products = take_products(weights, but_not=magnitudes.keys())
    expanded = expand(weights, down="lora_A.weight", up="lora_B.weight")
    pairs = {key: tensor for key, tensor in expanded.items() if not key.endswith(".alpha")}
    _check_weights(pairs, magnitudes, products)
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


def fit_layers(lora: LoraFile, components: Mapping[str, nn.Module]) -> dict[str, dict[str, LoraLayer]]:
    """The pairs by component, then by that module's own path names. Raises LoraMismatch unless every one fits.

    A file that names no component, as peft saves a single module, is for the first. The weights get the shapes of the
    layers' own: a flat convolution pair its kernel's. Products on convolutions are among them: models of one
    architecture have some projections as linear layers or as 1x1 convolutions. Raises LoraInvalid where such a one is
    too wide.
    """
    fitted: dict[str, dict[str, LoraLayer]] = {}
    layers = lora.layers()
    for full_path, product in lora.products.items():
        component, path = _placed(full_path, components)
        if not isinstance(_adaptable(path, components[component]), nn.Linear):
            A, B = pair_of(full_path, product)
            layers[full_path] = LoraLayer(A, B, float(A.shape[0]))
    for full_path, layer in layers.items():
        component, path = _placed(full_path, components)
        fitted.setdefault(component, {})[path] = _shaped(path, layer, components[component])
    return fitted


def fit_products(lora: LoraFile, components: Mapping[str, nn.Module]) -> dict[str, dict[str, Kronecker]]:
    """As ``fit_layers``, of the products on linear layers."""
    fitted: dict[str, dict[str, Kronecker]] = {}
    for full_path, product in lora.products.items():
        component, path = _placed(full_path, components)
        module = _adaptable(path, components[component])
        if not isinstance(module, nn.Linear):
            continue
        shape, made_for = weight_shape(module), (product.outs, product.ins)
        if shape != made_for:
            raise LoraMismatch(f"layer {path!r} is {shape}, the LoKr was made for {made_for}")
        fitted.setdefault(component, {})[path] = product
    return fitted


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


def _without_magnitudes(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other weights, and DoRA's magnitudes by the path that the file gives them."""
    weights: dict[str, Tensor] = {}
    magnitudes: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        end = next((end for end in MAGNITUDE_ENDS if key.endswith(end)), None)
        if end is None:
            weights[key] = tensor
        else:
            magnitudes[key.removesuffix(end)] = tensor.flatten()
    return weights, magnitudes


def _check_weights(
    state: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor], products: Mapping[str, Kronecker]
) -> None:
    if not state and not products:
        raise LoraInvalid("it holds no LoRA weights")
    _check_pairs(state)
    _check_magnitudes(state, magnitudes)
    for path, product in products.items():
        if not all(bool(torch.isfinite(matrix).all()) for matrix in (product.w1, product.w2)):
            raise LoraInvalid(f"a weight of {path!r} is not a matrix of finite numbers")


def _check_pairs(state: Mapping[str, Tensor]) -> None:
    """Every module has an A and a B of one rank, finite and floating."""
    paths = set()
    for key, tensor in state.items():
        path, end = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight"), key[-14:]
        if end not in (".lora_A.weight", ".lora_B.weight") or "." not in path:
            raise LoraInvalid(f"unknown weight name {key!r}")
        if not tensor.is_floating_point() or tensor.ndim not in (2, 4) or not bool(torch.isfinite(tensor).all()):
            raise LoraInvalid(f"weight {key!r} is not a matrix of finite numbers")
        paths.add(path)
    for path in paths:
        a, b = state.get(f"{path}.lora_A.weight"), state.get(f"{path}.lora_B.weight")
        if a is None or b is None or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise LoraInvalid(f"the two weights of {path!r} do not belong together")


def _check_magnitudes(state: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor]) -> None:
    for path, magnitude in magnitudes.items():
        b = state.get(f"{path}.lora_B.weight")
        if b is None or magnitude.numel() != b.shape[0]:
            raise LoraInvalid(f"the DoRA magnitude of {path!r} is not one number per output of its layer")
        if not magnitude.is_floating_point() or not bool(torch.isfinite(magnitude).all()):
            raise LoraInvalid(f"the DoRA magnitude of {path!r} is not made of finite numbers")


# -- fitting


def _placed(full_path: str, components: Mapping[str, nn.Module]) -> tuple[str, str]:
    """Component, and the path as that module spells it. Raises LoraMismatch."""
    component, _, path = full_path.partition(".")
    if component not in components:
        component, path = _without_component(full_path, components)
    return component, _own_path(path, components[component])


def _without_component(full_path: str, components: Mapping[str, nn.Module]) -> tuple[str, str]:
    first = next(iter(components))
    try:
        components[first].get_submodule(full_path)
    except AttributeError:
        raise LoraMismatch(f"it adapts {full_path.partition('.')[0]!r}, which this model does not have") from None
    return first, full_path


def _own_path(path: str, component: nn.Module) -> str:
    """``path`` as this module spells it: transformers 5 dropped CLIP's ``text_model.`` level, older files have it."""
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            component.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise LoraMismatch(f"this model has no layer {path!r}")


def _shaped(path: str, layer: LoraLayer, component: nn.Module) -> LoraLayer:
    """The layer's pair in the shapes of the module it adapts. Raises LoraMismatch where it is not for that module."""
    module = _adaptable(path, component)
    shape = weight_shape(module)
    if layer.A.ndim == 2 and len(shape) == 4 and layer.A.shape[1] == math.prod(shape[1:]):
        kernel = layer.A.reshape(layer.rank, *shape[1:])
        layer = replace(layer, A=kernel, B=layer.B.reshape(*layer.B.shape[:2], 1, 1))
    if len(shape) == 2 and layer.A.ndim == 4 and layer.A.shape[2:] == (1, 1):
        # Models of one architecture have these projections as 1x1 convolutions or as linear layers.
        layer = replace(layer, A=layer.A.flatten(1), B=layer.B.flatten(1))
    expected = (shape[0], shape[1], len(shape))
    found = (layer.B.shape[0], layer.A.shape[1], layer.A.ndim)
    if found != expected or layer.A.shape[2:] != shape[2:]:
        raise LoraMismatch(f"layer {path!r} is {shape}, the LoRA was made for {found[:2]}")
    return layer


def _adaptable(path: str, component: nn.Module) -> nn.Linear | nn.Conv2d:
    """Raises LoraMismatch for a layer that can carry no adapter."""
    module = component.get_submodule(path)
    module = getattr(module, "base_layer", module)  # already carries another adapter
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise LoraMismatch(f"layer {path!r} cannot carry a LoRA")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise LoraMismatch(f"layer {path!r} is a grouped convolution")
    return module
