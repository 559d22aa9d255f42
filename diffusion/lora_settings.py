"""peft's settings in a LoRA file's metadata, as diffusers keeps them. Without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusion.errors import LoraInvalid

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Metadata entry in which diffusers keeps peft's settings; without it a reader takes alpha = rank."""


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """One object, its keys prefixed by component; empty where there is no such entry. Raises LoraInvalid: damaged."""
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA_KEY, "{}"))
    except ValueError as exc:
        raise damaged() from exc
    if not isinstance(settings, dict):
        raise damaged()
    return settings


def damaged() -> LoraInvalid:
    return LoraInvalid(f"its {ADAPTER_METADATA_KEY} entry is damaged")
