"""One picture on its way from its start: its own scheduler, timesteps, random generator, prompts and LoRAs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from diffusion.engine.first_block import BlockCache
from diffusion.engine.request import GenerateRequest, RenderedImage, size_of
from diffusion.engine.slot_table import Combo
from diffusion.engine.start import choose_start
from diffusion.families.base import Family, TextEmbeds, moved


class Sample:
    """Advances by one denoiser call at a time; does not know what else is in the batch.

    ``schedule`` is a diffusers scheduler of its own with timesteps set. ``text`` holds the negative prompt's row
    first when guidance needs one: the order of the rows it contributes to a batch. ``combo`` is what the engine found
    under ``request.loras``. Raises SettingNotSupported.
    """

    def __init__(self, family: Family, request: GenerateRequest, index: int, schedule: Any) -> None:
        self.request, self.index = request, index
        self.shape = family.latent_shape(*size_of(request))
        self.combo: Combo = ()
        self._family, self._schedule = family, schedule
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._start = choose_start(family, request, schedule, self._generator)
        self._timesteps = self._start.timesteps
        self._position = 0
        self._latents_BCHW: Tensor | None = None
        self._conditions_S2: Tensor | None = None
        self.uses_negative_prompt = family.uses_negative_prompt(request.guidance_scale)
        self.text: TextEmbeds | None = None
        self.blocks = BlockCache(request.first_block_cache) if request.first_block_cache else None
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
    def rows(self) -> int:
        """Rows it takes in a denoiser call."""
        return 2 if self.uses_negative_prompt else 1

    @property
    def texts(self) -> list[str]:
        """One per row."""
        negative = [self.request.negative_prompt] if self.uses_negative_prompt else []
        return [*negative, self.request.prompt]

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

    @property
    def conditions(self) -> Tensor:
        """``[rows, 2]`` float32 on the device: the current timestep, and the guidance scale."""
        if self._conditions_S2 is None:
            raise RuntimeError("the sample has not begun")
        return self._conditions_S2[self._position].expand(self.rows, 2)

    def begin(self, text: TextEmbeds) -> None:
        """Draw the first noise. Called once, when the sample joins a batch."""
        self._latents_BCHW = self._start.first_latents()
        # All steps' at once: a copy in each step would have the host wait for the device.
        timesteps_S = self._timesteps.float()
        guidance_S = torch.full_like(timesteps_S, self.request.guidance_scale)
        self._conditions_S2 = moved(torch.stack([timesteps_S, guidance_S], dim=1), self._family.device)
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
        latents = self._schedule.step(prediction, self.timestep, self.latents, **self._step_options)[0]
        self._latents_BCHW = self._start.after_step(latents, self._position)
        self._position += 1

    def rendered(self, pixels_CHW: Tensor) -> RenderedImage:
        """The finished picture, with what its prompts had too much said."""
        texts = {"prompt": self.request.prompt}
        if self.uses_negative_prompt:
            texts["negative prompt"] = self.request.negative_prompt
        cut = {field: self._family.truncated_text(text) for field, text in texts.items()}
        warnings = tuple(f"the {field} is too long; left out: {text}" for field, text in cut.items() if text)
        return RenderedImage(pixels_CHW, self.request, warnings, self.blocks.steps_reused if self.blocks else 0)
