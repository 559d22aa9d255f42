"""LoRA files: safetensors only, in and out.

In memory a LoRA has one form whatever the file's: keys ``<component>.<module path>.lora_A.weight`` and
``.lora_B.weight`` (what diffusers writes), and one alpha per module. A layer's effect is
``scale * alpha / rank * B @ A``; with a magnitude (DoRA, Liu et al. 2024, arXiv:2402.09353) the rows of the changed
weight are then scaled to that norm. LoHa and LoKr become such pairs when they are read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.lycoris import expand
from diffusion.quantized import weight_shape

logger = logging.getLogger(__name__)

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
    """A read file. ``state`` has diffusers key names; ``alphas`` is keyed by ``<component>.<module path>``."""

    state: Mapping[str, Tensor]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    source_format: LoraFormat
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(_ranks(self.state).values())

    def layers(self) -> dict[str, LoraLayer]:
        """By ``<component>.<module path>``."""
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
    if raw and all(key.startswith(KOHYA_PREFIXES) for key in raw):
        state, alphas, paths = _from_kohya(expand(weights, down="lora_down.weight", up="lora_up.weight"))
        if magnitudes and not paths:
            raise LoraInvalid("DoRA under kohya's names is supported for SD 1.x and SDXL only")
        magnitudes = {paths[name]: tensor for name, tensor in magnitudes.items() if name in paths}
        source_format: LoraFormat = "kohya"
    else:
        weights = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights.items()}
        magnitudes = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in magnitudes.items()}
        state, alphas = _from_diffusers(expand(weights, down="lora_A.weight", up="lora_B.weight"), metadata)
        source_format = "diffusers"
    _check_pairs(state)
    _check_magnitudes(state, magnitudes)
    alphas = {path: alphas.get(path, float(rank)) for path, rank in _ranks(state).items()}
    return LoraFile(state, alphas, metadata, source_format, magnitudes)


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
    expanded = expand(weights, down="lora_A.weight", up="lora_B.weight")
    weights = {key: tensor for key, tensor in expanded.items() if not key.endswith(".alpha")}
    _check_pairs(weights)
    _check_magnitudes(weights, magnitudes)
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
    """The layers by component, then by that module's own path names. Raises LoraMismatch unless every layer fits.

    A file that names no component, as peft saves a single module, is for the first. The weights get the shapes of the
    layers' own: a flat convolution pair its kernel's.
    """
    fitted: dict[str, dict[str, LoraLayer]] = {}
    for full_path, layer in lora.layers().items():
        component, _, path = full_path.partition(".")
        if component not in components:
            component, path = _without_component(full_path, components)
        path = _own_path(path, components[component])
        fitted.setdefault(component, {})[path] = _shaped(path, layer, components[component])
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


def _from_kohya(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """Module by module, so that each alpha stays with its module; the naming rules are diffusers' own.

    The third part gives each of the file's module names its path. It is empty for a transformer, and so are the alphas:
    its reader takes whole files, cuts joined layers up and multiplies the weights by alpha / rank.
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


def _from_diffusers(
    raw: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    alphas = {
        key.removesuffix(".alpha"): float(tensor)
        for key, tensor in raw.items()
        if key.endswith(".alpha") and tensor.numel() == 1
    }
    state = {key: tensor for key, tensor in raw.items() if not key.endswith(".alpha")}
    state = _peft_names(state)
    return state, _alphas_from_metadata(_ranks(state), metadata) | alphas


def _peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that diffusers used before peft, as peft's; others stay."""
    text = {key: tensor for key, tensor in state.items() if key.startswith("text_encoder")}
    rest = {key: tensor for key, tensor in state.items() if key not in text}
    # The type is given because diffusers guesses it from layers that a file need not have.
    return {
        **convert_unet_state_dict_to_peft(rest),
        **convert_state_dict_to_peft(text, original_type=StateDictType.DIFFUSERS_OLD),
    }


def _ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
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


def _check_pairs(state: Mapping[str, Tensor]) -> None:
    """Every module has an A and a B of one rank, finite and floating; there is at least one."""
    paths = set()
    for key, tensor in state.items():
        path, end = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight"), key[-14:]
        if end not in (".lora_A.weight", ".lora_B.weight") or "." not in path:
            raise LoraInvalid(f"unknown weight name {key!r}")
        if not tensor.is_floating_point() or tensor.ndim not in (2, 4) or not bool(torch.isfinite(tensor).all()):
            raise LoraInvalid(f"weight {key!r} is not a matrix of finite numbers")
        paths.add(path)
    if not paths:
        raise LoraInvalid("it holds no LoRA weights")
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
    module = component.get_submodule(path)
    module = getattr(module, "base_layer", module)  # already carries another adapter
    if not isinstance(module, nn.Linear | nn.Conv2d):
        raise LoraMismatch(f"layer {path!r} cannot carry a LoRA")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise LoraMismatch(f"layer {path!r} is a grouped convolution")
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
