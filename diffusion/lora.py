"""LoRA files: safetensors only, in and out.

In memory a LoRA has one form whatever the file's: keys ``<component>.<module path>.lora_A.weight`` and
``.lora_B.weight`` (what diffusers writes), and one alpha per module. A layer's effect is
``scale * alpha / rank * B @ A``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
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

logger = logging.getLogger(__name__)

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Metadata entry in which diffusers keeps peft's settings; without it a reader takes alpha = rank."""
KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
UNSUPPORTED_KEYS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "Tucker LoCon",
}  # fmt: skip
LoraFormat = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoraLayer:
    """One adapted module: ``A`` is ``[rank, in, ...]``, ``B`` is ``[out, rank, ...]`` (with kernel sides for conv)."""

    A: Tensor
    B: Tensor
    alpha: float

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

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(_ranks(self.state).values())

    def layers(self) -> dict[str, LoraLayer]:
        """By ``<component>.<module path>``."""
        return {
            path: LoraLayer(self.state[f"{path}.lora_A.weight"], self.state[f"{path}.lora_B.weight"], alpha)
            for path, alpha in self.alphas.items()
        }


def read_lora(path: Path) -> LoraFile:
    """Read and check one file. Raises LoraInvalid; pickle formats (.ckpt, .pt, .bin) are refused unopened."""
    raw, metadata = _read_safetensors(Path(path))
    for mark, kind in UNSUPPORTED_KEYS.items():
        if any(mark in key for key in raw):
            raise LoraInvalid(f"{kind} is not supported")
    alphas: dict[str, float]
    source_format: LoraFormat
    if all(key.startswith(KOHYA_PREFIXES) for key in raw):
        state, alphas = _from_kohya(raw)
        source_format = "kohya"
    else:
        state, alphas = _from_diffusers(raw, metadata)
        source_format = "diffusers"
    _check_pairs(state)
    alphas = {path: alphas.get(path, float(rank)) for path, rank in _ranks(state).items()}
    return LoraFile(state, alphas, metadata, source_format)


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
    _check_pairs(state_dict)
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
    """The layers by component, then by that module's own path names. Raises LoraMismatch unless every layer fits."""
    fitted: dict[str, dict[str, LoraLayer]] = {}
    for full_path, layer in lora.layers().items():
        component, _, path = full_path.partition(".")
        if component not in components:
            raise LoraMismatch(f"it adapts {component!r}, which this model does not have")
        path = _own_path(path, components[component])
        _check_shape(path, layer, components[component])
        fitted.setdefault(component, {})[path] = layer
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


def _from_kohya(raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Module by module, so that each alpha stays with its module; the naming rules are diffusers' own."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in raw.items():
        groups.setdefault(key.partition(".")[0], {})[key] = tensor
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for group in groups.values():
        converted, alpha = _convert_kohya_module(group)
        state.update(converted)
        if alpha is not None:
            alphas[next(iter(converted)).rpartition(".lora_")[0]] = alpha
    return state, alphas


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


# -- fitting


def _own_path(path: str, component: nn.Module) -> str:
    """``path`` as this module spells it: transformers 5 dropped CLIP's ``text_model.`` level, older files have it."""
    for candidate in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            component.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise LoraMismatch(f"this model has no layer {path!r}")


def _check_shape(path: str, layer: LoraLayer, component: nn.Module) -> None:
    module = component.get_submodule(path)
    module = getattr(module, "base_layer", module)  # already carries another adapter
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Conv2d) or not isinstance(weight, Tensor):
        raise LoraMismatch(f"layer {path!r} cannot carry a LoRA")
    expected = (weight.shape[0], weight.shape[1], weight.ndim)
    found = (layer.B.shape[0], layer.A.shape[1], layer.A.ndim)
    if found != expected or layer.A.shape[2:] != weight.shape[2:]:
        raise LoraMismatch(f"layer {path!r} is {tuple(weight.shape)}, the LoRA was made for {found[:2]}")
