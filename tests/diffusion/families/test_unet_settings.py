"""What a UNet model's own configuration asks for, against the stock pipelines."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest
from diffusion.families import load_family
from diffusion.testing import write_tiny_model

TOLERANCE = 1e-4
PLAIN = GenerateRequest(
    prompt="a red ring", negative_prompt="bad", width=64, height=64, steps=3, guidance_scale=4.0, seed=3
)
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (64, 64, 3), dtype=np.uint8))
PLAYGROUND = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    return write_tiny_model("sdxl", tmp_path / "sdxl")


def stock_pixels(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    made: Tensor = pipeline(
        PLAIN.prompt, negative_prompt=PLAIN.negative_prompt, num_inference_steps=PLAIN.steps, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), output_type="pt", **options,
    ).images[0]  # fmt: skip
    return made


def our_pixels(folder: Path, dtype: torch.dtype, **changes: Any) -> Tensor:
    engine = Engine(load_family(folder, device="cpu", dtype=dtype))
    return engine.render([dataclasses.replace(PLAIN, **changes)])[0].pixels_CHW


def write_vae_settings(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_latents_have_the_mean_and_deviation_that_an_sdxl_vae_names(sdxl: Path) -> None:
    before = our_pixels(sdxl, torch.float32)
    write_vae_settings(sdxl, PLAYGROUND)
    made = our_pixels(sdxl, torch.float32)
    stock = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl, local_files_only=True)
    assert float((made - stock_pixels(stock, width=64, height=64)).abs().max()) < TOLERANCE
    assert float((made - before).abs().max()) > 10 * TOLERANCE


def test_a_picture_starts_from_latents_of_that_mean_and_deviation(sdxl: Path) -> None:
    write_vae_settings(sdxl, PLAYGROUND)
    made = our_pixels(sdxl, torch.float32, init_image=PICTURE, strength=0.7)
    stock = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl, local_files_only=True)
    assert float((made - stock_pixels(stock, image=PICTURE, strength=0.7)).abs().max()) < TOLERANCE


def test_an_sdxl_vae_that_overflows_in_float16_decodes_in_float32(sdxl: Path) -> None:
    weights = next((sdxl / "vae").glob("*.safetensors"))
    state = load_file(weights)
    for name in ("weight", "bias"):
        state[f"decoder.conv_in.{name}"] *= 60000
    save_file(state, weights, metadata={"format": "pt"})
    family = load_family(sdxl, device="cpu", dtype=torch.float16)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).half()
    made = family.decode(latents)
    vae = load_family(sdxl, device="cpu", dtype=torch.float32)
    assert not made.isnan().any()
    assert float((made - vae.decode(latents.float())).abs().max()) < 0.01
    assert family.vae.dtype == torch.float16
    write_vae_settings(sdxl, {"force_upcast": False})
    assert load_family(sdxl, device="cpu", dtype=torch.float16).decode(latents).isnan().any()


def test_an_sdxl_vae_encodes_in_float32_where_it_asks_for_that(sdxl: Path) -> None:
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    family = load_family(sdxl, device="cpu", dtype=torch.bfloat16)
    mean, _ = family.encode_image_moments(images)
    with torch.no_grad():
        exact = family.vae.to(torch.float32).encode(images).latent_dist.mean * 0.7
    assert float((mean - exact).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_unet_with_embedded_guidance_is_given_it(name: str, tmp_path: Path) -> None:
    source = write_tiny_model(name, tmp_path)
    stock = diffusers.DiffusionPipeline.from_pretrained(source, local_files_only=True)
    torch.manual_seed(0)
    stock.unet = diffusers.UNet2DConditionModel.from_config({**stock.unet.config, "time_cond_proj_dim": 32})
    shutil.rmtree(source / "unet")
    stock.unet.save_pretrained(source / "unet")
    made = our_pixels(source, torch.float32)
    assert float((made - stock_pixels(stock, width=64, height=64)).abs().max()) < TOLERANCE
    assert float((made - our_pixels(source, torch.float32, guidance_scale=8.0)).abs().max()) > 10 * TOLERANCE
