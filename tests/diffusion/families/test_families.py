"""Every family against the stock pipeline, and against the diffusers example script that trains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses
from diffusers import Flux2KleinPipeline, FluxPipeline, QwenImagePipeline
from peft import LoraConfig
from torch import Tensor

from diffusion.adapter import attach_lora, inject_adapter
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import SettingNotSupported, SizeNotSupported
from diffusion.families import FAMILIES, Family, LoraTargets, NoiseLevels, load_family
from diffusion.lora import save_lora
from diffusion.testing import MAKERS, write_tiny_model

FLOW = ["sd3", "flux1", "z_image", "qwen_image", "flux2_klein", "flux2_dev"]
OTHERS = ["sdxl", *FLOW]
PROMPTS = ["a red ring", "blue, and rather longer"]
STOCK: dict[str, dict[str, Any]] = {
    "sd1": {"negative_prompt": "bad", "guidance_scale": 4.0},
    "sdxl": {"negative_prompt": "bad", "guidance_scale": 4.0},
    "sd3": {"negative_prompt": "bad", "guidance_scale": 4.0},
    "flux1": {"guidance_scale": 4.0},
    "z_image": {"negative_prompt": "bad", "guidance_scale": 4.0},
    "qwen_image": {"negative_prompt": "bad", "true_cfg_scale": 4.0},
    "flux2_klein": {"guidance_scale": 4.0},
    "flux2_dev": {"guidance_scale": 4.0},
}
"""What the stock pipelines are called with for a guidance of 4."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(name, tmp_path_factory.mktemp(name)) for name in MAKERS}


def load(folder: Path) -> Family:
    return load_family(folder, device="cpu", dtype=torch.float32)


def load_stock(folder: Path, **options: Any) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_family_has_a_tiny_model() -> None:
    assert {family.name for family in FAMILIES.values()} == set(MAKERS)


def test_sd3_refuses_sides_beyond_its_positions(folders: dict[str, Path]) -> None:
    family = load(folders["sd3"])
    assert family.latent_shape(256, 64) == (8, 16, 64)
    with pytest.raises(SizeNotSupported, match=r"264x64 is not supported: .* multiples of 8 pixels, at most 256"):
        family.latent_shape(264, 64)


@pytest.mark.parametrize("name", MAKERS)
def test_a_picture_in_bf16_equals_the_stock_pipelines(name: str, folders: dict[str, Path]) -> None:
    pipe = load_stock(folders[name], dtype=torch.bfloat16)
    theirs = pipe(
        prompt=PROMPTS[0], width=64, height=32, num_inference_steps=8, generator=torch.Generator().manual_seed(3),
        output_type="pt", **STOCK[name],
    ).images[0]  # fmt: skip
    request = GenerateRequest(
        prompt=PROMPTS[0], negative_prompt=STOCK[name].get("negative_prompt", ""), width=64, height=32, steps=8,
        guidance_scale=4.0, seed=3,
    )  # fmt: skip
    engine = Engine(load_family(folders[name], device="cpu", dtype=torch.bfloat16))
    # Qwen-Image's stock pipeline asks for guidance's two rows one after another, which rounds in another way.
    tolerance = 2e-3 if name == "qwen_image" else 1e-4
    assert float((engine.render([request])[0].pixels_CHW - theirs).abs().mean()) < tolerance


def test_a_model_that_cannot_do_so_few_steps_says_so(folders: dict[str, Path]) -> None:
    family = load(folders["qwen_image"])
    with pytest.raises(SettingNotSupported, match="steps: 1 is too few"):
        family.make_schedule(None, 1, family.latent_shape(64, 64))
    assert len(family.make_schedule(None, 2, family.latent_shape(64, 64)).timesteps) == 2


# -- the example scripts' training steps, with given latents, noise and timesteps


def sdxl_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    side = torch.tensor([latents.shape[-2] * 4, latents.shape[-1] * 4])
    time_ids = torch.cat([side, torch.zeros(2), side]).repeat(len(PROMPTS), 1)
    added = {"time_ids": time_ids, "text_embeds": pooled}
    prediction = pipe.unet(noisy, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noise.float(), reduction="mean")


