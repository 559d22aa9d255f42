"""Every family in one batch with different LoRAs, and the families that can start from a picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.lora import save_lora
from diffusion.testing import MAKERS, write_tiny_model

TOLERANCE = 1e-4
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (32, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((16, 32), dtype=np.uint8)))
PLAIN = GenerateRequest(prompt="a red ring", width=64, height=32, steps=3, guidance_scale=4.0, seed=3)
STOCK = {"sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux1": "Flux"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(name, tmp_path_factory.mktemp(name)) for name in MAKERS}


def write_lora(family: Family, path: Path, seed: int, rank: int, components: list[str]) -> Path:
    lora = attach_lora(family, rank=rank, alpha=rank, targets="all", components=components)
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in lora.state_dict().items()}
    save_lora(path, state, metadata=lora.metadata(title=path.stem))
    lora.detach()
    return path


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", list(MAKERS))
def test_different_loras_share_a_batch_and_each_picture_is_its_solo_picture(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = load_family(folders[name], device="cpu", dtype=torch.float32)
    components = list(family.lora_components)
    denoiser = write_lora(family, tmp_path / "denoiser.safetensors", 1, 3, components[:1])
    whole = write_lora(family, tmp_path / "whole.safetensors", 2, 6, components)
    requests = [
        dataclasses.replace(PLAIN, loras=(LoraRef(denoiser),)),
        PLAIN,
        dataclasses.replace(PLAIN, prompt="blue, and rather longer", loras=(LoraRef(whole, 0.5),), steps=4),
        dataclasses.replace(PLAIN, loras=(LoraRef(whole, -0.3), LoraRef(denoiser, 0.4)), guidance_scale=1.0),
    ]
    engine = Engine(family)
    calls: list[int] = []
    predict = family.predict

    def counted(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(latents))
        return predict(latents, *args, **kwargs)

    family.predict = counted  # type: ignore[method-assign]
    together = [rendered.pixels_CHW for rendered in engine.render(requests)]
    assert len(calls) == 4  # as many as the longest of them has steps
    for request, made in zip(requests, together, strict=True):
        assert difference(made, engine.render([request])[0].pixels_CHW) < TOLERANCE
    assert difference(together[0], together[1]) > 10 * TOLERANCE


def write_caption_lora(family: Family, path: Path, seed: int) -> LoraRef:
    """On the layer that Z-Image gives the prompts of a batch as one row of tokens."""
    generator, layer = torch.Generator().manual_seed(seed), family.denoiser.get_submodule("cap_embedder.1")
    shapes = {"lora_A": (4, layer.in_features), "lora_B": (layer.out_features, 4)}
    state = {
        f"transformer.cap_embedder.1.{part}.weight": torch.randn(shape, generator=generator)
        for part, shape in shapes.items()
    }
    save_lora(path, state, metadata={})
    return LoraRef(path)


@pytest.mark.parametrize("long", ["much longer", "much longer " * 4, "much longer " * 12])
def test_prompts_of_different_lengths_keep_their_own_loras_of_z_images_captions(
    long: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = load_family(folders["z_image"], device="cpu", dtype=torch.float32)
    one, two = (write_caption_lora(family, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    requests = [
        dataclasses.replace(PLAIN, loras=(one,)),
        dataclasses.replace(PLAIN, loras=(two,), prompt=long),
        dataclasses.replace(PLAIN, prompt="x " * 30),
    ]
    engine = Engine(family)
    together = [rendered.pixels_CHW for rendered in engine.render(requests)]
    for request, made in zip(requests, together, strict=True):
        assert difference(made, engine.render([request])[0].pixels_CHW) < TOLERANCE
    plain = engine.render([dataclasses.replace(requests[0], loras=())])[0].pixels_CHW
    assert difference(together[0], plain) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "mask"), [("sdxl", None), ("sdxl", MASK), ("sd3", None), ("flux1", None), ("flux1", MASK)]
)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_a_picture_from_a_picture_equals_the_stock_pipelines(
    name: str, mask: Image.Image | None, strength: float, folders: dict[str, Path]
) -> None:
    pipeline = getattr(diffusers, f"{STOCK[name]}{'Img2Img' if mask is None else 'Inpaint'}Pipeline").from_pretrained(
        folders[name], local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {} if mask is None else {"mask_image": mask}
    if name != "sdxl" or mask is not None:  # the one that takes its size from the picture
        options |= {"width": 64, "height": 32}
    negative = "" if name == "flux1" else "bad"
    if negative:
        options["negative_prompt"] = negative
    theirs = pipeline(
        prompt=PLAIN.prompt, image=PICTURE, strength=strength, num_inference_steps=4, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), output_type="pt", **options,
    ).images[0]  # fmt: skip
    family = load_family(folders[name], device="cpu", dtype=torch.float32)
    request = dataclasses.replace(
        PLAIN, negative_prompt=negative, steps=4, init_image=PICTURE, mask=mask, strength=strength
    )
    [made] = Engine(family).render([request])
    assert difference(made.pixels_CHW, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "mask"),
    [("z_image", None), ("qwen_image", None), ("flux2_klein", None), ("flux2_dev", None), ("sd3", MASK)],
)
def test_what_a_family_cannot_start_from_is_refused(
    name: str, mask: Image.Image | None, folders: dict[str, Path]
) -> None:
    engine = Engine(load_family(folders[name], device="cpu", dtype=torch.float32))
    with pytest.raises(SettingNotSupported) as caught:
        engine.submit([dataclasses.replace(PLAIN, init_image=PICTURE, mask=mask)])
    assert caught.value.setting == ("init_image" if mask is None else "mask")
