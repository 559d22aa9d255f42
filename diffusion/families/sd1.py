"""Stable Diffusion 1.x: CLIP text encoder, cross-attention UNet, 4-channel VAE, discrete noise schedule.

Follows ``StableDiffusionPipeline`` of diffusers; any folder with these five parts loads, whatever its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.families.base import ALL_LEVELS, Family, LoraTargets, NoiseLevels, TextEmbeds
from diffusion.families.discrete import SCHEDULERS, DiscreteNoise
from diffusion.families.parts import (
    KlLatents,
    frozen,
    load_part,
    load_scheduler,
    load_weights,
    text_beyond,
    tokenize_fixed,
)

UNET_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
}
UNET_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


class StableDiffusion1(Family):
    name = "sd1"
    architecture = "stable-diffusion-v1"

    def __init__(
        self, *, tokenizer: Any, text_encoder: Any, unet: Any, vae: Any, scheduler: Any,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.unet, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, unet, vae)
        )
        self.noise = DiscreteNoise(scheduler)
        # The UNet handles odd latent sizes; 8 pixels is what the stock pipeline asks for.
        self.latents = KlLatents(vae)
        self.size_multiple = self.latents.size_multiple
        sample_size = unet.config.sample_size
        self.native_size = self.latents.factor * (sample_size if isinstance(sample_size, int) else max(sample_size))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=load_part(folder, "tokenizer", CLIPTokenizer),
            text_encoder=load_weights(folder, "text_encoder", CLIPTextModel, dtype),
            unet=load_weights(folder, "unet", UNet2DConditionModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKL, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.unet
        return unet

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        return list({"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}[component][kind])

    def conv_target_modules(self, component: str) -> list[str]:
        return list(UNET_CONVOLUTIONS) if component == "unet" else []

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        ids_BL = tokenize_fixed(self.tokenizer, prompts, self.device)
        return TextEmbeds(self.text_encoder(ids_BL)[0].to(self.dtype))

    def truncated_text(self, prompt: str) -> str:
        return text_beyond(self.tokenizer, prompt, self.tokenizer.model_max_length, special=2)

    # -- pictures and latents

    @property
    def native_size_px(self) -> int:
        return self.native_size

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return self.latents.shape(width, height)

    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents.encode_moments(images_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self.latents.decode(latents_BCHW)

    # -- denoising

    @property
    def schedulers(self) -> tuple[str, ...]:
        return tuple(SCHEDULERS)

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        return self.noise.make_schedule(name, steps)

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 1

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.unet(
            latents_BCHW.to(self.dtype), timesteps_B, encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        return output

    # -- training

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None = None, levels: NoiseLevels = ALL_LEVELS,
        latent_shape: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        return self.noise.sample_timesteps(batch_size, generator, levels).to(self.device)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.add_noise(latents_BCHW, noise_BCHW, timesteps_B)

    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.prediction_target(latents_BCHW, noise_BCHW, timesteps_B)

    def loss_weight(self, timesteps_B: Tensor, snr_gamma: float | None = None) -> Tensor:
        return self.noise.loss_weight(timesteps_B, snr_gamma)
