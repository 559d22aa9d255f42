"""Previews over several attempts, the thumbnail that they give, and the memory that they leave."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion.adapter import attach_lora
from diffusion.errors import Cancelled
from diffusion.families import Family
from diffusion.images import thumbnail_uri
from diffusion.lora import read_lora
from storage.errors import ObjectNotFound
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, Told, get, keys
from train_jobs.artifacts import Artifacts
from train_jobs.previews import Previews, store_nowhere
from train_jobs.spec import SampleSpec, TrainSpec
from train_jobs.spec_json import spec_from_json

Train = Callable[..., dict[str, Any]]


def longer(spec: TrainSpec, *, previews_every: int) -> TrainSpec:
    change = {
        "train": spec.train.model_dump() | {"steps": 6},
        "sample": spec.sample.model_dump() | {"every_steps": previews_every},
        "save": {"every_steps": 2, "keep": 4},
    }
    return spec_from_json(TrainSpec, spec.model_dump() | change)


class Reports(Told):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.previews: list[list[int]] = []

    def stage(self, name: str, **details: Any) -> None:
        super().stage(name, **details)
        if "previews" in details:
            self.previews.append([item["step"] for item in details["previews"]])


def test_a_training_that_goes_on_names_the_previews_that_were_made_before(
    train: Train, spec: TrainSpec, store: InMemoryStore
) -> None:
    spec = longer(spec, previews_every=3)
    whole = train(spec)["output"]["samples"]
    for key in keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(key))
    first = train(spec, Told(stop_at=5))["output"]["samples"]
    told = Reports()
    output = train(spec, told)["output"]

    assert [item["step"] for item in first] == [0, 0, 3, 3]
    assert told.previews[0] == [0, 0, 3, 3]
    assert output["samples"] == whole


def test_previews_that_an_attempt_had_no_time_for_are_made_when_it_is_gone_on_from(
    train: Train, spec: TrainSpec, store: InMemoryStore
) -> None:
    stopped = train(spec, Told(stop_at=2))["output"]
    assert [item["step"] for item in stopped["samples"]] == [0, 0]
    output = train(spec)["output"]
    assert [item["step"] for item in output["samples"]] == [0, 0, 2, 2, 4, 4]
    assert all(asyncio.run(store.exists(item["key"])) for item in output["samples"])


def test_more_steps_of_a_training_make_no_previews_of_where_it_ended(train: Train, spec: TrainSpec) -> None:
    short = spec.model_copy(update={"train": spec.train.model_copy(update={"steps": 2})})
    train(short, process_id="train_00000000000b")
    more = spec.model_copy(update={"continues": "train_00000000000b"})
    output = train(more, process_id="train_00000000000c")["output"]
    assert [item["step"] for item in output["samples"]] == [4, 4]


def thumbnail_of(data: bytes, folder: Path) -> Image.Image:
    (folder / "adapter.safetensors").write_bytes(data)
    uri = read_lora(folder / "adapter.safetensors").metadata["modelspec.thumbnail"]
    kind, _, encoded = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_an_adapter_carries_its_newest_preview_also_when_it_was_made_by_an_earlier_attempt(
    train: Train, spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    spec = longer(spec, previews_every=3)
    output = train(spec, Told(stop_at=5))["output"]
    train(spec)
    newest = Image.open(io.BytesIO(get(store, output["samples"][2]["key"])))
    shown = thumbnail_of(get(store, KEYS.checkpoint_file(JOB, 6, "adapter.safetensors")), tmp_path)
    expected = Image.open(io.BytesIO(base64.b64decode(thumbnail_uri(newest).partition(",")[2])))
    assert (shown.format, shown.size, shown.tobytes()) == ("JPEG", (16, 16), expected.tobytes())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_training_goes_on_where_the_newest_preview_of_an_earlier_attempt_is_damaged(
    train: Train, spec: TrainSpec, store: InMemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    spec = longer(spec, previews_every=5)
    key = train(spec, Told(stop_at=5))["output"]["samples"][-2]["key"]
    read: list[str] = []

    def gone(_: Artifacts, key: str) -> bytes:
        """Deleted after it was listed."""
        read.append(key)
        raise ObjectNotFound(key)

    if damage == "cut":
        asyncio.run(store.put(key, get(store, key)[:60]))
    else:
        monkeypatch.setattr(Artifacts, "read_sample", gone)
    output = train(spec)["output"]
    assert output["loras"]
    shown = thumbnail_of(get(store, output["loras"][0]["key"]), tmp_path)
    assert shown.size == (16, 16)
    assert read == ([key] if damage == "gone" else [])


def test_a_thumbnail_is_small_whatever_the_picture() -> None:
    uri = thumbnail_uri(Image.effect_noise((1024, 512), 80).convert("RGBA"))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (256, 128)


@pytest.mark.parametrize("stops", [False, True])
def test_previews_leave_the_models_layers_as_they_found_them(family: Family, tmp_path: Path, stops: bool) -> None:
    lora = attach_lora(family, rank=2, alpha=2.0)
    spec = SampleSpec.model_validate({"previews": [{"prompt": "a"}], "width_px": 16, "height_px": 16, "steps": 1})
    previews = Previews(family, lora, spec, name="a", scratch=tmp_path, store=store_nowhere)
    classes = [type(module) for module in family.denoiser.modules()]
    asked = iter([False, True, True, True])
    try:
        previews.make(1, (lambda: next(asked)) if stops else (lambda: False))
    except Cancelled:
        assert stops
    assert [type(module) for module in family.denoiser.modules()] == classes
