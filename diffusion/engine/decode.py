"""Finished latents to pixels: several in one call where set, fewer and then in tiles where memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion.families.base import Family

logger = logging.getLogger(__name__)


class Decoder:
    """``pictures_max`` pictures of one size in one call of the VAE, whose activations are the peak of memory.

    A picture that does not fit alone is decoded in diffusers' overlapping tiles, blended where they meet, which differs
    visibly little from the whole; with ``tiled``, every picture above the VAE's tile size is.
    """

    def __init__(self, family: Family, *, pictures_max: int = 1, tiled: bool = False) -> None:
        self._family = family
        self._pictures_max = pictures_max
        self._tiled = tiled

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor | None]:
        """Each ``[1, C, H, W]``, all of one shape. ``[3, height, width]`` in 0..1 on the CPU for each; None for one
        that does not fit even in tiles."""
        chunks = [latents[i : i + self._pictures_max] for i in range(0, len(latents), self._pictures_max)]
        return [pixels for chunk in chunks for pixels in self._chunk(chunk)]

    def _chunk(self, latents: Sequence[Tensor]) -> list[Tensor | None]:
        pixels = self._call(latents, tiled=self._tiled)
        if pixels is not None:
            return list(pixels)
        if len(latents) > 1:
            half = len(latents) // 2
            return [*self._chunk(latents[:half]), *self._chunk(latents[half:])]
        pixels = None if self._tiled else self._call(latents, tiled=True)
        return [None] if pixels is None else list(pixels)

    def _call(self, latents: Sequence[Tensor], *, tiled: bool) -> Tensor | None:
        """``[B, 3, height, width]``, None where memory ran out; nothing of the failed call is alive then."""
        try:
            with _tiles(self._family, on=tiled):
                return self._family.decode(torch.cat(list(latents))).cpu()
        except torch.OutOfMemoryError:
            # Without the error itself, whose frames would keep the failed call's tensors alive.
            logger.warning("out of memory while decoding %d pictures%s", len(latents), " in tiles" if tiled else "")
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        return None


@contextmanager
def _tiles(family: Family, *, on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    family.vae.enable_tiling()
    try:
        yield
    finally:
        family.vae.disable_tiling()
