"""Which noise levels are trained, in the `train` section of an ai-toolkit config."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader


def read_timesteps(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> None:
    kind = reader.choice(train.get("timestep_type", "sigmoid"), f"{path}.timestep_type", values.TIMESTEP_TYPES)
    if "linear_timesteps" in train and reader.flag(train["linear_timesteps"], f"{path}.linear_timesteps"):
        kind = "linear"
    if kind is not None:
        reader.put("train.timesteps.kind", kind, f"{path}.timestep_type")
    bias = reader.choice(train.get("content_or_style", "balanced"), f"{path}.content_or_style", values.BIASES)
    if bias is not None:
        reader.put("train.timesteps.bias", bias, f"{path}.content_or_style")
    for key, target in {"min_denoising_steps": "first", "max_denoising_steps": "last"}.items():
        if key in train:
            value = train[key]
            # 1000 is a usual way to write "to the end".
            reader.put(f"train.timesteps.{target}", 999 if value == 1000 else value, f"{path}.{key}")
    at = f"{path}.noise_scheduler"
    noise = reader.choice(train.get("noise_scheduler", "ddpm"), at, values.NOISE_SCHEDULERS)
    if "noise_scheduler" in train and family is not None and (noise == "flow") != (family in values.FLOW_FAMILIES):
        reader.warn(at, "is for other models; this one is trained with its own noise")
