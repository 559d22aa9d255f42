"""What is kept for later trainings: found again, shared, checked, and made again when it is damaged."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.families import Family
from storage.errors import InvalidKey, StorageUnavailable
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from train_jobs.cache import Encodings, TrainingCache, build_cache
from train_jobs.data import plan_uses, read_folder
from train_jobs.kept import Kept, digest_of_file, digest_of_files, name_of
from train_jobs.spec import DatasetSpec

KEYS = Keys("raylora", "default")
NAME = name_of("a", 1)


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


@pytest.fixture
def make(store: InMemoryStore, tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    runner = LoopThread("test")
    yield lambda folder="disk", keys=KEYS, **options: Kept(
        store, runner, keys, None if folder is None else tmp_path / folder, **options
    )
    runner.stop()


def _damage_store(store: InMemoryStore, key: str) -> None:
    data = asyncio.run(store.get(key))
    asyncio.run(store.put(key, data[:-1] + bytes([data[-1] ^ 1])))


def test_what_was_kept_is_found_on_the_disk_and_by_other_nodes(store: InMemoryStore, make: Callable[..., Kept]) -> None:
    make().keep("texts", {NAME: b"data"})
    asked = store.calls["get"]
    assert make().fetch("texts", [NAME, name_of("b")]) == {NAME: b"data"}
    assert store.calls["get"] == asked + 1  # only for the one that nobody has
    other = make("another node")
    assert other.fetch("texts", [NAME]) == make(None).fetch("texts", [NAME]) == {NAME: b"data"}
    asked = store.calls["get"]
    assert other.fetch("texts", [NAME]) == {NAME: b"data"}
    assert store.calls["get"] == asked
    assert other.fetch("latents", [NAME]) == {}


def test_another_tenant_does_not_see_it(make: Callable[..., Kept]) -> None:
    make().keep("texts", {NAME: b"data"})
    assert make(keys=Keys("raylora", "other")).fetch("texts", [NAME]) == {}


def test_what_is_damaged_counts_as_missing_and_is_logged(
    store: InMemoryStore, make: Callable[..., Kept], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = make()
    kept.keep("texts", {NAME: b"data"})
    [path] = [p for p in (tmp_path / "disk").rglob("*") if p.is_file()]
    path.write_bytes(path.read_bytes()[:-2])
    with caplog.at_level(logging.WARNING):
        assert kept.fetch("texts", [NAME]) == {NAME: b"data"}
        assert "kept file of the kind texts is damaged" in caplog.text
        assert make().fetch("texts", [NAME]) == {NAME: b"data"}
        path.unlink()
        _damage_store(store, KEYS.kept("texts", NAME))
        assert kept.fetch("texts", [NAME]) == {}
    assert "kept object of the kind texts is damaged" in caplog.text
    kept.keep("texts", {NAME: b"data"})
    assert make(None).fetch("texts", [NAME]) == {NAME: b"data"}


def test_a_store_that_takes_nothing_is_no_reason_to_stop(
    store: InMemoryStore, make: Callable[..., Kept], caplog: pytest.LogCaptureFixture
) -> None:
    store.break_down(StorageUnavailable("put", 1.0))
    with caplog.at_level(logging.WARNING):
        make().keep("texts", {NAME: b"data"})
    assert "could not be kept" in caplog.text
    assert make().fetch("texts", [NAME]) == {NAME: b"data"}


def test_a_disk_that_takes_nothing_is_no_reason_to_stop(
    make: Callable[..., Kept], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk").write_text("a file where the folder should be")
    kept = make()
    with caplog.at_level(logging.WARNING):
        kept.keep("texts", {NAME: b"data", name_of("b"): b"more"})
        assert kept.fetch("texts", [NAME]) == {NAME: b"data"}
        kept.prune()
    assert kept.disk_failures >= 3
    assert len(caplog.records) == 1
    assert str(tmp_path) not in caplog.text


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(
    make: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    kept = make()
    monkeypatch.setattr(os, "replace", full)
    kept.keep("texts", {NAME: b"data"})
    assert kept.disk_failures == 1
    assert not [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    assert make(None).fetch("texts", [NAME]) == {NAME: b"data"}


@pytest.mark.parametrize("moment", ["before it is read", "after it was read"])
def test_a_file_that_another_training_prunes_meanwhile_is_no_fault(
    make: Callable[..., Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    kept = make()
    kept.keep("texts", {NAME: b"data"})
    [path] = [p for p in (tmp_path / "disk").rglob("*") if p.is_file()]
    if moment == "before it is read":
        path.unlink()
    else:
        real = os.utime

        def utime(gone: Path) -> None:
            gone.unlink()
            real(gone)

        monkeypatch.setattr(os, "utime", utime)
    assert kept.fetch("texts", [NAME]) == {NAME: b"data"}
    assert kept.disk_failures == 0


def test_the_folder_keeps_what_was_used_last(make: Callable[..., Kept], tmp_path: Path, store: InMemoryStore) -> None:
    kept = make(folder_bytes_max=3 * 1040)
    names = [name_of(i) for i in range(5)]
    kept.keep("texts", dict.fromkeys(names, bytes(1000)))
    for age, name in enumerate(reversed(names)):
        os.utime(tmp_path / "disk" / "default" / "texts" / name[:2] / name, (1000 - age, 1000 - age))
    assert kept.fetch("texts", [names[0]])
    kept.prune()
    left = {path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    assert left == {names[0], names[3], names[4]}
    make(None).prune()
    make("never written").prune()
    assert len(make(None).fetch("texts", names)) == 5


def test_only_a_hash_names_what_is_kept() -> None:
    with pytest.raises(InvalidKey):
        KEYS.kept("texts", "../other")


def test_a_models_digest_is_of_its_files_and_reads_no_file_that_is_named_by_its_own(tmp_path: Path) -> None:
    blob, folder = tmp_path / "blobs" / ("a" * 64), tmp_path / "model" / "vae"
    for parent in (blob.parent, folder):
        parent.mkdir(parents=True)
    blob.write_text("weights")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(blob)
    assert digest_of_file(folder / "model.safetensors") == "a" * 64
    before = digest_of_files(tmp_path / "model", ["vae/*"])
    assert before == digest_of_files(tmp_path / "model", ["vae/*", "vae/*.json"])
    (folder / "config.json").write_text('{"a": 1}')
    assert digest_of_files(tmp_path / "model", ["vae/*"]) != before


class _Counted:
    """The family, and how much it was asked to encode."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.pictures = self.prompts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        self.pictures += len(images_BCHW)
        return self._family.encode_image_moments(images_BCHW)

    def encode_prompts(self, prompts: list[str]) -> Any:
        self.prompts += len(prompts)
        return self._family.encode_prompts(prompts)


