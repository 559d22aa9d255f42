"""Which noise levels are trained, in the `train` section of an ai-toolkit config."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader


def read_timesteps(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> None:
    at = f"{path}.timestep_type"
    written = train.get("timestep_type", "sigmoid")
    kind = reader.choice(written, at, values.TIMESTEP_TYPES)
    if kind is not None:
        weighting = values.LOSS_WEIGHTINGS.get(written.lower(), "none")
        if _is_linear(reader, train, path, family):
            kind = "linear"
            weighting = "bell" if weighting == "none" else weighting
        reader.put("train.timesteps.kind", kind, at)
        reader.put("train.timesteps.weighting", weighting, at)
    bias = reader.choice(train.get("content_or_style", "balanced"), f"{path}.content_or_style", values.BIASES)
    if bias is not None:
        reader.put("train.timesteps.bias", bias, f"{path}.content_or_style")
    for key, target in {"min_denoising_steps": "first", "max_denoising_steps": "last"}.items():
        if key in train:
            value = train[key]
            # 1000 is a usual way to write "to the end".
            reader.put(f"train.timesteps.{target}", 999 if value == 1000 else value, f"{path}.{key}")
    _noise_scheduler(reader, train, path, family)


def _is_linear(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> bool:
    """Whether `linear_timesteps` is on, which also weighs the loss; only flow-matching models know either."""
    at = f"{path}.linear_timesteps"
    if "linear_timesteps" not in train or not reader.flag(train["linear_timesteps"], at):
        return False
    if family is not None and family not in values.FLOW_FAMILIES:
        reader.warn(at, "has no effect on this model: it is for flow-matching ones")
    else:
        reader.warn(at, "also makes the loss count less at both ends of the way from noise to picture")
    return True


def _noise_scheduler(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> None:
    at = f"{path}.noise_scheduler"
    noise = reader.choice(train.get("noise_scheduler", "ddpm"), at, values.NOISE_SCHEDULERS)
    if "noise_scheduler" in train and family is not None and (noise == "flow") != (family in values.FLOW_FAMILIES):
        reader.warn(at, "is for other models; this one is trained with its own noise")
