"""What the engine takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA file to apply, and how strongly. The picture's settings call it ``name``, or else the file's stem."""

    path: Path
    scale: float = 1.0
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One picture. ``width`` and ``height`` are pixels; None, like a ``scheduler`` of None, is the model's own.

    With an ``init_image`` the picture starts from it, and only the last ``strength`` (above 0, at most 1) of the steps
    are done; with a ``mask`` too, only where that is light is anything changed.

    ``first_block_cache`` is the threshold of ``diffusion.engine.first_block``; 0 is off, None the engine's own.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    steps: int = 30
    guidance_scale: float = 7.5
    seed: int
    loras: tuple[LoraRef, ...] = ()
    scheduler: str | None = None
    init_image: Image.Image | None = field(default=None, repr=False)
    mask: Image.Image | None = field(default=None, repr=False)
    strength: float = 0.8
    first_block_cache: float | None = None

    def settings(self) -> dict[str, Any]:
        """JSON-able, without file system paths and pictures."""
        settings: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": self.width,
            "height": self.height,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": self.scheduler,
            "loras": [{"name": lora.name or lora.path.stem, "scale": lora.scale} for lora in self.loras],
        }
        if self.init_image is not None:
            settings |= {"mode": "image_to_image" if self.mask is None else "inpainting", "strength": self.strength}
        if self.first_block_cache:
            settings["first_block_cache"] = self.first_block_cache
        return settings


def size_of(request: GenerateRequest) -> tuple[int, int]:
    """``(width, height)`` of a request whose size is settled. Raises ValueError for one that leaves it open."""
    if request.width is None or request.height is None:
        raise ValueError("the request leaves its size to the model")
    return request.width, request.height


@dataclass(frozen=True, slots=True)
class RenderedImage:
    """A finished picture before rounding: ``pixels_CHW`` is float32 in 0..1, on the CPU."""

    pixels_CHW: Tensor
    request: GenerateRequest
    warnings: tuple[str, ...] = ()
    steps_reused: int = 0
    """Denoising steps of which only the first block ran."""

    def to_image(self) -> GeneratedImage:
        # [C, H, W] 0..1 -> [H, W, C] bytes, rounded as diffusers does
        pixels_HWC = (self.pixels_CHW.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        settings = self.request.settings()
        if self.request.first_block_cache:
            settings["steps_reused"] = self.steps_reused
        return GeneratedImage(Image.fromarray(pixels_HWC), self.request.seed, settings, self.warnings)


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """``settings`` is JSON-able; ``warnings`` are sentences for whoever asked for the picture."""

    image: Image.Image
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
