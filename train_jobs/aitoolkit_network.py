"""The `network` section of an ai-toolkit config."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs.config_reader import ConfigReader, copy_keys

NETWORK_TYPES = ("lora", "locon", "dora", "lokr", "loha")


def read_network(reader: ConfigReader, value: Any, path: str) -> None:
    if value is None:
        reader.problem(path, "is missing: only LoRA training is supported", "missing")
        return
    kind = value.get("type", "lora") if isinstance(value, dict) else "lora"
    network = reader.section(value, path, keys.LOKR_NETWORK if kind == "lokr" else keys.NETWORK)
    if kind not in NETWORK_TYPES:
        reader.problem(
            f"{path}.type", f"only the network types {', '.join(NETWORK_TYPES)} are supported", "unsupported"
        )
    elif kind not in ("lora", "locon"):
        reader.put("network.type", kind, f"{path}.type")
    rank_key = "rank" if "rank" in network else "linear"
    alpha_key = "linear_alpha" if "linear_alpha" in network else "alpha"
    reader.put("network.rank", network.get(rank_key, 4), f"{path}.{rank_key}")
    reader.put("network.alpha", network.get(alpha_key, 1.0), f"{path}.{alpha_key}")
    names = {
        "conv": "conv_rank",
        "dropout": "dropout",
        "lokr_full_rank": "lokr_full_rank",
        "lokr_factor": "lokr_factor",
    }
    if kind in ("lokr", "loha") and network.get("dropout"):
        del names["dropout"]
        reader.warn(f"{path}.dropout", f"has no effect on {kind}")
    copy_keys(reader, network, path, {key: f"network.{target}" for key, target in names.items()})
    if "conv" in network:
        reader.put("network.conv_alpha", network.get("conv_alpha", network["conv"]), f"{path}.conv_alpha")
    if network.get("pretrained_lora_path"):
        reader.put("network.pretrained", network["pretrained_lora_path"], f"{path}.pretrained_lora_path")
    at = f"{path}.network_kwargs"
    filters = reader.section(network.get("network_kwargs"), at, keys.NETWORK_KWARGS)
    for key, value in filters.items():
        reader.put(f"network.{key}", [value] if isinstance(value, str) else value, f"{at}.{key}")
