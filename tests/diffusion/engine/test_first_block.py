"""Steps that reuse an earlier one: equal to diffusers' own, decided by each picture alone, and off unless asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.offload import offload
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.lora import save_lora
from diffusion.testing import write_tiny_model

TOLERANCE = 1e-4
THRESHOLD = 0.3
# Where random weights make a first block's answer change more from step to step.
THRESHOLDS = {"flux1": 0.3, "flux2_klein": 2.0, "flux2_dev": 2.0, "sd3": 0.3, "qwen_image": 0.3, "z_image": 2.0}
FAMILIES = list(THRESHOLDS)
PLAIN = GenerateRequest(prompt="a red ring", width=64, height=32, steps=8, guidance_scale=4.0, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(name, tmp_path_factory.mktemp(name)) for name in [*FAMILIES, "sd1"]}


def load(folder: Path) -> Family:
    return load_family(folder, device="cpu", dtype=torch.float32)


def cached(threshold: float | None = THRESHOLD, **changes: Any) -> GenerateRequest:
    return dataclasses.replace(PLAIN, first_block_cache=threshold, **changes)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def write_lora(family: Family, path: Path) -> Path:
    lora = attach_lora(family, rank=3, alpha=3, targets="all")
    generator = torch.Generator().manual_seed(1)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in lora.state_dict().items()}
    save_lora(path, state, metadata=lora.metadata(title="a"))
    lora.detach()
    return path


def block_rows(family: Family) -> list[int]:
    """Grows by the rows of every call of the last block."""
    rows: list[int] = []
    blocks: nn.ModuleList = getattr(family.denoiser, family.block_lists[-1])
    blocks[-1].register_forward_hook(
        lambda module, args, options, output: rows.append(len(output[-1] if isinstance(output, tuple) else output)),
        with_kwargs=True,
    )
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_mixed_batch_each_picture_reuses_what_it_reuses_alone(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = load(folders[name])
    lora = LoraRef(write_lora(family, tmp_path / "a.safetensors"), 0.5)
    requests = [
        cached(THRESHOLDS[name]),
        PLAIN,
        cached(0.1, prompt="blue, and rather longer", seed=4, loras=(lora,)),
        cached(THRESHOLDS[name], seed=5, steps=5, guidance_scale=1.0),
        cached(0.0, loras=(lora,)),
    ]
    engine = Engine(family)
    together = engine.render(requests)
    rows = block_rows(family)
    for request, made in zip(requests, together, strict=True):
        rows.clear()
        [alone] = engine.render([request])
        assert difference(made.pixels_CHW, alone.pixels_CHW) < TOLERANCE
        assert made.steps_reused == alone.steps_reused == request.steps - len(rows)
    reused = [made.steps_reused for made in together]
    assert reused[0] > 0
    assert reused[1] == reused[4] == 0
    exact = engine.render([PLAIN, dataclasses.replace(PLAIN, loras=(lora,))])
    assert difference(together[1].pixels_CHW, exact[0].pixels_CHW) < TOLERANCE
    assert difference(together[4].pixels_CHW, exact[1].pixels_CHW) < TOLERANCE
    assert difference(together[0].pixels_CHW, exact[0].pixels_CHW) > TOLERANCE


# Of the families whose stock transformers have it; Qwen-Image's decides apart for the two rows of guidance.
@pytest.mark.parametrize(
    ("name", "guidance"), [("flux1", {"guidance_scale": 4.0}), ("qwen_image", {"true_cfg_scale": 1})]
)
@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_a_picture_equals_the_one_of_diffusers_own_first_block_cache(
    name: str, guidance: dict[str, float], threshold: float, folders: dict[str, Path]
) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders[name], local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    theirs = pipeline(
        PLAIN.prompt, width=PLAIN.width, height=PLAIN.height, num_inference_steps=PLAIN.steps,
        generator=torch.Generator("cpu").manual_seed(PLAIN.seed), output_type="pt", **guidance,
    ).images[0]  # fmt: skip
    [made] = Engine(load(folders[name])).render([cached(threshold, guidance_scale=next(iter(guidance.values())))])
    assert difference(made.pixels_CHW, theirs) < TOLERANCE


def test_blocks_run_only_for_those_that_do_not_reuse(folders: dict[str, Path]) -> None:
    family = load(folders["flux1"])
    rows = block_rows(family)
    engine = Engine(family)
    request = cached(1.0)
    [made] = engine.render([request])
    alone = sum(rows)
    assert alone == request.steps - made.steps_reused < request.steps
    rows.clear()
    engine.render([request, PLAIN])
    assert sum(rows) == alone + PLAIN.steps


def test_a_model_whose_parts_take_turns_reuses_the_same(folders: dict[str, Path]) -> None:
    [whole] = Engine(load(folders["flux1"])).render([cached()])
    family = load(folders["flux1"])
    offload(family, torch.device("cpu"))
    [made] = Engine(family).render([cached()])
    assert made.steps_reused == whole.steps_reused > 0
    assert torch.equal(made.pixels_CHW, whole.pixels_CHW)


def test_the_servers_default_is_for_models_with_blocks_and_a_request_may_switch_it_off(
    folders: dict[str, Path],
) -> None:
    engine = Engine(load(folders["flux1"]), first_block_cache=THRESHOLD)
    by_default, off = engine.generate([PLAIN, cached(0.0)])
    assert by_default.settings["first_block_cache"] == THRESHOLD
    assert by_default.settings["steps_reused"] > 0
    assert "first_block_cache" not in off.settings
    unet = Engine(load(folders["sd1"]), first_block_cache=THRESHOLD)
    assert "steps_reused" not in unet.generate([dataclasses.replace(PLAIN, steps=1)])[0].settings
    with pytest.raises(SettingNotSupported, match="first_block_cache: sd1 is a UNet"):
        unet.submit([cached()])
