"""Optimizers by name, and their state as plain tensors and numbers."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train_jobs.spec import OptimizerSpec

RATIO = "ratio"
"""In a parameter group: its learning rate as a part of the training's."""
GROUP_STATE = frozenset({"k", "d", "d0", "d_max", "d_hat", "d_numerator", "d_denom"})
"""What Prodigy keeps in its parameter groups from step to step."""


@dataclass
class OptimizerState:
    """`tensors` and `numbers` by `<slot>.<parameter>`; `group` holds the first group's running numbers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    group: dict[str, float] = field(default_factory=dict)


def make_optimizer(
    spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter], rate: float, ratio_of: Callable[[str], float]
) -> torch.optim.Optimizer:
    """One group for each learning-rate ratio. `adamw8bit` is AdamW where bitsandbytes or CUDA are missing."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(ratio_of(name), []).append(parameter)
    listed = [{"params": members, RATIO: ratio} for ratio, members in groups.items()]
    on_gpu = any(parameter.is_cuda for parameter in parameters.values())
    return _make(spec, listed, rate, on_gpu=on_gpu)


def _make(spec: OptimizerSpec, groups: list[dict[str, Any]], rate: float, *, on_gpu: bool) -> torch.optim.Optimizer:
    common = {"lr": rate, "weight_decay": spec.weight_decay}
    betas = {"betas": (spec.beta1, spec.beta2)}
    usual: dict[str, Any] = common | betas | {"eps": spec.eps}
    if spec.type == "adafactor":
        # The rate is ours to schedule: neither relative to the step nor scaled by the weights.
        own = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return _found("transformers.optimization", "Adafactor", groups, common | own)
    if spec.type == "prodigy":
        return _found("prodigyopt", "Prodigy", groups, usual | {"d_coef": spec.d_coef})
    if spec.type == "lion":
        return _found("lion_pytorch", "Lion", groups, common | betas)
    if spec.type == "adamw8bit" and on_gpu and has_8bit():
        return _found("bitsandbytes.optim", "AdamW8bit", groups, usual)
    if spec.type == "adam":
        return torch.optim.Adam(groups, **usual)
    return torch.optim.AdamW(groups, **usual)


def _found(module: str, name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """An optimizer of a package that is imported only when it is asked for."""
    made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(groups, **options)
    return made


def has_8bit() -> bool:
    """Whether this machine can run bitsandbytes' optimizers."""
    return torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATIO]


def read_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """A copy on the CPU."""
    state = OptimizerState()
    for name, parameter in parameters.items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state.tensors[f"{slot}.{name}"] = value.detach().cpu().clone()
            elif isinstance(value, int | float):
                state.numbers[f"{slot}.{name}"] = value
    first = optimizer.param_groups[0]
    state.group = {key: float(value) for key, value in first.items() if key in GROUP_STATE}
    return state


def write_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    """Continue from `state`. A step counter that is a tensor stays on the CPU, where torch wants it."""
    slots: dict[str, dict[str, Any]] = {}
    for key, tensor in state.tensors.items():
        slot, _, name = key.partition(".")
        slots.setdefault(name, {})[slot] = tensor.clone() if slot == "step" else tensor.to(parameters[name].device)
    for key, number in state.numbers.items():
        slot, _, name = key.partition(".")
        slots.setdefault(name, {})[slot] = number
    for name, values in slots.items():
        optimizer.state[parameters[name]] = values
    for group in optimizer.param_groups:
        group.update({key: type(group[key])(value) for key, value in state.group.items() if group.get(key) is not None})
        group.update({key: value for key, value in state.group.items() if group.get(key) is None})
