"""Turns a training configuration on this machine into one that the server can run: local data sets are uploaded."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serve_app.cli.client import ApiClient, ApiError
from train_jobs.config_check import ConfigCheck, check_train_yaml
from train_jobs.errors import ConfigInvalid
from train_jobs.strict_yaml import read_mapping

# A request holds base64, a third more than the bytes, and the server takes 20 MB.
UPLOAD_BATCH_BYTES = 12 * 10**6
UPLOAD_BATCH_FILES = 100
UPLOADED_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".txt"})


def prepare_training(client: ApiClient, config: Path, *, on_upload: Callable[[str], None]) -> dict[str, Any]:
    """The configuration as a mapping, each local ``folder_path`` replaced by the name of its uploaded data set.

    Paths are taken from the working folder, then from the configuration's own. Raises ApiError.
    """
    try:
        document = read_mapping(config.read_text(encoding="utf-8"))
    except ConfigInvalid as exc:
        lines = "\n".join(f"  {problem.path or config.name}: {problem.message}" for problem in exc.problems)
        raise ApiError("config_invalid", f"{config} cannot be used:\n{lines}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ApiError("config_unreadable", f"{config} cannot be read as UTF-8 text.") from exc
    for dataset in _datasets(document):
        if dataset.get("dataset_path") and not dataset.get("folder_path"):
            dataset["folder_path"] = dataset.pop("dataset_path")
        for key in ("folder_path", "mask_path"):
            folder = _local_folder(str(dataset[key]), config) if dataset.get(key) else None
            if folder is None:
                continue
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(folder.parts[-2:])).strip("-.")[:100] or "dataset"
            upload_folder(client, folder, name, on_upload=on_upload)
            dataset[key] = name
    return document


def check_training(config: Path) -> ConfigCheck:
    """What each key of the file would do, read here: nothing is sent or started. Raises ApiError."""
    try:
        text = config.read_bytes()
    except OSError as exc:
        raise ApiError("config_unreadable", f"{config} cannot be read.") from exc
    return check_train_yaml(text, datasets_are_local=True)


def _datasets(document: Any) -> Iterator[dict[str, Any]]:
    """Every data set mapping of a well-formed document; what is malformed is left for the server to name."""
    config = document.get("config") if isinstance(document, dict) else None
    processes = config.get("process") if isinstance(config, dict) else None
    for process in processes if isinstance(processes, list) else []:
        datasets = process.get("datasets") if isinstance(process, dict) else None
        yield from (d for d in (datasets if isinstance(datasets, list) else []) if isinstance(d, dict))
        validation = process.get("validation") if isinstance(process, dict) else None
        if isinstance(validation, dict):
            yield validation


def _local_folder(named: str, config: Path) -> Path | None:
    for candidate in (Path(named).expanduser(), config.parent / named):
        if candidate.is_dir():
            return candidate.resolve()
    return None


def upload_folder(client: ApiClient, folder: Path, name: str, *, on_upload: Callable[[str], None]) -> None:
    """Upload the pictures and captions of a folder as data set ``name``. Raises ApiError where there are none."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in UPLOADED_SUFFIXES)
    if not files:
        raise ApiError("dataset_empty", f"{folder} holds no pictures. Put .png, .jpg or .webp files there.")
    for index, batch in enumerate(_batches(files)):
        client.call(
            "upload_training_data",
            training_name=re.sub(r"[^a-zA-Z0-9_-]", "-", name),
            dataset_folder=name,
            cleanup_existing=index == 0,
            files=[{"filename": file.name, "content": base64.b64encode(file.read_bytes()).decode()} for file in batch],
        )
    on_upload(f"uploaded {len(files)} files as data set {name}")


def _batches(files: list[Path]) -> Iterator[list[Path]]:
    """Files in requests of a size that the server takes; a picture and its caption stay together."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.stem, []).append(file)
    batch: list[Path] = []
    size = 0
    for group in groups.values():
        group_size = sum(file.stat().st_size for file in group)
        if group_size > UPLOAD_BATCH_BYTES:
            limit_mb = UPLOAD_BATCH_BYTES // 10**6
            raise ApiError("file_too_large", f"{group[0].name} is larger than {limit_mb} MB. Scale the picture down.")
        if batch and (size + group_size > UPLOAD_BATCH_BYTES or len(batch) + len(group) > UPLOAD_BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch += group
        size += group_size
    if batch:
        yield batch
