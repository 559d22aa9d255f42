"""The picture engine: requests in, pictures out, many at once."""

from __future__ import annotations

from diffusion.engine.engine import Engine
from diffusion.engine.request import GeneratedImage, GenerateRequest, LoraRef, RenderedImage, size_of

__all__ = ["Engine", "GenerateRequest", "GeneratedImage", "LoraRef", "RenderedImage", "size_of"]
