"""What the families over ``AutoencoderKL`` have in common: their latents."""

from __future__ import annotations

from torch import Tensor

from diffusion.families.base import Family
from diffusion.families.parts import KlLatents


class KlFamily(Family):
    """A family sets ``latents`` when it is made."""

    latents: KlLatents

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        return self.latents.shape(width, height)

    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents.encode_moments(images_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return self.latents.decode(latents_BCHW)
