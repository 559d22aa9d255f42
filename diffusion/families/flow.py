"""Arithmetic of flow-matching models (SD 3.x, FLUX, Qwen-Image, Z-Image): sampling and training sides.

A latent at noise level ``s`` in 0..1 is ``(1 - s) * picture + s * noise``; the timestep is ``1000 * s``, and the model
predicts ``noise - picture``. Follows the DreamBooth LoRA scripts of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffusion.errors import SettingNotSupported, UnsupportedModel
from diffusion.families.base import ALL_LEVELS, NoiseLevels
from diffusion.families.flow_weights import LossWeighting, weight_at

TIMESTEPS = 1000
SCHEDULERS = {
    "flowmatch": "FlowMatchEulerDiscreteScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
PLACE_EPS = 1e-4
"""Keeps the logit of a place finite: noise levels stay within 1.1e-4 of both ends or nearer the middle."""


class FlowMatching:
    """The flow in a model's ``scheduler_config.json``. Raises UnsupportedModel for a scheduler of another kind."""

    def __init__(self, scheduler: Any) -> None:
        if not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            raise UnsupportedModel(f"scheduler {type(scheduler).__name__!r}")
        self._scheduler = scheduler

    def make_schedule(
        self, name: str | None, steps: int, *, tokens: int, sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> Any:  # fmt: skip
        """A fresh scheduler with ``steps`` timesteps set, on the CPU. Raises SettingNotSupported.

        ``tokens``: picture tokens that the denoiser sees; the shift of models with dynamic shifting depends on them,
        unless the family gives its own ``mu``.
        """
        if name is not None and name not in SCHEDULERS:
            raise SettingNotSupported("scheduler", f"unknown; choose one of {', '.join(SCHEDULERS)}")
        if not 1 <= steps <= TIMESTEPS:
            raise SettingNotSupported("steps", f"must be between 1 and {TIMESTEPS}")
        cls = type(self._scheduler) if name is None else getattr(diffusers, SCHEDULERS[name])
        scheduler = cls.from_config(self._scheduler.config)
        options: dict[str, Any] = {} if sigmas is None else {"sigmas": list(sigmas)}
        if self._scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self.mu(tokens) if mu is None else mu
        if name == "heun":
            # It has no sigmas of the caller's: it shifts by the constant of its own configuration.
            options = {}
        with np.errstate(invalid="ignore"):
            scheduler.set_timesteps(steps, device="cpu", **options)
        # A schedule that is stretched to end at a level of the model's has no use for a single step.
        if not bool(scheduler.timesteps.isfinite().all()):
            raise SettingNotSupported("steps", f"{steps} is too few for this model: ask for more")
        return scheduler

    def mu(self, tokens: int) -> float:
        """``calculate_shift`` of the diffusers pipelines: a line through two (tokens, shift) points."""
        config: Mapping[str, Any] = self._scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (top - base) / (high - low)
        return float(tokens * slope + base - slope * low)

    def _shift(self, tokens: int) -> float:
        """How strongly sampling moves the levels of a picture of that size towards noise."""
        config: Mapping[str, Any] = self._scheduler.config
        return math.exp(self.mu(tokens)) if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None, levels: NoiseLevels = ALL_LEVELS,
        tokens: int | None = None,
    ) -> Tensor:  # fmt: skip
        """``[B]`` float32 in 0..1000, on the CPU."""
        level_B = 1 - levels.places(batch_size, generator).clamp(PLACE_EPS, 1 - PLACE_EPS)
        if levels.kind == "sigmoid":
            level_B = torch.sigmoid(torch.special.ndtri(level_B))
        elif levels.kind == "shift":
            shift = self._shift(tokens or 256)
            level_B = shift * level_B / (1 + (shift - 1) * level_B)
        return level_B * TIMESTEPS

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        level_B111 = _level(timesteps_B, latents_BCHW)
        return (1.0 - level_B111) * latents_BCHW + level_B111 * noise_BCHW

    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        return noise_BCHW - latents_BCHW

    def loss_weight(self, timesteps_B: Tensor, weighting: LossWeighting = "none") -> Tensor:
        """``none`` is ones: the scripts' ``weighting_scheme`` of ``none`` and ``logit_normal``; min-SNR has no meaning
        here."""
        if weighting == "none":
            return torch.ones(timesteps_B.shape, device=timesteps_B.device)
        return weight_at(timesteps_B, weighting)


def _level(timesteps_B: Tensor, latents_BCHW: Tensor) -> Tensor:
    level_B = timesteps_B.to(latents_BCHW.device, torch.float32) / TIMESTEPS
    return level_B.to(latents_BCHW.dtype).reshape(-1, *[1] * (latents_BCHW.ndim - 1))


def even_sigmas(steps: int) -> list[float]:
    """From pure noise in even steps, as the FLUX and Qwen-Image pipelines ask for: 1 .. 1/steps."""
    return [float(s) for s in np.linspace(1.0, 1 / steps, steps)]


def pack_2x2(latents_BCHW: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, H/2 * W/2, 4 C]`` tokens of two by two."""
    batch, channels, rows, columns = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows // 2 * (columns // 2), channels * 4)


def unpack_2x2(tokens_BLD: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of ``pack_2x2`` for ``rows`` and ``columns`` of latents."""
    batch, _, width = tokens_BLD.shape
    patches = tokens_BLD.reshape(batch, rows // 2, columns // 2, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, width // 4, rows, columns)
