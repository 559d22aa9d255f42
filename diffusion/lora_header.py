"""A LoRA file judged by its header: names, shapes and metadata. No tensor is read, and torch is not needed.

What is refused here would be refused when a picture is asked for; what is not may still be, where it takes the weights
or a model to tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.family_layers import FAMILY_LAYERS, has_layer
from diffusion.layer_names import LayerNames, component_of
from diffusion.lora_keys import (
    ALPHA,
    DORA_SCALE,
    LOHA,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    check_parts,
    has_underscores,
    inputs_scaled,
    modules_of,
    scales_inputs,
    shown,
    target_of,
)
from diffusion.lora_settings import settings_of

Shape = Sequence[int]


@dataclass(frozen=True)
class LoraHeader:
    """``modules``: outputs and inputs (times the kernel) by the file's name of each layer. ``rank`` is the largest.

    ``families`` are those of ``FAMILY_LAYERS`` whose models may have all of the layers. ``without_alpha``: a layer
    whose alpha is said neither beside it nor in the metadata, None where there is none.
    """

    modules: Mapping[str, tuple[int, int]]
    rank: int
    families: tuple[str, ...]
    has_underscores: bool
    without_alpha: str | None


def judge(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> LoraHeader:
    """By the file's keys. Raises LoraInvalid for a file that no family's model could take."""
    modules = modules_of(shapes)
    if not modules:
        raise LoraInvalid("it holds no LoRA weights")
    settings = settings_of(metadata)
    found: dict[str, tuple[int, int]] = {}
    for module, parts in modules.items():
        check_parts(module, parts)
        found[module] = _sides(module, parts)
        _check_beside(module, parts, outs=found[module][0])
    _check_distinct(modules)
    return LoraHeader(
        modules=found,
        rank=max(_rank(parts) for parts in modules.values()),
        families=_families(list(modules)),
        has_underscores=all(map(has_underscores, modules)),
        without_alpha=None
        if any(key.endswith("lora_alpha") for key in settings)
        else next((name for name, parts in modules.items() if LORA_A in parts and ALPHA not in parts), None),
    )


def check_fit(header: LoraHeader, model: Mapping[str, LayerNames]) -> None:
    """``model`` by component, as ``model_layers`` gives it. Raises LoraMismatch."""
    for module, (outs, ins) in header.modules.items():
        component, path = component_of(module, list(model))
        shape = model[component].shape(path)
        if shape is None:
            raise LoraMismatch(f"this model has no layer {shown(module)}")
        if (outs, ins) != (shape[0], prod(shape[1:])):
            raise LoraMismatch(f"layer {shown(module)} is {tuple(shape)}, the LoRA was made for {outs, ins}")


def _sides(module: str, parts: Mapping[str, Shape]) -> tuple[int, int]:
    """Outputs and inputs of the layer that the module was made for. Raises LoraInvalid."""
    weights = {part: shape for part, shape in parts.items() if part not in (ALPHA, DORA_SCALE, MAGNITUDE)}
    if LORA_A in weights:
        down, up = weights[LORA_A], weights[LORA_B]
        if len(down) not in (2, 4) or len(up) not in (2, 4) or down[0] != up[1] or down[0] == 0:
            raise LoraInvalid(f"the two weights of {shown(module)} do not belong together")
        return up[0], prod(down[1:])
    if any(len(shape) < 2 for shape in weights.values()):
        raise LoraInvalid(f"a weight of {shown(module)} is not a matrix")
    if LOHA[0] in weights:
        return weights["hada_w1_a"][0], prod(weights["hada_w1_b"][1:])
    (o1, i1), (o2, i2) = (_matrix(weights, name) for name in ("lokr_w1", "lokr_w2"))
    return o1 * o2, i1 * i2


def _check_beside(module: str, parts: Mapping[str, Shape], *, outs: int) -> None:
    """What a layer has beside its matrices. Raises LoraInvalid."""
    if prod(parts.get(ALPHA, ())) != 1:
        raise LoraInvalid(f"the alpha of {shown(module)} is not one number")
    if DORA_SCALE in parts and scales_inputs(parts[DORA_SCALE]):
        raise inputs_scaled(module)
    if any(prod(parts[part]) != outs for part in (DORA_SCALE, MAGNITUDE) if part in parts):
        raise LoraInvalid(f"the DoRA magnitude of {shown(module)} is not one number per output of its layer")


def _matrix(weights: Mapping[str, Shape], name: str) -> tuple[int, int]:
    if name in weights:
        return weights[name][0], prod(weights[name][1:])
    return weights[f"{name}_a"][0], prod(weights[f"{name}_b"][1:])


def _rank(parts: Mapping[str, Shape]) -> int:
    """The rank that the trainer was told; 1 for a LoKr of whole matrices."""
    downs = (parts[part][0] for part in (LORA_A, "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if part in parts)
    return max(downs, default=1)


def _check_distinct(modules: Mapping[str, object]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for module in modules:
        target = target_of(module)
        other = seen.setdefault((target.component, target.path.replace(".", "_")), module)
        if other != module:
            raise LoraInvalid(f"{shown(module)} and {shown(other)} in it are for one layer")


def _families(modules: Sequence[str]) -> tuple[str, ...]:
    """Those that have every module's layer. Raises LoraInvalid where there is none."""
    left = set(FAMILY_LAYERS)
    of = {module: {family for family in FAMILY_LAYERS if _has(family, module)} for module in modules}
    for module, families in of.items():
        if not families:
            raise LoraInvalid(f"none of the models that are known here has a layer {shown(module)}")
        if not left & families:
            other = next((name for name, others in of.items() if not others & families), modules[0])
            raise LoraInvalid(f"{shown(other)} and {shown(module)} in it are layers of different models")
        left &= families
    return tuple(family for family in FAMILY_LAYERS if family in left)


def _has(family: str, module: str) -> bool:
    try:
        component, path = component_of(module, list(FAMILY_LAYERS[family]))
    except LoraMismatch:
        return False
    return has_layer(family, component, path)
