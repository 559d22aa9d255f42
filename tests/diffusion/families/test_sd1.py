from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusion.errors import ModelNotFound, SizeNotSupported, UnsupportedModel
from diffusion.families import Family, StableDiffusion1, TextEmbeds, load_family

KINDS = ["epsilon", "v_prediction"]
Break = Callable[[Path], object]


def load(folder: Path) -> Family:
    return load_family(folder, device="cpu", dtype=torch.float32)


def example_loss(
    pipeline: Any, noise_scheduler: Any, pixels: Tensor, prompts: list[str], noise: Tensor, timesteps: Tensor,
    snr_gamma: float | None,
) -> Tensor:  # fmt: skip
    """The training step of diffusers' examples/text_to_image/train_text_to_image_lora.py, with given randomness."""
    latents = pipeline.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    latents = latents * pipeline.vae.config.scaling_factor
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    ids = pipeline.tokenizer(
        prompts, max_length=pipeline.tokenizer.model_max_length, padding="max_length", truncation=True,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    encoder_hidden_states = pipeline.text_encoder(ids, return_dict=False)[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
    if snr_gamma is None:
        return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    snr = compute_snr(noise_scheduler, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    weights = weights / (snr if noise_scheduler.config.prediction_type == "epsilon" else snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
    weighted: Tensor = loss.mean(dim=list(range(1, len(loss.shape)))) * weights
    return weighted.mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_training_loss_equals_the_diffusers_examples(
    kind: str, snr_gamma: float | None, model_folders: dict[str, Path], load_stock: Callable[[Path], Any]
) -> None:
    folder, prompts = model_folders[kind], ["a red ring", "", "blue"]
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(3, 3, 64, 48, generator=generator) * 2 - 1
    noise = torch.randn(3, 4, 16, 12, generator=generator)
    family = load(folder)
    timesteps = family.sample_timesteps(3, generator)
    with torch.no_grad():
        latents = family.encode_images(pixels, torch.Generator().manual_seed(1))
        predicted = family.predict(
            family.add_noise(latents, noise, timesteps), timesteps, family.encode_prompts(prompts)
        )
        target = family.prediction_target(latents, noise, timesteps)
        per_picture = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
        loss = (per_picture * family.loss_weight(timesteps, snr_gamma)).mean()
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        expected = example_loss(load_stock(folder), scheduler, pixels, prompts, noise, timesteps, snr_gamma)
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_cached_moments_give_the_vaes_own_samples_scaled(family: StableDiffusion1) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = family.encode_image_moments(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 8)
    expected = family.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(4)) * 0.7
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(mean + std * noise, expected, atol=1e-6)
    assert not mean.requires_grad


def test_decoding_undoes_the_scaling(family: StableDiffusion1) -> None:
    latents = torch.randn(1, 4, 8, 8)
    expected = (family.vae.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(family.decode(latents), expected)


def test_training_timesteps_cover_the_schedule_and_repeat_with_the_seed(family: StableDiffusion1) -> None:
    first = family.sample_timesteps(4000, torch.Generator().manual_seed(1))
    assert torch.equal(first, family.sample_timesteps(4000, torch.Generator().manual_seed(1)))
    assert first.dtype == torch.int64
    assert set(first.tolist()) <= set(range(1000))
    assert len(set(first.tolist())) > 900


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_leads_back_to_the_latents(kind: str, model_folders: dict[str, Path]) -> None:
    family = load(model_folders[kind])
    latents, noise, timesteps = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([400])
    schedule = family.make_schedule("ddim", 1000, (4, 8, 8))
    target = family.prediction_target(latents, noise, timesteps)
    noisy = family.add_noise(latents, noise, timesteps)
    found = schedule.step(target, timesteps[0], noisy).pred_original_sample
    assert torch.allclose(found, latents, atol=1e-4)


def test_latent_shapes_follow_the_pictures_sides(family: StableDiffusion1) -> None:
    assert family.latent_shape(64, 40) == (4, 10, 16)
    assert (family.size_multiple, family.native_size_px) == (8, 64)
    with pytest.raises(SizeNotSupported):
        family.latent_shape(64, 36)


def test_weights_are_frozen_in_eval_mode_and_in_the_asked_dtype(model_folder: Path) -> None:
    family = load_family(model_folder, device="cpu", dtype=torch.bfloat16)
    assert isinstance(family, StableDiffusion1)
    for part in (family.unet, family.text_encoder, family.vae):
        assert not part.training
        assert {(p.dtype, p.requires_grad) for p in part.parameters()} == {(torch.bfloat16, False)}


def break_json(folder: Path, name: str) -> None:
    (folder / name).write_text("{")


def set_class(folder: Path, name: str, value: str) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | {"_class_name": value}))


@pytest.mark.parametrize(
    ("breaking", "error"),
    [
        (lambda folder: shutil.rmtree(folder), ModelNotFound),
        (lambda folder: break_json(folder, "model_index.json"), ModelNotFound),
        (lambda folder: set_class(folder, "model_index.json", "WonderPipeline"), UnsupportedModel),
        (lambda folder: shutil.rmtree(folder / "unet"), ModelNotFound),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink(), ModelNotFound),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), ModelNotFound),
        (lambda folder: break_json(folder, "scheduler/scheduler_config.json"), ModelNotFound),
        (lambda folder: set_class(folder, "scheduler/scheduler_config.json", "AutoencoderKL"), UnsupportedModel),
    ],
)
def test_a_broken_model_folder_is_an_error_without_its_path(
    breaking: Break, error: type[Exception], model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    breaking(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert str(tmp_path) not in str(caught.value)


def test_an_unknown_prediction_type_is_refused(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "guess"}))
    with pytest.raises(UnsupportedModel, match="guess"):
        load(folder)


def test_text_embeds_survive_a_cache_and_stack_with_padding() -> None:
    short = TextEmbeds(torch.ones(1, 2, 3), pooled_BD=torch.ones(1, 5), mask_BL=torch.ones(1, 2))
    long = TextEmbeds(torch.ones(2, 4, 3), pooled_BD=torch.ones(2, 5), mask_BL=torch.ones(2, 4))
    both = TextEmbeds.cat([short, TextEmbeds(**long.tensors())])
    assert (len(both), both.hidden_BLD.shape) == (3, (3, 4, 3))
    assert both.mask_BL is not None
    assert both.mask_BL[0].tolist() == [1, 1, 0, 0]
    assert both.hidden_BLD[0].sum() == 6
    assert len(both.rows([2, 0])) == 2
    half = both.rows(slice(1)).to(dtype=torch.bfloat16)
    assert half.hidden_BLD.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="mask"):
        TextEmbeds.cat([TextEmbeds(torch.ones(1, 2, 3)), TextEmbeds(torch.ones(1, 4, 3))])
