"""Models whose parts take turns on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.offload import offload
from diffusion.families import Family, StableDiffusion1, load_family
from diffusion.testing import write_tiny_model


def requests(*loras: LoraRef) -> list[GenerateRequest]:
    plain = {"prompt": "a red ring", "width": 64, "height": 64, "steps": 3, "guidance_scale": 5.0, "loras": loras}
    start = Image.new("RGB", (64, 64), "red")
    return [GenerateRequest(seed=1, **plain), GenerateRequest(seed=2, init_image=start, **plain)]  # type: ignore[arg-type]


def pixels(family: Family, *loras: LoraRef) -> list[Tensor]:
    return [made.pixels_CHW for made in Engine(family).render(requests(*loras))]


def watch_moves(part: nn.Module, name: str, moves: list[tuple[str, str]]) -> None:
    """Notes where the part is sent; on a machine without an accelerator, that is all that there is to see."""
    to = part.to

    def noted(device: object) -> nn.Module:
        moves.append((name, "in" if isinstance(device, torch.device) else "out"))
        return to(device)  # type: ignore[call-overload, no-any-return]

    part.to = noted  # type: ignore[assignment, method-assign]


def test_the_parts_take_turns_and_make_the_same_pictures(
    family: StableDiffusion1, loaded_family: StableDiffusion1, write_lora: Callable[..., Path]
) -> None:
    lora = LoraRef(write_lora("x", components=("unet", "text_encoder")), 0.5)
    expected = pixels(loaded_family, lora)
    moves: list[tuple[str, str]] = []
    for name, part in (("text", family.text_encoder), ("unet", family.unet), ("vae", family.vae)):
        watch_moves(part, name, moves)
    offload(family, torch.device("cpu"))
    made = pixels(family, lora)
    assert all(torch.equal(a, b) for a, b in zip(expected, made, strict=True))
    # The picture that starts from another one is encoded first and ends a step earlier.
    assert [name for name, way in moves if way == "in"] == ["text", "vae", "unet", "vae", "unet", "vae"]
    assert moves[:3] == [("unet", "out"), ("vae", "out"), ("text", "in")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux1", "flux2_klein", "qwen_image", "z_image"])
def test_on_an_accelerator_one_part_is_there_at_a_time(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path)
    whole = load_family(folder, device="cuda", dtype=torch.float32)
    family = load_family(folder, device="cpu", dtype=torch.float32)
    offload(family, torch.device("cuda"))
    plain = GenerateRequest(prompt="a red ring", width=64, height=64, steps=2, seed=1)
    [expected], [made] = Engine(whole).render([plain]), Engine(family).render([plain])
    assert float((expected.pixels_CHW - made.pixels_CHW).abs().max()) < 1e-4
    devices = {next(part.parameters()).device.type for part in family.lora_components.values()}
    assert devices == {"cpu"}
    assert family.vae.device.type == "cuda"
