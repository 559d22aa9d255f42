"""Data sets that are folders of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import KEYS, NOW
from train_jobs.errors import ConfigInvalid, DatasetEmpty
from train_jobs.local_datasets import upload_local_datasets
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json


async def test_local_folders_are_uploaded_and_pinned(
    store: InMemoryStore, spec: TrainSpec, write_pictures: Callable[..., Path]
) -> None:
    folder = write_pictures((8, 8), name="my cats")
    held = {"dataset": {"local_path": str(write_pictures((8, 8), name="held"))}}
    (folder / "p0_mask.png").write_bytes((folder / "p0.png").read_bytes())
    change = {"datasets": [{"local_path": str(folder)}], "validation": held}
    local = spec_from_json(TrainSpec, spec.model_dump() | change, paths_allowed=True)
    uploaded = await upload_local_datasets(store, KEYS, local, now=NOW)
    assert spec_from_json(TrainSpec, uploaded.model_dump()) == uploaded
    assert uploaded.datasets[0].dataset == "my_cats"
    assert uploaded.validation is not None
    assert uploaded.validation.dataset is not None
    assert uploaded.validation.dataset.dataset == "held"
    assert uploaded.datasets[0].upload_id is not None
    assert [key.rsplit("/")[-1] for key in list(store.keys()) if "my_cats" in key] == [
        "manifest.json",
        "p0.png",
        "p0.txt",
        "p0_mask.png",
    ]


async def test_a_local_folder_that_is_missing_or_empty_is_an_error(
    store: InMemoryStore, spec: TrainSpec, tmp_path: Path
) -> None:
    def local(path: Path) -> TrainSpec:
        value = spec.model_dump() | {"datasets": [{"local_path": str(path)}]}
        return spec_from_json(TrainSpec, value, paths_allowed=True)

    with pytest.raises(ConfigInvalid):
        await upload_local_datasets(store, KEYS, local(tmp_path / "missing"), now=NOW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetEmpty):
        await upload_local_datasets(store, KEYS, local(tmp_path / "empty"), now=NOW)
