"""Folders on this machine that a config from the command line names: uploaded before anything runs."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from pathlib import Path

from storage.datasets import write_dataset
from storage.keys import Keys
from storage.objects import ObjectStore
from train_jobs.errors import ConfigInvalid, DatasetEmpty, Problem
from train_jobs.folder_files import upload_groups
from train_jobs.spec import TrainSpec
from train_jobs.spec_datasets import with_datasets


async def upload_local_datasets(store: ObjectStore, keys: Keys, spec: TrainSpec, *, now: datetime) -> TrainSpec:
    """Upload every local folder and pin the upload in the spec returned, which then names nothing on this machine but
    perhaps its model.

    Raises ConfigInvalid for a folder that is not there, DatasetEmpty, StorageError.
    """
    datasets = list(spec.all_datasets)
    for index, (name, files) in (await asyncio.to_thread(_local_folders, spec)).items():
        manifest = await write_dataset(
            store,
            keys,
            name,
            [(filename, path, None) for filename, path in files],
            now=now,
            training_name=spec.name,
            trigger_word=datasets[index].trigger_word,
        )
        pinned = {"dataset": name, "upload_id": manifest.upload_id, "local_path": None}
        datasets[index] = datasets[index].model_copy(update=pinned)
    return with_datasets(spec, datasets)


def _local_folders(spec: TrainSpec) -> dict[int, tuple[str, list[tuple[str, Path]]]]:
    """By the dataset's place in the spec: the name it is stored under, and its files."""
    found: dict[int, tuple[str, list[tuple[str, Path]]]] = {}
    problems: list[Problem] = []
    for index, dataset in enumerate(spec.all_datasets):
        if dataset.local_path is None:
            continue
        folder = Path(dataset.local_path).resolve()
        if not folder.is_dir():
            problems.append(Problem(f"datasets[{index}]", "the folder does not exist", "not_found"))
            continue
        files = [file for group in upload_groups(folder, dataset.caption_ext) for file in group.items()]
        if not files:
            raise DatasetEmpty(folder.name)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", folder.name).lstrip("._-")[:150] or spec.name
        found[index] = (name, files)
    if problems:
        raise ConfigInvalid(problems)
    return found
