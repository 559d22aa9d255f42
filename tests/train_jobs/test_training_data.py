from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion.families import ALL_LEVELS, Family
from train_jobs.cache import build_cache
from train_jobs.captions import varied, with_trigger
from train_jobs.data import (
    BatchPlan,
    Picture,
    Use,
    bucket_size,
    load_mask,
    load_pixels,
    plan_uses,
    read_folder,
)
from train_jobs.errors import DatasetEmpty, ImageUnreadable
from train_jobs.samples import Sampler
from train_jobs.spec import DatasetSpec, OptimizeSpec

Write = Callable[..., Path]


def _spec(**fields: Any) -> DatasetSpec:
    return DatasetSpec(**({"dataset": "cats", "resolutions_px": (32,), "bucket_step_px": 8} | fields))


def _picture(path: Path, width_px: int = 40, height_px: int = 20) -> Picture:
    return Picture(path, path.name, width_px, height_px, "")


def test_pictures_are_read_with_their_captions_in_name_order(write_pictures: Write) -> None:
    folder = write_pictures((40, 20), (16, 16))
    (folder / "p1.txt").write_text("\ufeff a\n  cat \t", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"no")
    pictures = read_folder(folder, _spec())
    assert [(p.name, p.caption) for p in pictures] == [("p0.png", "picture 0"), ("p1.png", "a cat")]
    assert (pictures[0].width_px, pictures[0].height_px) == (40, 20)


def test_a_picture_without_caption_has_the_default_one(write_pictures: Write) -> None:
    folder = write_pictures((8, 8), captions=False)
    assert read_folder(folder, _spec(default_caption="a [trigger]", trigger_word="ohwx"))[0].caption == "a ohwx"
    assert read_folder(folder, _spec())[0].caption == ""


@pytest.mark.parametrize(
    ("text", "word", "caption"),
    [
        ("a [trigger] here", "ohwx", "a ohwx here"),
        ("a cat", "ohwx", "ohwx a cat"),
        ("a ohwx", "ohwx", "a ohwx"),
        ("a [trigger]", None, "a"),
        ("", "ohwx", "ohwx"),
        (r"[trigger]", r"\1", r"\1"),
    ],
)
def test_the_trigger_word_is_always_in_the_caption(text: str, word: str | None, caption: str) -> None:
    assert with_trigger(text, word) == caption


def test_a_regularisation_picture_has_the_trigger_word_only_where_its_text_asks_for_it(write_pictures: Write) -> None:
    folder = write_pictures((8, 8), (8, 8))
    (folder / "p0.txt").write_text("a man, red")
    (folder / "p1.txt").write_text("a [trigger], red")
    spec = _spec(is_regularisation=True, trigger_word="ohwx")
    pictures = read_folder(folder, spec)
    assert [picture.caption for picture in pictures] == ["a man, red", "a ohwx, red"]
    rules = plan_uses(pictures, spec, size_multiple=8)[0].rules
    assert varied(pictures[0].text, rules, torch.Generator()) == "a man, red"
    assert read_folder(folder, _spec(trigger_word="ohwx"))[0].caption == "ohwx a man, red"


def test_every_broken_picture_is_named_at_once(write_pictures: Write) -> None:
    folder = write_pictures((64, 64), (64, 64), (64, 64))
    (folder / "p0.png").write_bytes((folder / "p0.png").read_bytes()[:60])
    (folder / "p2.png").write_bytes(b"not a picture")
    with pytest.raises(ImageUnreadable) as caught:
        read_folder(folder, _spec())
    assert caught.value.names == ("p0.png", "p2.png")


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DatasetEmpty):
        read_folder(tmp_path, _spec())
    with pytest.raises(DatasetEmpty):
        read_folder(tmp_path / "missing", _spec())


def test_a_turned_photo_is_trained_on_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    picture = read_folder(tmp_path, _spec())[0]
    assert (picture.width_px, picture.height_px) == (20, 40)
    assert load_pixels(Use(picture, 8, 16, False, 1, 0.0)).shape == (3, 16, 8)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    resolution=st.integers(64, 1024),
    step=st.sampled_from([8, 16, 64]),
)
def test_a_bucket_is_on_the_step_and_not_larger_than_the_resolution(
    width: int, height: int, resolution: int, step: int
) -> None:
    columns, rows = bucket_size(width, height, resolution, step)
    assert columns % step == rows % step == 0
    assert min(columns, rows) >= step
    assert columns * rows <= max(resolution * resolution, step * max(columns, rows))


def test_a_bucket_keeps_the_shape_of_the_picture() -> None:
    assert bucket_size(1920, 1080, 512, 64) == (640, 384)
    assert bucket_size(1080, 1920, 512, 64) == (384, 640)
    assert bucket_size(100, 100, 512, 64) == (128, 128)
    assert bucket_size(40, 20, 16, 8) == (16, 8)


def test_each_picture_is_used_at_each_resolution_and_mirrored(tmp_path: Path) -> None:
    pictures = [_picture(tmp_path / "a.png"), _picture(tmp_path / "b.png", 20, 40)]
    uses = plan_uses(pictures, _spec(resolutions_px=(16, 32), flip_x=True, repeats=3), size_multiple=4)
    assert len(uses) == 8
    assert Counter((u.width_px > u.height_px) for u in uses) == {True: 4, False: 4}
    assert sum(u.is_flipped for u in uses) == 4
    assert {u.repeats for u in uses} == {3}


