"""The `network` section of an ai-toolkit config."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader, copy_keys

NOT_IN_LOCON = ("unet.conv_in", "unet.conv_out", "unet.time_embedding", "unet.add_embedding")
"""Layers outside a UNet's blocks, which ai-toolkit's other networks adapt too (`lycoris_special.py`)."""
NETWORK_TYPES = ("lora", "locon", "dora", "lokr", "loha")


def read_network(reader: ConfigReader, value: Any, path: str, family: str | None) -> None:
    """`family`: what the file takes its model for, where it says so."""
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
    reader.put("network.targets", "ai_toolkit", path)
    if kind in ("lora", "locon"):
        reader.put("network.initial", "uniform", path)
    rank_key = "rank" if "rank" in network else "linear"
    reader.put("network.rank", network.get(rank_key, 4), f"{path}.{rank_key}")
    _alpha(reader, value if isinstance(value, dict) else {}, path, rank=network.get(rank_key, 4), family=family)
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
        if family in ("flux2_dev", "flux2_klein") and value:
            reader.warn(f"{at}.{key}", "is compared with the layers' names in diffusers, not with FLUX.2's own")
        reader.put(f"network.{key}", [value] if isinstance(value, str) else value, f"{at}.{key}")
    if kind == "locon":
        ignored = reader.values["network"].get("ignore_if_contains", [])
        if isinstance(ignored, list):
            reader.put("network.ignore_if_contains", [*ignored, *NOT_IN_LOCON], f"{at}.ignore_if_contains")


def _alpha(reader: ConfigReader, written: dict[str, Any], path: str, *, rank: Any, family: str | None) -> None:
    """ai-toolkit has none in transformers (`lora_special.py`, `peft_format`): there it is the rank. In UNets it is 1
    unless the file says otherwise, and 0 or null stand for the rank."""
    key = "linear_alpha" if "linear_alpha" in written else "alpha"
    alpha = written.get(key, 1.0) or rank
    has_none = family in values.FLOW_FAMILIES and not (written.get("type") == "lokr" and written.get("old_lokr_format"))
    if has_none and key in written and alpha != rank and not _is_whole(written):
        reader.warn(f"{path}.{key}", f"is taken as the rank, {rank}: ai-toolkit trains models of this kind so")
    reader.put("network.alpha", rank if has_none else alpha, f"{path}.{key}")


def _is_whole(written: dict[str, Any]) -> bool:
    """A LoKr with whole matrices, in which rank and alpha have no say."""
    return written.get("type") == "lokr" and written.get("lokr_full_rank", True) is not False
