"""Arithmetic of models trained on a discrete noise schedule (SD 1.x, SD 2.x, SDXL): sampling and training sides."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

from diffusion.errors import SettingNotSupported, UnsupportedModel
from diffusion.families.base import ALL_LEVELS, NoiseLevels

# The LMS scheduler is left out: it needs scipy, which nothing else here does.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiscreteNoise:
    """The noise schedule in a model's ``scheduler_config.json``.

    Training follows ``examples/text_to_image/train_text_to_image_lora.py`` of diffusers. Raises UnsupportedModel for a
    prediction type it does not know.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.prediction_type: str = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in PREDICTION_TYPES:
            raise UnsupportedModel(f"prediction type {self.prediction_type!r}")
        # DDPM's class has add_noise and get_velocity whatever class the model samples with.
        self._training = diffusers.DDPMScheduler.from_config(scheduler.config)
        self.timesteps_total = int(self._training.config.num_train_timesteps)

    def make_schedule(self, name: str | None, steps: int) -> Any:
        """A fresh scheduler with ``steps`` timesteps set. Raises SettingNotSupported."""
        if name is not None and name not in SCHEDULERS:
            raise SettingNotSupported("scheduler", f"unknown; choose one of {', '.join(SCHEDULERS)}")
        if not 1 <= steps <= self.timesteps_total:
            raise SettingNotSupported("steps", f"must be between 1 and {self.timesteps_total}")
        cls = type(self._scheduler) if name is None else getattr(diffusers, SCHEDULERS[name])
        try:
            scheduler = cls.from_config(self._scheduler.config)
            # On the CPU: schedulers look a timestep up in this list, which would otherwise wait for the GPU each step.
            scheduler.set_timesteps(steps, device="cpu")
        except (ValueError, IndexError, NotImplementedError) as exc:
            raise SettingNotSupported("scheduler", f"{name or cls.__name__} cannot do {steps} steps here") from exc
        return scheduler

    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None, levels: NoiseLevels = ALL_LEVELS
    ) -> Tensor:
        """``[B]`` over the schedule, int64, on the CPU; uniform but for ``levels.bias``."""
        place_B = levels.places(batch_size, generator)
        return ((1 - place_B) * self.timesteps_total).long().clamp(0, self.timesteps_total - 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        noisy: Tensor = self._training.add_noise(latents, noise, timesteps_B)
        return noisy

    def prediction_target(self, latents: Tensor, noise: Tensor, timesteps_B: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        velocity: Tensor = self._training.get_velocity(latents, noise, timesteps_B)
        return velocity

    def loss_weight(self, timesteps_B: Tensor, snr_gamma: float | None) -> Tensor:
        """Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4); ones when ``snr_gamma`` is None."""
        if snr_gamma is None:
            return torch.ones(timesteps_B.shape, device=timesteps_B.device)
        snr_B: Tensor = compute_snr(self._training, timesteps_B)
        clamped_B = snr_B.clamp(max=snr_gamma)
        if self.prediction_type == "sample":
            return clamped_B
        return clamped_B / (snr_B + 1 if self.prediction_type == "v_prediction" else snr_B)
