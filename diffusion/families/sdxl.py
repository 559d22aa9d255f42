"""SDXL: two CLIP text encoders, cross-attention UNet with size conditioning, 4-channel VAE, discrete noise schedule.

Follows ``StableDiffusionXLPipeline`` and ``train_dreambooth_lora_sdxl.py`` of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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
from diffusion.families.sd1 import TEXT_TARGETS
from diffusion.families.unet_family import UNET_TARGETS, UNetFamily


class StableDiffusionXL(UNetFamily):
    """Pictures are conditioned on their own size, uncropped."""

    name = "sdxl"
    architecture = "stable-diffusion-xl-v1-base"
    weights = ("text_encoder", "text_encoder_2", "unet", "vae")

    def __init__(
        self, *, tokenizer: Any, tokenizer_2: Any, text_encoder: Any, text_encoder_2: Any, unet: Any, vae: Any,
        scheduler: Any, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizers = (tokenizer, tokenizer_2)
        self.text_encoder, self.text_encoder_2, self.unet, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, text_encoder_2, unet, vae)
        )
        self.noise = DiscreteNoise(scheduler)
        self.latents = KlLatents(self.vae, as_sdxl=True)
        self.size_multiple = self.latents.size_multiple
        self.native_size_px = self._trained_size_px

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=load_part(folder, "tokenizer", CLIPTokenizer),
            tokenizer_2=load_part(folder, "tokenizer_2", CLIPTokenizer),
            text_encoder=load_weights(folder, "text_encoder", CLIPTextModel, dtype),
            text_encoder_2=load_weights(folder, "text_encoder_2", CLIPTextModelWithProjection, dtype),
            unet=load_weights(folder, "unet", UNet2DConditionModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKL, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        return list((UNET_TARGETS if component == "unet" else TEXT_TARGETS)[kind])

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """Both encoders' last states but one, side by side; the pooled vector is the second one's."""
        hidden: list[Tensor] = []
        pooled_BD: Tensor | None = None
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=True):
            output = encoder(tokenize_fixed(tokenizer, prompts, self.device), output_hidden_states=True)
            pooled_BD = output[0]
            hidden.append(output.hidden_states[-2])
        return TextEmbeds(torch.cat(hidden, dim=-1), pooled_BD).to(dtype=self.dtype)

    def truncated_text(self, prompt: str) -> str:
        return text_beyond(self.tokenizers[0], prompt, self.tokenizers[0].model_max_length, special=2)

    # -- denoising

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        if text.pooled_BD is None:
            raise ValueError("SDXL needs the pooled text")
        output: Tensor = self.unet(
            latents_BCHW.to(self.dtype), timesteps_B, encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            timestep_cond=self._guidance_embedding(guidance_B),
            added_cond_kwargs={"text_embeds": text.pooled_BD.to(self.dtype), "time_ids": self._sizes(latents_BCHW)},
            return_dict=False,
        )[0]  # fmt: skip
        return output

    def _sizes(self, latents_BCHW: Tensor) -> Tensor:
        """``[B, 6]``: original height and width, top and left of the crop, height and width of the picture."""
        height, width = (side * self.latents.factor for side in latents_BCHW.shape[-2:])
        return _sizes_of(height, width, latents_BCHW.device, self.dtype).expand(len(latents_BCHW), -1)


@lru_cache(maxsize=64)
def _sizes_of(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[6]``. Kept: a copy from the host would wait for the device in each step."""
    return torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype)
