"""One picture on its way from noise: its own scheduler, timesteps, random generator and prompts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from diffusion.engine.request import GenerateRequest, size_of
from diffusion.families.base import Family, TextEmbeds


class Sample:
    """Advances by one denoiser call at a time; does not know what else is in the batch.

    ``schedule`` is a diffusers scheduler of its own with timesteps set. ``text`` holds the negative prompt's row
    first when guidance needs one: the order of the rows it contributes to a batch.
    """

    def __init__(self, family: Family, request: GenerateRequest, index: int, schedule: Any) -> None:
        self.request, self.index = request, index
        self._family, self._schedule = family, schedule
        self._timesteps: Tensor = schedule.timesteps
        self._position = 0
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._latents_BCHW: Tensor | None = None
        self.text: TextEmbeds | None = None
        self._step_options: dict[str, Any] = {"return_dict": False}
        # As in the stock pipelines: schedulers that draw noise in a step take it from the picture's own generator.
        if "generator" in inspect.signature(schedule.step).parameters:
            self._step_options["generator"] = self._generator

    @property
    def steps_total(self) -> int:
        return len(self._timesteps)

    @property
    def done(self) -> bool:
        return self._position >= self.steps_total

    @property
    def uses_negative_prompt(self) -> bool:
        return self._family.uses_negative_prompt(self.request.guidance_scale)

    @property
    def rows(self) -> int:
        """Rows it takes in a denoiser call."""
        return 2 if self.uses_negative_prompt else 1

    @property
    def latents(self) -> Tensor:
        """``[1, C, H, W]``."""
        if self._latents_BCHW is None:
            raise RuntimeError("the sample has not begun")
        return self._latents_BCHW

    @property
    def timestep(self) -> Tensor:
        """Scalar, on the CPU."""
        return self._timesteps[self._position]

    def begin(self, text: TextEmbeds) -> None:
        """Draw the first noise. Called once, when the sample joins a batch."""
        shape = self._family.latent_shape(*size_of(self.request))
        noise = self._family.initial_noise(shape, self._generator)
        self._latents_BCHW = noise * getattr(self._schedule, "init_noise_sigma", 1.0)
        self.text = text

    def denoiser_input(self) -> Tensor:
        """``[rows, C, H, W]`` for the current timestep."""
        latents = self.latents
        if hasattr(self._schedule, "scale_model_input"):
            latents = self._schedule.scale_model_input(latents, self.timestep)
        return latents.expand(self.rows, *latents.shape[1:])

    def advance(self, prediction_BCHW: Tensor) -> None:
        """Take the denoiser's answer to ``denoiser_input`` and move to the next timestep."""
        prediction = prediction_BCHW
        if self.uses_negative_prompt:
            negative, positive = prediction_BCHW.chunk(2)
            prediction = self._family.combine_guidance(negative, positive, self.request.guidance_scale)
        self._latents_BCHW = self._schedule.step(prediction, self.timestep, self.latents, **self._step_options)[0]
        self._position += 1
