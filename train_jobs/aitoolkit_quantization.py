"""The keys of an ai-toolkit config's `model` that ask for a quantised base."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader


def read_quantization(reader: ConfigReader, model: dict[str, Any], path: str) -> None:
    """`quantize_te` is as `quantize` unless it is given; a type without its switch has no effect."""
    denoiser = reader.flag(model.get("quantize", False), f"{path}.quantize")
    encoders = reader.flag(model["quantize_te"], f"{path}.quantize_te") if "quantize_te" in model else denoiser
    if denoiser:
        _put(reader, model, path, "qtype", "denoiser")
    if encoders:
        _put(reader, model, path, "qtype_te", "text_encoders")
    at = f"{path}.quantize_kwargs"
    options = reader.section(model.get("quantize_kwargs"), at, keys.QUANTIZE_KWARGS)
    if "exclude" in options:
        exclude = options["exclude"]
        reader.put("quantize.exclude", [exclude] if isinstance(exclude, str) else exclude, f"{at}.exclude")


def _put(reader: ConfigReader, model: dict[str, Any], path: str, key: str, target: str) -> None:
    chosen = reader.choice(model.get(key, "qfloat8"), f"{path}.{key}", values.QTYPES)
    if chosen is not None:
        reader.put(f"quantize.{target}", chosen, f"{path}.{key}" if key in model else f"{path}.quantize")
    if chosen == "int4":
        reader.warn(f"{path}.{key}", "is rounded to 4 bits and held in 8")
