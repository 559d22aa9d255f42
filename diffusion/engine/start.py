"""Where a picture begins: at noise, at another picture, or at the masked part of one.

The order in which random numbers are drawn is that of diffusers' ``StableDiffusionPipeline``,
``StableDiffusionImg2ImgPipeline`` and ``StableDiffusionInpaintPipeline``; a seed therefore means what it means there.
Their SDXL, SD 3 and FLUX.1 siblings do the same, the last two with flow matching's own way of adding noise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffusion.engine.request import GenerateRequest, size_of
from diffusion.errors import SettingNotSupported
from diffusion.families.base import Family

FROM_IMAGE = frozenset({"sd1", "sdxl", "sd3", "flux1"})
INPAINTING = frozenset({"sd1", "sdxl", "flux1"})
"""The families whose stock pipelines these starts have been compared with."""
OWN_SIDE_MAX_PX = 1536
"""Of a picture made from another one, where no size is asked for."""


class FromNoise:
    """``timesteps`` are those that remain to be done, on the CPU."""

    def __init__(self, family: Family, request: GenerateRequest, schedule: Any, generator: torch.Generator) -> None:
        self._family, self._request, self._schedule, self._generator = family, request, schedule, generator
        self._shape = family.latent_shape(*size_of(request))
        self.timesteps: Tensor = schedule.timesteps

    def first_latents(self) -> Tensor:
        """``[1, C, H, W]``, drawn from the picture's own generator."""
        noise = self._family.initial_noise(self._shape, self._generator)
        return noise * getattr(self._schedule, "init_noise_sigma", 1.0)

    def after_step(self, latents_BCHW: Tensor, position: int) -> Tensor:
        """What the latents become after step ``position`` of ``timesteps``."""
        return latents_BCHW


class FromImage(FromNoise):
    """The picture with noise of the first remaining timestep; ``strength`` of the steps remain."""

    def __init__(self, family: Family, request: GenerateRequest, schedule: Any, generator: torch.Generator) -> None:
        super().__init__(family, request, schedule, generator)
        if family.name not in FROM_IMAGE:
            raise SettingNotSupported("init_image", "this model cannot start from a picture")
        if not 0 < request.strength <= 1:
            raise SettingNotSupported("strength", "must be above 0 and at most 1")
        # The pipelines round differently: down to whole steps to do, or to whole steps done.
        wanted = request.steps * request.strength
        done = int(request.steps - wanted) if hasattr(schedule, "scale_noise") else request.steps - int(wanted)
        if done >= request.steps:
            raise SettingNotSupported("strength", f"leaves none of the {request.steps} steps to do")
        order = getattr(schedule, "order", 1)
        self.timesteps = schedule.timesteps[done * order :]
        if hasattr(schedule, "set_begin_index"):
            schedule.set_begin_index(done * order)

    def first_latents(self) -> Tensor:
        latents = self._family.encode_images(self._pixels(), self._generator).to(self._family.dtype)
        noise = self._family.initial_noise(self._shape, self._generator)
        return self._noisy(latents, noise, self.timesteps[0])

    def _pixels(self) -> Tensor:
        """``[1, 3, H, W]`` in -1..1."""
        width, height = size_of(self._request)
        if self._request.init_image is None:
            raise RuntimeError("the request has no picture to start from")
        image = self._request.init_image.convert("RGB")
        pixels: Tensor = VaeImageProcessor().preprocess(image, height=height, width=width)
        return pixels

    def _noisy(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        if hasattr(self._schedule, "scale_noise"):
            noisy: Tensor = self._schedule.scale_noise(latents, timestep.reshape(1), noise)
        else:
            noisy = self._schedule.add_noise(latents, noise, timestep.reshape(1))
        return noisy


class Inpainting(FromImage):
    """Outside the mask, the latents are the picture's own, noised anew after each step to that step's level."""

    def __init__(self, family: Family, request: GenerateRequest, schedule: Any, generator: torch.Generator) -> None:
        super().__init__(family, request, schedule, generator)
        if family.name not in INPAINTING:
            raise SettingNotSupported("mask", "this model cannot change a part of a picture")

    def first_latents(self) -> Tensor:
        self._image_latents = self._family.encode_images(self._pixels(), self._generator).to(self._family.dtype)
        self._noise = self._family.initial_noise(self._shape, self._generator)
        # The stock pipeline encodes the masked picture here, with a sample of its posterior that nothing uses.
        self._family.initial_noise(self._shape, self._generator)
        self._mask = self._latent_mask()
        if self._request.strength == 1:
            return self._noise * getattr(self._schedule, "init_noise_sigma", 1.0)
        return self._noisy(self._image_latents, self._noise, self.timesteps[0])

    def after_step(self, latents_BCHW: Tensor, position: int) -> Tensor:
        kept = self._image_latents
        if position < len(self.timesteps) - 1:
            kept = self._noisy(kept, self._noise, self.timesteps[position + 1])
        return (1 - self._mask) * kept + self._mask * latents_BCHW

    def _latent_mask(self) -> Tensor:
        """``[1, 1, H, W]`` of zeros and ones, in latent rows and columns."""
        width, height = size_of(self._request)
        processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        mask = processor.preprocess(self._request.mask, height=height, width=width)
        scaled = torch.nn.functional.interpolate(mask, size=self._shape[1:])
        return scaled.to(self._family.device, self._family.dtype)


def choose_start(family: Family, request: GenerateRequest, schedule: Any, generator: torch.Generator) -> FromNoise:
    """Raises SettingNotSupported."""
    if request.init_image is None:
        if request.mask is not None:
            raise SettingNotSupported("mask", "needs an init_image")
        return FromNoise(family, request, schedule, generator)
    kind = FromImage if request.mask is None else Inpainting
    return kind(family, request, schedule, generator)


def size_near(
    image: Image.Image, multiple: int, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """The size of what is made from a picture: the given sides as they are, the others from its proportions.

    Where neither is given, it is the picture's own, scaled down to at most ``OWN_SIDE_MAX_PX`` on the longer side.
    Chosen sides are rounded down to what the model can make.
    """
    if width is not None:
        scale = width / image.width
    elif height is not None:
        scale = height / image.height
    else:
        scale = min(1.0, OWN_SIDE_MAX_PX / max(image.size))
    chosen = [max(multiple, int(side * scale + 1e-6) // multiple * multiple) for side in image.size]
    return chosen[0] if width is None else width, chosen[1] if height is None else height
