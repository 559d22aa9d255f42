"""What SD 1.x and SDXL have in common: a UNet over a KL-VAE's latents, with a discrete noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from diffusion.families.base import ALL_LEVELS, LoraTargets, NoiseLevels
from diffusion.families.discrete import SCHEDULERS, DiscreteNoise
from diffusion.families.flow_weights import LossWeighting
from diffusion.families.kl_family import KlFamily

UNET_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
    "ai_toolkit": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv_shortcut",
        "time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1",
        "add_embedding.linear_2",
    ],
}  # fmt: skip
_IN_BLOCKS = ["conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv"]
UNET_CONVOLUTIONS = {
    "attention": [*_IN_BLOCKS, "conv_shortcut"],
    "all": [*_IN_BLOCKS, "conv_shortcut"],
    "ai_toolkit": [*_IN_BLOCKS, "conv_in", "conv_out"],
}


class UNetFamily(KlFamily):
    """A family sets these two, and its latents, when it is made."""

    unet: Any
    noise: DiscreteNoise

    @property
    def _trained_size_px(self) -> int:
        sample_size = self.unet.config.sample_size
        side_px: int = self.latents.factor * (sample_size if isinstance(sample_size, int) else max(sample_size))
        return side_px

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.unet
        return unet

    def conv_target_modules(self, component: str, kind: LoraTargets = "all") -> list[str]:
        return list(UNET_CONVOLUTIONS[kind]) if component == "unet" else []

    @property
    def schedulers(self) -> Mapping[str, str]:
        return SCHEDULERS

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        return self.noise.make_schedule(name, steps)

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    def _guidance_embedding(self, guidance_B: Tensor | None) -> Tensor | None:
        """``[B, D]`` for a UNet that was distilled with guidance (a latent consistency model), as in diffusers'
        ``get_guidance_scale_embedding``; None for others."""
        width = self.unet.config.time_cond_proj_dim
        if width is None or guidance_B is None:
            return None
        embedding_BD: Tensor = get_timestep_embedding(1000 * (guidance_B - 1), width, downscale_freq_shift=1)
        return embedding_BD.to(self.device, self.dtype)

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None = None, levels: NoiseLevels = ALL_LEVELS,
        latent_shape: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        return self.noise.sample_timesteps(batch_size, generator, levels).to(self.device)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.add_noise(latents_BCHW, noise_BCHW, timesteps_B)

    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.prediction_target(latents_BCHW, noise_BCHW, timesteps_B)

    def loss_weight(
        self, timesteps_B: Tensor, snr_gamma: float | None = None, weighting: LossWeighting = "none"
    ) -> Tensor:
        return self.noise.loss_weight(timesteps_B, snr_gamma)
