"""The `datasets` section of an ai-toolkit config."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs.config_reader import ConfigReader
from train_jobs.spec import DATASET_PATTERN


def read_datasets(reader: ConfigReader, value: Any, path: str, trigger: Any, *, local: bool) -> None:
    if not isinstance(value, list) or not value:
        reader.problem(path, "must be a list of at least one dataset", "missing")
        return
    entries: list[dict[str, Any]] = []
    for index, item in enumerate(value[:64]):
        entries.append(_dataset(reader, item, f"{path}[{index}]", index, trigger, local=local))
    reader.values["datasets"] = entries


def _dataset(reader: ConfigReader, value: Any, path: str, index: int, trigger: Any, *, local: bool) -> dict[str, Any]:
    dataset = reader.section(value, path, keys.DATASET)
    entry: dict[str, Any] = {}

    def put(target: str, item: Any, key: str) -> None:
        entry[target] = item
        reader.origin[f"datasets.{index}.{target}"] = f"{path}.{key}"

    reader.origin[f"datasets.{index}"] = path
    _folder(reader, dataset, path, put, local=local)
    for key, target in {
        "default_caption": "default_caption",
        "caption_dropout_rate": "caption_dropout_rate",
        "num_repeats": "repeats",
        "flip_x": "flip_x",
        "flip_y": "flip_y",
        "shuffle_tokens": "shuffle_tokens",
        "keep_tokens": "keep_tokens",
        "token_dropout_rate": "token_dropout_rate",
        "is_reg": "is_regularisation",
        "loss_multiplier": "loss_multiplier",
        "alpha_mask": "alpha_mask",
        "invert_mask": "invert_mask",
        "mask_min_value": "mask_min_value",
        "buckets": "buckets",
        "bucket_tolerance": "bucket_step_px",
    }.items():
        if key in dataset:
            put(target, dataset[key], key)
    if dataset.get("mask_path"):
        put("mask_dataset", _mask_dataset(reader, dataset["mask_path"], f"{path}.mask_path", local=local), "mask_path")
    word = dataset.get("trigger_word", trigger)
    if word:
        put("trigger_word", word, "trigger_word")
    if trigger and dataset.get("caption_dropout_rate") and not dataset.get("is_reg"):
        # In ai-toolkit the process's trigger word is put in front of what dropping has left, too.
        put("dropped_caption", trigger, "caption_dropout_rate")
    # The older name outweighs the newer one, as in ai-toolkit.
    ext_key = "caption_type" if dataset.get("caption_type") else "caption_ext"
    if ext_key in dataset:
        extension = dataset[ext_key]
        put("caption_ext", f".{extension.lstrip('.')}" if isinstance(extension, str) else extension, ext_key)
    resolution = dataset.get("resolution", 512)
    put("resolutions_px", resolution if isinstance(resolution, list) else [resolution], "resolution")
    return entry


def _mask_dataset(reader: ConfigReader, value: Any, path: str, *, local: bool) -> str | None:
    """Masks are an uploaded dataset like any other; a folder is uploaded by `raylora train`, not by a Ray job."""
    name = dataset_name(value) if isinstance(value, str) else None
    if name is None or (local and name != value):
        reader.problem(path, "must be the name of an uploaded dataset", "not_allowed" if local else "invalid_value")
    return name


def _folder(
    reader: ConfigReader, dataset: dict[str, Any], path: str, put: Callable[[str, Any, str], None], *, local: bool
) -> None:
    key = "folder_path" if "folder_path" in dataset else "dataset_path"
    folder = dataset.get(key)
    if not isinstance(folder, str) or not folder.strip():
        reader.problem(f"{path}.folder_path", "is missing", "missing")
        put("dataset", "unnamed", key)
    elif local:
        put("local_path", folder, key)
    else:
        name = dataset_name(folder)
        if name is None:
            reader.problem(f"{path}.{key}", "must end in the name of an uploaded dataset")
        put("dataset", name or "unnamed", key)


def dataset_name(folder_path: str) -> str | None:
    """The dataset that an old `folder_path` means: its last segment; None when that cannot be a dataset's name."""
    segments = [s for s in re.split(r"[/\\]+", folder_path.strip()) if s]
    return segments[-1] if segments and re.fullmatch(DATASET_PATTERN, segments[-1]) else None
