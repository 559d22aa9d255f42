"""One small request with different LoRAs, drawn by the engine and by the stock pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest, LoraRef

TOLERANCE = 1e-4
PLAIN = GenerateRequest(prompt="a red ring", width=64, height=64, steps=2, guidance_scale=5.0, seed=3)


def with_loras(*loras: LoraRef) -> GenerateRequest:
    return dataclasses.replace(PLAIN, loras=loras)


def pixels(engine: Engine, *requests: GenerateRequest) -> list[Tensor]:
    return [rendered.pixels_CHW for rendered in engine.render(requests)]


def stock_pixels(pipeline: Any) -> Tensor:
    """What the stock pipeline makes of ``PLAIN``, ``[3, H, W]`` in 0..1."""
    made = pipeline(
        PLAIN.prompt, width=64, height=64, num_inference_steps=PLAIN.steps, guidance_scale=PLAIN.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(PLAIN.seed), output_type="np",
    ).images[0]  # fmt: skip
    return torch.from_numpy(np.asarray(made)).permute(2, 0, 1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