def _build(
    family: Family, folder: Path, kept: Kept, *, model: str = "m", texts: str | None = "t", flip_x: bool = True
) -> tuple[TrainingCache, int, int]:
    spec = DatasetSpec(dataset="cats", resolutions_px=(16,), bucket_step_px=8, flip_x=flip_x)
    counted: Any = _Counted(family)
    progress: list[tuple[int, int]] = []
    built = build_cache(
        counted, plan_uses(read_folder(folder, spec), spec, size_multiple=8), encodings=Encodings(kept, model, texts),
        on_progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert built is not None
    assert progress[-1] == (len(built.uses), len(built.uses))
    return built, counted.pictures, counted.prompts


def test_a_second_training_encodes_only_what_is_new(
    family: Family, make: Callable[..., Kept], write_pictures: Callable[..., Path]
) -> None:
    folder = write_pictures((16, 16), (20, 20), (16, 32))
    first, pictures, prompts = _build(family, folder, make())
    assert (pictures, prompts) == (6, 4)
    again, pictures, prompts = _build(family, folder, make("another node"))
    assert (pictures, prompts) == (0, 0)
    for ours, theirs in zip(again.uses, first.uses, strict=True):
        assert torch.equal(ours.mean_CHW, theirs.mean_CHW)
        assert torch.equal(ours.std_CHW, theirs.std_CHW)
        assert ours.caption == theirs.caption
        assert torch.equal(again.texts[ours.text_row].hidden_BLD, first.texts[theirs.text_row].hidden_BLD)
    (folder / "p0.txt").write_text("another caption")
    assert _build(family, folder, make())[1:] == (0, 1)
    (folder / "p1.png").write_bytes((folder / "p0.png").read_bytes())
    assert _build(family, folder, make())[1:] == (0, 0)  # the same picture under another name
    assert _build(family, folder, make(), model="other")[1:] == (6, 0)
    assert _build(family, folder, make(), texts="other")[1:] == (0, 4)
    assert _build(family, folder, make(), texts=None)[1:] == (0, 4)


def test_damaged_latents_are_encoded_again(
    family: Family, make: Callable[..., Kept], write_pictures: Callable[..., Path], store: InMemoryStore
) -> None:
    folder = write_pictures((16, 16), (20, 20))
    first = _build(family, folder, make(None), flip_x=False)[0]
    [one, _] = asyncio.run(store.list(f"{KEYS.tenant_prefix}kept/latents/"))
    _damage_store(store, one.key)
    again, pictures, _ = _build(family, folder, make(None), flip_x=False)
    assert pictures == 1
    assert all(torch.allclose(a.mean_CHW, b.mean_CHW, atol=1e-5) for a, b in zip(again.uses, first.uses, strict=True))
    name = one.key.rpartition("/")[2]
    make(None).keep("latents", {name: b"no tensors"})
    assert _build(family, folder, make(None), flip_x=False)[1] == 1
    assert _build(family, folder, make(None), flip_x=False)[1] == 0
