"""Turns a training configuration on this machine into one that the server can run: local data sets are uploaded."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from serve_app.cli.client import ApiClient, NoKey, Unreachable, Unusable, WrongKey
from train_jobs.config_check import check_train_yaml
from train_jobs.errors import ConfigInvalid
from train_jobs.folder_files import upload_groups
from train_jobs.strict_yaml import read_mapping

# A request holds base64, a third more than the bytes, and the server takes 20 MB.
UPLOAD_BATCH_BYTES = 12 * 10**6
UPLOAD_BATCH_FILES = 100
WRONG = frozenset({"invalid", "refused"})
NOT_ASKED_FOR = "The file cannot be read as a configuration."
CAPTION_SUFFIX = ".txt"
"""Others are not taken by the server."""


@dataclass(frozen=True)
class LocalTraining:
    """A configuration as the server gets it, and the folders of this machine that it names, by data set name."""

    document: dict[str, Any]
    folders: dict[str, Path]


@dataclass(frozen=True)
class TrainingReport:
    """A check's `as_json` and where it was made. `unchecked` is why no server was asked; None where one was."""

    found: dict[str, Any]
    unchecked: str | None

    def as_json(self) -> dict[str, Any]:
        return {**self.found, "unchecked": self.unchecked}


def prepare_training(client: ApiClient, config: Path, *, on_upload: Callable[[str], None]) -> dict[str, Any]:
    """The configuration as a mapping, each local ``folder_path`` replaced by the name of its uploaded data set.

    What the server would refuse is refused before anything is sent. Raises ApiError.
    """
    try:
        training = _local_training(config)
    except ConfigInvalid as exc:
        raise _unusable(config, [(problem.path, problem.message) for problem in exc.problems]) from exc
    wrong = [key for key in _asked(client, training)["keys"] if key["verdict"] in WRONG]
    if wrong:
        raise _unusable(config, [(key["path"], key["note"]) for key in wrong])
    for name, folder in training.folders.items():
        try:
            upload_folder(client, folder, name, on_upload=on_upload)
        except OSError as exc:
            raise Unusable("dataset_unreadable", f"{exc.filename or folder} cannot be read: {exc.strerror}.") from exc
    return training.document


def check_training(config: Path, connect: Callable[[], ApiClient]) -> TrainingReport:
    """What each key of the file would do; nothing is uploaded or started.

    The server of `connect` is asked where it answers: only it knows its models, data sets and limits. Raises ApiError
    where the file cannot be read.
    """
    try:
        training = _local_training(config)
    except ConfigInvalid:
        return TrainingReport(check_train_yaml(config.read_bytes()).as_json(), NOT_ASKED_FOR)
    try:
        with connect() as client:
            return TrainingReport(_asked(client, training), None)
    except (NoKey, Unreachable, WrongKey) as exc:
        return TrainingReport(check_train_yaml(training.document).as_json(), str(exc))


def _local_training(config: Path) -> LocalTraining:
    """Paths are taken from the working folder, then from the configuration's own. Raises ConfigInvalid, ApiError."""
    try:
        document = read_mapping(config.read_bytes())
    except OSError as exc:
        raise Unusable("config_unreadable", f"{config} cannot be read.") from exc
    folders: dict[str, Path] = {}
    for dataset in _datasets(document):
        if dataset.get("dataset_path") and not dataset.get("folder_path"):
            dataset["folder_path"] = dataset.pop("dataset_path")
        for key in ("folder_path", "mask_path"):
            folder = _local_folder(str(dataset[key]), config) if dataset.get(key) else None
            if folder is not None:
                dataset[key] = name = _dataset_name(folder, folders)
                folders[name] = folder
    return LocalTraining(document, folders)


def _dataset_name(folder: Path, taken: Mapping[str, Path]) -> str:
    """After the folder and the one it is in; another folder that would have that name too gets a number."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(folder.parts[-2:])).strip("-.")[:90] or "dataset"
    numbered = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
    return next(name for name in numbered if taken.get(name, folder) == folder)


def _asked(client: ApiClient, training: LocalTraining) -> dict[str, Any]:
    """The server's report, in which data sets are missing that are neither here nor there. Raises ApiError."""
    report = client.call("train", config=training.document, check=True, uploads=sorted(training.folders))
    missing = {need["path"]: need["dataset"] for need in report["needs"] if "dataset" in need and not need["found"]}
    keys = [
        {**key, "note": f"'{missing[key['path']]}' is neither a folder here nor a data set there"}
        if key["path"] in missing
        else key
        for key in report["keys"]
    ]
    return {**report, "keys": keys}


def _unusable(config: Path, problems: list[tuple[str, str]]) -> Unusable:
    lines = "\n".join(f"  {path or config.name}: {message}" for path, message in problems)
    return Unusable("config_invalid", f"{config} cannot be used:\n{lines}")


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
    """Upload the pictures of a folder, their captions and masks as data set ``name``. Raises ApiError where there are
    none."""
    groups = upload_groups(folder, CAPTION_SUFFIX)
    if not groups:
        raise Unusable("dataset_empty", f"{folder} holds no pictures. Put .png, .jpg or .webp files there.")
    for index, batch in enumerate(_batches(groups)):
        client.call(
            "upload_training_data",
            training_name=re.sub(r"[^a-zA-Z0-9_-]", "-", name),
            dataset_folder=name,
            cleanup_existing=index == 0,
            files=[
                {"filename": filename, "content": base64.b64encode(file.read_bytes()).decode()}
                for filename, file in batch.items()
            ],
        )
    on_upload(f"uploaded {sum(map(len, groups))} files as data set {name}")


def _batches(groups: list[dict[str, Path]]) -> Iterator[dict[str, Path]]:
    """Files in requests of a size that the server takes; a picture, its caption and its mask stay together."""
    batch: dict[str, Path] = {}
    size = 0
    for group in groups:
        group_size = sum(file.stat().st_size for file in group.values())
        if group_size > UPLOAD_BATCH_BYTES:
            limit_mb = UPLOAD_BATCH_BYTES // 10**6
            name = next(iter(group.values())).name
            message = f"{name}, with its caption and mask, is larger than {limit_mb} MB. Scale the picture down."
            raise Unusable("file_too_large", message)
        if batch and (size + group_size > UPLOAD_BATCH_BYTES or len(batch) + len(group) > UPLOAD_BATCH_FILES):
            yield batch
            batch, size = {}, 0
        batch |= group
        size += group_size
    if batch:
        yield batch
