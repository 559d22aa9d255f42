"""Finished latents to pixels: several in one call where set, fewer and then in tiles where memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from diffusion.engine.admission import Admission, Cost, Shortage
from diffusion.families.base import Family

logger = logging.getLogger(__name__)

WHOLE, IN_TILES = "decode", "decode in tiles"


class Decoder:
    """``pictures_max`` pictures of one size in one call of the VAE, whose activations are the peak of memory.

    A picture that does not fit alone is decoded in diffusers' overlapping tiles, blended where they meet, which differs
    visibly little from the whole; with ``tiled``, every picture above the VAE's tile size is.
    """

    def __init__(self, family: Family, admission: Admission, *, pictures_max: int = 1, tiled: bool = False) -> None:
        self._family, self._admission = family, admission
        self._pictures_max = pictures_max
        self._tiled = tiled

    def decode(self, latents: Sequence[Tensor]) -> list[Tensor | Shortage]:
        """Each ``[1, C, H, W]``, all of one shape. ``[3, height, width]`` in 0..1 on the CPU for each; a Shortage for
        one that does not fit even in tiles."""
        pixels: list[Tensor | Shortage] = []
        while len(pixels) < len(latents):
            rest = latents[len(pixels) :][: self._pictures_max]
            kind = IN_TILES if self._tiled else WHOLE
            count = self._admission.admits(kind, len(rest), lambda count: Cost(count * latents[0].numel()))
            pixels += self._part(rest[:count])
        return pixels

    def _part(self, latents: Sequence[Tensor]) -> list[Tensor | Shortage]:
        found = self._call(latents, tiled=self._tiled)
        if not isinstance(found, Shortage):
            return list(found)
        if len(latents) > 1:
            half = len(latents) // 2
            return [*self._part(latents[:half]), *self._part(latents[half:])]
        if not self._tiled:
            found = self._call(latents, tiled=True)
        return [found] if isinstance(found, Shortage) else list(found)

    def _call(self, latents: Sequence[Tensor], *, tiled: bool) -> Tensor | Shortage:
        """``[B, 3, height, width]``; nothing of a failed call is alive afterwards."""
        kind, size = IN_TILES if tiled else WHOLE, len(latents) * latents[0].numel()
        if len(latents) == 1:
            shortage = self._admission.refusal(kind, lambda _: Cost(size))
            if shortage is not None:
                return shortage
        try:
            with _tiles(self._family, on=tiled), self._admission.learning(kind, size):
                return self._family.decode(torch.cat(list(latents))).cpu()
        except torch.OutOfMemoryError:
            # Without the error itself, whose frames would keep the failed call's tensors alive.
            logger.warning("out of memory while decoding %d pictures%s", len(latents), " in tiles" if tiled else "")
        self._admission.memory.give_back()
        return self._admission.ran_out()


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
