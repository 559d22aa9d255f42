"""What a base model is known by."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion.lora import read_lora
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import get
from train_jobs import file_digests
from train_jobs.file_digests import FileDigests
from train_jobs.kept import digest_of_file
from train_jobs.models import weights_sha256
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for part in ("vae", "unet", "safety_checker"):
        (folder / part).mkdir(parents=True)
        (folder / part / "a.safetensors").write_bytes(part.encode())
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "a.fp16.safetensors").write_bytes(b"half")
    return folder


def test_a_models_hash_is_that_of_its_weights_as_coreutils_list_them(model: Path) -> None:
    listed = "".join(f"{hashlib.sha256(part.encode()).hexdigest()}  {part}/a.safetensors\n" for part in ("unet", "vae"))
    found = weights_sha256(model, digest_of_file)
    assert found == hashlib.sha256(listed.encode()).hexdigest()
    shutil.move(model, model.with_name("elsewhere"))
    assert weights_sha256(model.with_name("elsewhere"), digest_of_file) == found


def test_every_adapter_tells_the_hash_of_its_base_model(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, model_folder: Path, tmp_path: Path
) -> None:
    output = train(spec_from_json(TrainSpec, spec.model_dump() | {"sample": {}}))["output"]
    stored = [output["loras"][0]["key"], output["exports"][0]["key"], output["checkpoints"][0]["keys"][0]]
    expected = weights_sha256(model_folder, digest_of_file)
    assert output["base_model_sha256"] == expected
    for key in stored:
        (tmp_path / "a.safetensors").write_bytes(get(store, key))
        metadata = read_lora(tmp_path / "a.safetensors").metadata
        assert (metadata["ss_sd_model_name"], metadata["ss_new_sd_model_hash"]) == ("tiny", expected)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read through."""
    names: list[str] = []

    def reading(path: Path) -> str:
        names.append(path.name)
        return digest_of_file(path)

    monkeypatch.setattr(file_digests, "digest_of_file", reading)
    return names


def test_a_file_is_read_through_once_and_again_when_it_changes(tmp_path: Path, read: list[str]) -> None:
    path, kept = tmp_path / "a.safetensors", tmp_path / "kept"
    path.write_bytes(b"one")
    before = path.stat()
    first = FileDigests(kept).of(path)
    assert FileDigests(kept).of(path) == first == hashlib.sha256(b"one").hexdigest()
    assert read == ["a.safetensors"]
    # Another file of the same size with the time of the first one's content, as a copy that keeps times makes it.
    (tmp_path / "b").write_bytes(b"two")
    os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "b", path)
    assert FileDigests(kept).of(path) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("damage", ["", "{}", "[[], 1, 2]", "[1, 2]"])
def test_what_was_remembered_badly_is_computed_again(tmp_path: Path, read: list[str], damage: str) -> None:
    path, kept = tmp_path / "a.safetensors", tmp_path / "kept"
    path.write_bytes(b"one")
    digest = FileDigests(kept).of(path)
    [note] = [found for found in kept.rglob("*") if found.is_file()]
    note.write_text(damage)
    assert FileDigests(kept).of(path) == FileDigests(kept).of(path) == digest
    assert len(read) == 2


def test_a_disk_that_remembers_nothing_costs_no_more_than_reading(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    (tmp_path / "kept").write_text("a file where the folder should be")
    digests = FileDigests(tmp_path / "kept")
    assert [digests.of(path), digests.of(path)] == [hashlib.sha256(b"one").hexdigest()] * 2
    assert len(read) == 2