def _noisy(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    sigmas = (timesteps / 1000).reshape(-1, 1, 1, 1)
    return (1.0 - sigmas) * latents + sigmas * noise


def _flow_loss(prediction: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    target = noise - latents
    return torch.mean(((prediction.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()


def sd3_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    prediction = pipe.transformer(
        hidden_states=_noisy(latents, noise, timesteps), timestep=timesteps, encoder_hidden_states=embeds,
        pooled_projections=pooled, return_dict=False,
    )[0]  # fmt: skip
    return _flow_loss(prediction, latents, noise)


def flux1_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    embeds, pooled, text_ids = pipe.encode_prompt(PROMPTS, None)
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    packed = FluxPipeline._pack_latents(_noisy(latents, noise, timesteps), batch, channels, height, width)
    prediction = pipe.transformer(
        hidden_states=packed, timestep=timesteps / 1000, guidance=torch.tensor([1.0]).expand(batch),
        pooled_projections=pooled, encoder_hidden_states=embeds, txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0]  # fmt: skip
    prediction = FluxPipeline._unpack_latents(prediction, height * 4, width * 4, 4)
    return _flow_loss(prediction, latents, noise)


def z_image_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    embeds, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    inputs = list(_noisy(latents, noise, timesteps).unsqueeze(2).unbind(dim=0))
    outputs = pipe.transformer(inputs, (1000 - timesteps) / 1000, embeds, return_dict=False)[0]
    return _flow_loss(-torch.stack(outputs, dim=0).squeeze(2), latents, noise)


def qwen_image_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    embeds, mask = pipe.encode_prompt(PROMPTS, max_sequence_length=512)
    noisy = _noisy(latents, noise, timesteps).unsqueeze(1)
    prediction = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy, batch, channels, height, width),
        encoder_hidden_states=embeds, encoder_hidden_states_mask=mask, timestep=timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * batch, return_dict=False,
    )[0]  # fmt: skip
    prediction = QwenImagePipeline._unpack_latents(prediction, height * 2, width * 2, 2)
    return _flow_loss(prediction.squeeze(2), latents, noise)


def flux2_step(pipe: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    embeds, text_ids = pipe.encode_prompt(PROMPTS)
    ids = Flux2KleinPipeline._prepare_latent_ids(latents)
    packed = Flux2KleinPipeline._pack_latents(_noisy(latents, noise, timesteps))
    guidance = torch.full([1], 1.0).expand(len(latents)) if pipe.transformer.config.guidance_embeds else None
    prediction = pipe.transformer(
        hidden_states=packed, timestep=timesteps / 1000, guidance=guidance, encoder_hidden_states=embeds,
        txt_ids=text_ids, img_ids=ids, return_dict=False,
    )[0][:, : packed.size(1)]  # fmt: skip
    return _flow_loss(Flux2KleinPipeline._unpack_latents_with_ids(prediction, ids), latents, noise)


STEPS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "sdxl": sdxl_step,
    "sd3": sd3_step,
    "flux1": flux1_step,
    "z_image": z_image_step,
    "qwen_image": qwen_image_step,
    "flux2_klein": flux2_step,
    "flux2_dev": flux2_step,
}


def random_state(state: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize("name", OTHERS)
def test_a_training_steps_loss_and_gradients_equal_the_example_scripts(name: str, folders: dict[str, Path]) -> None:
    family, pipe = load(folders[name]), load_stock(folders[name])
    component = next(iter(family.lora_components))
    lora = attach_lora(family, rank=2, alpha=2, targets="all")
    state = random_state(lora.state_dict())
    lora.load_state_dict(state)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=family.lora_target_modules(component, "all"))
    part = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
    inject_adapter(getattr(pipe, component).requires_grad_(False), "default", config, part)
    generator = torch.Generator().manual_seed(2)
    shape = (2, *family.latent_shape(64, 32))
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    timesteps = family.sample_timesteps(2, generator)

    with torch.no_grad():
        text = family.encode_prompts(PROMPTS)
    predicted = family.predict(family.add_noise(latents, noise, timesteps), timesteps, text)
    error = (predicted - family.prediction_target(latents, noise, timesteps)).square().flatten(1).mean(1)
    loss = (error * family.loss_weight(timesteps)).mean()
    loss.backward()
    for parameter in getattr(pipe, component).parameters():
        parameter.requires_grad_(False)
    theirs = {n.replace(".default.", "."): p for n, p in getattr(pipe, component).named_parameters() if ".lora_" in n}
    for parameter in theirs.values():
        parameter.requires_grad_(True)
    expected = STEPS[name](pipe, latents, noise, timesteps)
    expected.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    ours = {key.removeprefix(f"{component}."): p.grad for key, p in lora.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        if gradient is None or theirs[key].grad is None:  # a block whose output the model does not use
            assert gradient is None
            assert theirs[key].grad is None
            continue
        assert torch.allclose(gradient, theirs[key].grad, atol=1e-5), key


@pytest.mark.parametrize("name", OTHERS)
def test_latents_of_a_picture_equal_the_stock_vaes(name: str, folders: dict[str, Path]) -> None:
    family = load(folders[name])
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = family.encode_image_moments(images)
    assert mean.shape[1:] == family.latent_shape(64, 32)
    assert mean.shape == std.shape
    assert family.decode(mean).shape == images.shape
    if name == "sd3":
        posterior = load_stock(folders[name]).vae.encode(images).latent_dist
        assert torch.allclose(mean, (posterior.mean - 0.06) * 0.7, atol=1e-5)


@pytest.mark.parametrize("targets", ["all", "ai_toolkit"])
@pytest.mark.parametrize("name", ["sd1", *OTHERS])
def test_a_trained_adapter_gives_the_same_picture_in_the_stock_pipeline(
    name: str, targets: LoraTargets, folders: dict[str, Path], tmp_path: Path
) -> None:
    family = load(folders[name])
    parts = [part for part in family.lora_components if not part.endswith("_2")]
    lora = attach_lora(family, rank=2, alpha=1, targets=targets, components=parts)
    path = tmp_path / "a.safetensors"
    save_lora(path, random_state(lora.state_dict()), metadata=lora.metadata(title="a"))
    lora.detach()
    request = GenerateRequest(
        prompt=PROMPTS[1], negative_prompt=STOCK[name].get("negative_prompt", ""), width=64, height=32, steps=3,
        guidance_scale=4.0, seed=3, loras=(LoraRef(path),),
    )  # fmt: skip
    plain = GenerateRequest(
        prompt=PROMPTS[1], negative_prompt=request.negative_prompt, width=64, height=32, steps=3, guidance_scale=4.0,
        seed=3,
    )  # fmt: skip
    engine = Engine(family)
    ours = engine.render([request])[0].pixels_CHW
    base = engine.render([plain])[0].pixels_CHW
    pipe = load_stock(folders[name])
    pipe.load_lora_weights(str(path))
    theirs = pipe(
        prompt=PROMPTS[1], width=64, height=32, num_inference_steps=3,
        generator=torch.Generator().manual_seed(3), output_type="pt", **STOCK[name],
    ).images[0]  # fmt: skip
    assert float((ours - theirs).abs().max()) <= 2e-5
    assert float((ours - base).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["sd1", *OTHERS])
def test_prompts_of_different_lengths_encode_the_same_alone_and_together(name: str, folders: dict[str, Path]) -> None:
    family = load(folders[name])
    with torch.no_grad():
        together = family.encode_prompts(PROMPTS)
        alone = family.encode_prompts(PROMPTS[:1])
    length = alone.hidden_BLD.shape[1]
    assert torch.allclose(together.hidden_BLD[:1, :length], alone.hidden_BLD, atol=1e-5)
    assert family.truncated_text("a") == ""
    assert family.truncated_text("a " * 2000) != ""


@pytest.mark.parametrize("name", FLOW)
def test_flow_timesteps_stay_inside_the_wanted_part_and_repeat_with_the_seed(
    name: str, folders: dict[str, Path]
) -> None:
    family = load(folders[name])
    shape = family.latent_shape(64, 64)
    for kind in ("sigmoid", "linear", "shift"):
        levels = NoiseLevels(kind=kind)
        drawn = family.sample_timesteps(500, torch.Generator().manual_seed(1), levels, shape)
        assert torch.equal(drawn, family.sample_timesteps(500, torch.Generator().manual_seed(1), levels, shape))
        assert 0 < float(drawn.min()) < float(drawn.max()) < 1000
    part = family.sample_timesteps(500, None, NoiseLevels(kind="linear", first=200, last=399))
    assert 600 <= float(part.min()) <= float(part.max()) <= 800
    shifted = family.sample_timesteps(500, torch.Generator().manual_seed(1), NoiseLevels(kind="shift"), shape) / 1000
    even = family.sample_timesteps(500, torch.Generator().manual_seed(1), NoiseLevels(kind="linear")) / 1000
    odds = (shifted / (1 - shifted)) / (even / (1 - even))
    schedule: Any = family.make_schedule(None, 2, shape)
    if not schedule.config.use_dynamic_shifting:
        assert torch.allclose(odds, torch.full_like(odds, schedule.config.shift), rtol=1e-2)
    content = family.sample_timesteps(2000, None, NoiseLevels(kind="linear", bias="content"))
    style = family.sample_timesteps(2000, None, NoiseLevels(kind="linear", bias="style"))
    assert float(content.mean()) > 600 > 400 > float(style.mean())