def test_without_buckets_every_picture_is_a_square(tmp_path: Path) -> None:
    uses = plan_uses([_picture(tmp_path / "a.png")], _spec(buckets=False, resolutions_px=(30,)), size_multiple=8)
    assert (uses[0].width_px, uses[0].height_px) == (24, 24)


def test_pixels_are_in_the_range_of_the_model_and_mirrored_on_demand(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (4, 0, 8, 8))
    image.save(tmp_path / "a.png")
    picture = _picture(tmp_path / "a.png", 8, 8)
    plain = load_pixels(Use(picture, 8, 8, False, 1, 0.0))
    flipped = load_pixels(Use(picture, 8, 8, True, 1, 0.0))
    assert (plain.min(), plain.max()) == (-1.0, 1.0)
    assert np.array_equal(plain[:, :, ::-1], flipped)


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_pixels(Use(_picture(tmp_path / "a.png", 8, 8), 8, 8, False, 1, 0.0)).min() == 1.0


def test_a_picture_and_a_mask_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    shades = np.full((64, 64), 13_107, dtype=np.uint16)
    for name in ("a.png", "a_mask.png"):
        Image.fromarray(shades).save(tmp_path / name)
    spec = _spec(resolutions_px=(64,))
    [use] = plan_uses(read_folder(tmp_path, spec), spec, size_multiple=8)
    assert load_pixels(use) == pytest.approx(0.2 * 2 - 1, abs=1e-6)
    assert load_mask(use) == pytest.approx(0.2)


def test_a_picture_whose_white_is_unknown_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "a.png", "tiff")
    with pytest.raises(ImageUnreadable) as caught:
        read_folder(tmp_path, _spec())
    assert caught.value.names == ("a.png",)


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadable):
        load_pixels(Use(_picture(tmp_path / "gone.png"), 8, 8, False, 1, 0.0))


@given(
    buckets=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_entry_comes_once_an_epoch_in_batches_of_one_bucket(
    buckets: list[str], batch_size: int, seed: int
) -> None:
    plan = BatchPlan(buckets, batch_size=batch_size, seed=seed)
    for epoch in range(2):
        batches = [plan.batch(epoch * plan.batches_per_epoch + i) for i in range(plan.batches_per_epoch)]
        assert sorted(e for b in batches for e in b.entries) == list(range(len(buckets)))
        assert all(len({buckets[e] for e in b.entries}) == 1 for b in batches)
        assert all(len(b.entries) <= batch_size and b.epoch == epoch for b in batches)


def test_a_batch_depends_only_on_its_number() -> None:
    def plan() -> BatchPlan:
        return BatchPlan(["a"] * 7 + ["b"] * 4, batch_size=2, seed=5)

    forwards = [plan().batch(i) for i in range(30)]
    shared = plan()
    assert [shared.batch(i) for i in reversed(range(30))] == forwards[::-1]


def test_latents_and_texts_are_computed_once_for_each_use(family: Family, write_pictures: Write) -> None:
    spec = _spec(flip_x=True, repeats=2)
    uses = plan_uses(read_folder(write_pictures((32, 32), (32, 16)), spec), spec, size_multiple=family.size_multiple)
    seen: list[tuple[int, int]] = []
    cache = build_cache(family, uses, on_progress=lambda done, total: seen.append((done, total)))
    assert cache is not None
    assert len(cache.uses) == 4
    assert len(cache.entries) == 8
    assert len(cache.texts) == 3
    assert seen[-1] == (4, 4)
    assert tuple(cache.entry(0).mean_CHW.shape) == family.latent_shape(32, 32)
    assert len(set(cache.buckets())) == 2


@torch.no_grad()
def test_a_dropped_caption_is_what_the_data_set_says(family: Family, write_pictures: Write) -> None:
    folder = write_pictures((32, 32))
    for dropped in ("", "ohwx"):
        spec = _spec(caption_dropout_rate=1.0, dropped_caption=dropped)
        cache = build_cache(family, plan_uses(read_folder(folder, spec), spec, size_multiple=8))
        assert cache is not None
        drawn = Sampler(family, cache, OptimizeSpec(dtype="fp32"))._draw(0, 0, ALL_LEVELS, 0.0)
        assert drawn.caption == dropped
        assert drawn.text is not None
        assert torch.equal(drawn.text.hidden_BLD, family.encode_prompts([dropped]).hidden_BLD)


def test_caching_stops_when_asked(family: Family, write_pictures: Write) -> None:
    uses = plan_uses(read_folder(write_pictures((32, 32)), _spec()), _spec(), size_multiple=8)
    assert build_cache(family, uses, should_stop=lambda: True) is None


def test_a_mask_beside_its_picture_weighs_its_loss(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("a_mask.png", "black"), ("b.png", "red")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    spec = DatasetSpec(dataset="cats", resolutions_px=(64,), mask_min_value=0.25)
    pictures = read_folder(tmp_path, spec)
    assert [picture.mask_path for picture in pictures] == [tmp_path / "a_mask.png", None]
    masked, plain = plan_uses(pictures, spec, size_multiple=8)
    mask = load_mask(masked)
    assert mask is not None
    assert (mask == 0.25).all()
    assert load_mask(plain) is None
