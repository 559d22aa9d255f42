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

from diffusion.families.base import LoraTargets, TextEmbeds
from diffusion.families.discrete import DiscreteNoise
from diffusion.families.parts import (
    KlLatents,
    frozen,
    load_part,
    load_scheduler,
    load_weights,
    text_beyond,
    tokenize_fixed,
)
from diffusion.families.unet_family import UNET_TARGETS, UNetFamily

TEXT_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "ai_toolkit": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


class StableDiffusion1(UNetFamily):
    name = "sd1"
    architecture = "stable-diffusion-v1"
    weights = ("text_encoder", "unet", "vae")

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
        self.native_size_px = self._trained_size_px

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
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        return list({"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}[component][kind])

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        ids_BL = tokenize_fixed(self.tokenizer, prompts, self.device)
        return TextEmbeds(self.text_encoder(ids_BL)[0].to(self.dtype))

    def truncated_text(self, prompt: str) -> str:
        return text_beyond(self.tokenizer, prompt, self.tokenizer.model_max_length, special=2)

    # -- denoising

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.unet(
            latents_BCHW.to(self.dtype), timesteps_B, encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            timestep_cond=self._guidance_embedding(guidance_B), return_dict=False,
        )[0]  # fmt: skip
        return output
