"""A replica with the real engine and the tiny model: pictures from pictures are those of the stock pipelines."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.engine import Engine
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from serve_app.inference.engines import DeviceFacts, EngineShelf
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.plan import GenerationRequest, GenerationWork, StartingPoint, StoredPicture
from serve_app.inference.service import InferenceService
from serve_app.settings import TINY_MODEL
from serve_app.testing import keys_of
from storage.errors import IntegrityError
from storage.testing import InMemoryStore
from train_jobs.generate_spec import GenerateSpec

ID, PROMPT = "gen_0123456789ab", "a large red star on a blue background"
RNG = np.random.default_rng(3)
PICTURE = Image.fromarray(np.kron(RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((24, 32), dtype=np.uint8)))


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


async def stored(store: InMemoryStore, role: str, data: bytes) -> StoredPicture:
    sha256 = hashlib.sha256(data).hexdigest()
    key = keys_of("matt").input_picture(ID, role, sha256, "png")
    await store.put(key, data)
    return StoredPicture(key=key, sha256=sha256)


class Replica:
    def __init__(self, family: Family, folder: Path) -> None:
        self.store = InMemoryStore()
        self.service = InferenceService(
            store=self.store,
            keys_of=keys_of,
            shelf=EngineShelf({"tiny": "tiny"}, lambda _: Engine(family)),
            loras=LoraCache(self.store, folder, bytes_max=1),
            device=lambda: DeviceFacts("cpu"),
        )

    async def made(self, start: StartingPoint, **fields: Any) -> dict[str, Any]:
        spec = GenerateSpec(
            prompts=(PROMPT,), model="tiny", num_inference_steps=5, guidance_scale=3.0, seed=3, **fields
        )
        work = GenerationWork(ID, "matt", GenerationRequest(spec=spec, start=start).as_json())
        events = [event async for event in self.service.generate(work)]
        image: dict[str, Any] = events[-1]["output"]["images"][0]
        return image

    async def pixels(self, image: dict[str, Any]) -> np.ndarray[Any, Any]:
        return np.asarray(Image.open(io.BytesIO(await self.store.get(image["key"])))).astype(int)


@pytest.fixture(scope="module")
def family() -> Family:
    return load_family(TINY_MODEL, device="cpu", dtype=torch.float32)


@pytest.fixture
def replica(family: Family, tmp_path: Path) -> Replica:
    return Replica(family, tmp_path)


def stock_pixels(mask: Image.Image | None, strength: float) -> np.ndarray[Any, Any]:
    kind = diffusers.StableDiffusionImg2ImgPipeline if mask is None else diffusers.StableDiffusionInpaintPipeline
    pipeline = kind.from_pretrained(
        str(TINY_MODEL), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    masked = {} if mask is None else {"mask_image": mask, "width": 64, "height": 48}
    made = pipeline(
        PROMPT, image=PICTURE, strength=strength, num_inference_steps=5, guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(3), **masked,
    ).images[0]  # fmt: skip
    return np.asarray(made).astype(int)


@pytest.mark.parametrize("mask", [None, MASK])
async def test_the_picture_is_the_stock_pipelines(mask: Image.Image | None, replica: Replica) -> None:
    start = StartingPoint(
        init_image=await stored(replica.store, "init_image", png(PICTURE)),
        mask=None if mask is None else await stored(replica.store, "mask", png(mask)),
        strength=0.6,
    )
    image = await replica.made(start)
    difference = np.abs(await replica.pixels(image) - stock_pixels(mask, 0.6)).max()
    assert difference <= 1  # where rounding to bytes meets the order of sums
    assert (image["width"], image["height"]) == (64, 48)
    mode = "image_to_image" if mask is None else "inpainting"
    assert (image["settings"]["mode"], image["settings"]["strength"]) == (mode, 0.6)


async def test_the_size_asked_for_is_what_the_picture_is_resized_to(replica: Replica) -> None:
    start = StartingPoint(init_image=await stored(replica.store, "init_image", png(PICTURE)))
    image = await replica.made(start, width=32, height=40)
    assert (image["width"], image["height"]) == (32, 40)


async def test_a_photograph_is_seen_upright(replica: Replica) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    start = StartingPoint(init_image=await stored(replica.store, "init_image", png(PICTURE, exif=exif)))
    image = await replica.made(start)
    assert (image["width"], image["height"]) == (48, 64)


async def test_a_mask_of_16_bits_is_dark_where_it_is_dark(replica: Replica) -> None:
    """Half of it is a grey that counts as dark; 16 bits read as 8 would make all of it light."""
    shades = np.asarray(MASK.convert("L")).astype(np.uint16) * 100 + 5000
    start = StartingPoint(
        init_image=await stored(replica.store, "init_image", png(PICTURE)),
        mask=await stored(replica.store, "mask", png(Image.fromarray(shades))),
        strength=0.6,
    )
    dark = StartingPoint(
        init_image=start.init_image,
        mask=await stored(replica.store, "mask", png(Image.new("L", MASK.size))),
        strength=0.6,
    )
    found = await replica.pixels(await replica.made(start))
    assert np.array_equal(found, await replica.pixels(await replica.made(dark)))


async def test_a_picture_with_other_bytes_is_not_used(replica: Replica) -> None:
    start = StartingPoint(init_image=await stored(replica.store, "init_image", png(PICTURE)))
    await replica.store.put(start.init_image.key, png(MASK))
    with pytest.raises(IntegrityError):
        await replica.made(start)


async def test_a_family_that_cannot_do_it_says_so_by_name(
    replica: Replica, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(family), "name", "sd3")
    picture = await stored(replica.store, "init_image", png(PICTURE))
    with pytest.raises(SettingNotSupported) as caught:
        await replica.made(StartingPoint(init_image=picture, mask=picture))
    assert caught.value.setting == "mask"
