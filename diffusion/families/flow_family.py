"""What the flow-matching families have in common: everything that only needs the flow and the latents' shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.families.base import ALL_LEVELS, Family, NoiseLevels
from diffusion.families.flow import SCHEDULERS, FlowMatching
from diffusion.families.flow_weights import LossWeighting

ATTENTION = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class FlowFamily(Family):
    """``transformer`` is the denoiser; ``patch`` latent rows and columns make one of its tokens."""

    transformer: Any
    flow: FlowMatching
    patch: int = 2

    @property
    def denoiser(self) -> nn.Module:
        transformer: nn.Module = self.transformer
        return transformer

    @property
    def schedulers(self) -> Mapping[str, str]:
        return SCHEDULERS

    def picture_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Tokens that the denoiser makes of a picture's latents ``(C, H, W)``."""
        return (latent_shape[-2] // self.patch) * (latent_shape[-1] // self.patch)

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        return self.flow.make_schedule(name, steps, tokens=self.picture_tokens(latent_shape))

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 1

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None = None, levels: NoiseLevels = ALL_LEVELS,
        latent_shape: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        tokens = None if latent_shape is None else self.picture_tokens(latent_shape)
        return self.flow.sample_timesteps(batch_size, generator, levels, tokens).to(self.device)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.flow.add_noise(latents_BCHW, noise_BCHW, timesteps_B)

    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.flow.prediction_target(latents_BCHW, noise_BCHW)

    def loss_weight(
        self, timesteps_B: Tensor, snr_gamma: float | None = None, weighting: LossWeighting = "none"
    ) -> Tensor:
        return self.flow.loss_weight(timesteps_B, weighting)
