from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest
from diffusion.engine.start import size_near
from diffusion.errors import SettingNotSupported
from diffusion.families import StableDiffusion1
from diffusion.families.discrete import SCHEDULERS

TOLERANCE = 1e-4
RNG = np.random.default_rng(3)
PICTURE = Image.fromarray(RNG.integers(0, 255, (48, 64, 3), dtype=np.uint8)).resize((64, 48))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((24, 32), dtype=np.uint8)))
PLAIN = GenerateRequest(prompt="a red ring", steps=6, guidance_scale=4.0, seed=3, init_image=PICTURE, strength=0.6)


def stock_pixels(stock: Any, request: GenerateRequest) -> Tensor:
    kind = (
        diffusers.StableDiffusionImg2ImgPipeline if request.mask is None else diffusers.StableDiffusionInpaintPipeline
    )
    pipeline = kind(**stock.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    if request.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[request.scheduler]).from_config(stock.scheduler.config)
    masked = {} if request.mask is None else {"mask_image": request.mask, "width": 64, "height": 48}
    made = pipeline(
        request.prompt, image=request.init_image, strength=request.strength, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale, generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np", **masked,
    ).images[0]  # fmt: skip
    return torch.from_numpy(np.asarray(made)).permute(2, 0, 1)


@pytest.mark.parametrize("scheduler", [None, "euler", "euler_a", "dpm++", "heun"])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_picture_from_a_picture_equals_the_stock_pipelines(
    scheduler: str | None, mask: Image.Image | None, family: StableDiffusion1, stock: Any
) -> None:
    request = dataclasses.replace(PLAIN, scheduler=scheduler, mask=mask)
    [made] = Engine(family).render([request])
    assert float((made.pixels_CHW - stock_pixels(stock, request)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("mask", [None, MASK])
def test_full_strength_equals_the_stock_pipelines(
    mask: Image.Image | None, family: StableDiffusion1, stock: Any
) -> None:
    request = dataclasses.replace(PLAIN, strength=1.0, scheduler="euler_a", mask=mask)
    [made] = Engine(family).render([request])
    assert float((made.pixels_CHW - stock_pixels(stock, request)).abs().max()) < TOLERANCE


def test_all_three_starts_share_a_batch(family: StableDiffusion1) -> None:
    requests = [
        PLAIN,
        dataclasses.replace(PLAIN, mask=MASK, strength=0.9),
        dataclasses.replace(PLAIN, init_image=None, width=64, height=48),
    ]
    engine = Engine(family)
    for request, made in zip(requests, engine.render(requests), strict=True):
        assert float((made.pixels_CHW - engine.render([request])[0].pixels_CHW).abs().max()) < TOLERANCE


def test_the_size_is_the_pictures_own_rounded_down_to_what_the_model_makes(family: StableDiffusion1) -> None:
    [made] = Engine(family).generate([dataclasses.replace(PLAIN, init_image=PICTURE.resize((70, 50)))])
    assert made.image.size == (64, 48)
    assert made.settings["mode"] == "image_to_image"
    assert made.settings["strength"] == 0.6


@pytest.mark.parametrize(
    ("size", "asked", "made"),
    [
        ((70, 50), (None, None), (64, 48)),
        ((70, 50), (140, None), (140, 96)),
        ((70, 50), (None, 100), (136, 100)),
        ((70, 50), (32, 16), (32, 16)),
        ((4000, 3000), (None, None), (1536, 1152)),
        ((3, 300), (None, None), (8, 296)),
    ],
)
def test_sides_that_are_not_asked_for_follow_the_picture(
    size: tuple[int, int], asked: tuple[int | None, int | None], made: tuple[int, int]
) -> None:
    assert size_near(Image.new("L", size), 8, *asked) == made


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.1}, "strength"),
        ({"strength": 0.1}, "strength"),  # of six steps, none
        ({"init_image": None, "mask": MASK}, "mask"),
    ],
)
def test_what_leaves_nothing_to_do_is_refused(changes: dict[str, Any], setting: str, family: StableDiffusion1) -> None:
    with pytest.raises(SettingNotSupported) as caught:
        Engine(family).submit([dataclasses.replace(PLAIN, **changes)])
    assert caught.value.setting == setting
