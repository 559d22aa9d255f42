"""From entries of the cache to per-sample losses.

Shape legend: B samples, C latent channels, H W latent rows and columns.

Everything random about a sample comes from (seed, epoch, entry), whichever worker, batch or attempt draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.families import Family, NoiseLevels, TextEmbeds
from diffusion.families.flow_weights import LossWeighting
from train_jobs.cache import CachedUse, TrainingCache
from train_jobs.captions import varied
from train_jobs.spec import OptimizeSpec

VALIDATION_EPOCH = 2**40
"""No training has so many epochs: the validation's random numbers are its own."""


@dataclass(frozen=True)
class Sample:
    """One drawn sample. `text` is its cached embedding; None when the text must be encoded now."""

    use: CachedUse
    latents_CHW: Tensor
    noise_CHW: Tensor
    timestep_1: Tensor
    caption: str
    text: TextEmbeds | None


class Sampler:
    """Draws samples and computes their losses. With `trains_text` prompts are encoded anew, with gradients."""

    def __init__(self, family: Family, cache: TrainingCache, spec: OptimizeSpec, *, trains_text: bool = False) -> None:
        self._family = family
        self._cache = cache
        self._spec = spec
        self._trains_text = trains_text
        wanted = spec.timesteps
        self._levels = NoiseLevels(wanted.kind, wanted.bias, wanted.first, wanted.last)

    def losses(self, entries: Sequence[int], epoch: int) -> Tensor:
        """Weighted mean squared errors of a batch, `[B]`, with gradients."""
        samples = [self._draw(entry, epoch, self._levels, self._spec.noise_offset) for entry in entries]
        losses_B = self._errors(samples, self._spec.min_snr_gamma, self._spec.timesteps.weighting)
        weights = [sample.use.loss_weight for sample in samples]
        if any(weight != 1.0 for weight in weights):
            losses_B = losses_B * torch.tensor(weights, device=losses_B.device)
        return losses_B

    @torch.no_grad()
    def validation_losses(self, entries: Sequence[int], place: float) -> Tensor:
        """`[B]` plain errors at one place on the way from noise (0) to picture (1), the same for every call."""
        at = round(place * 999)
        levels = NoiseLevels("linear", "balanced", at, at)
        samples = [self._draw(entry, VALIDATION_EPOCH + at, levels, 0.0, plain=True) for entry in entries]
        return self._errors(samples, None, "none")

    def _errors(self, samples: Sequence[Sample], snr_gamma: float | None, weighting: LossWeighting) -> Tensor:
        family, device = self._family, self._family.device
        latents_BCHW = torch.stack([s.latents_CHW for s in samples]).to(device)
        noise_BCHW = torch.stack([s.noise_CHW for s in samples]).to(device)
        timesteps_B = torch.cat([s.timestep_1 for s in samples]).to(device)
        noisy_BCHW = family.add_noise(latents_BCHW, noise_BCHW, timesteps_B).to(family.dtype)
        target_BCHW = family.prediction_target(latents_BCHW, noise_BCHW, timesteps_B)
        with self._precision():
            predicted_BCHW = family.predict(noisy_BCHW, timesteps_B, self._texts(samples))
        error_BCHW = (predicted_BCHW.float() - target_BCHW.float()).square()
        if any(s.use.weight_1HW is not None for s in samples):
            error_BCHW = error_BCHW * _weights(samples).to(device)
        return error_BCHW.flatten(1).mean(1) * family.loss_weight(timesteps_B, snr_gamma, weighting).float()

    def _texts(self, samples: Sequence[Sample]) -> TextEmbeds:
        family = self._family
        cached = [s.text for s in samples if s.text is not None]
        if len(cached) == len(samples):
            return TextEmbeds.cat(cached).to(device=family.device, dtype=family.dtype)
        with nullcontext() if self._trains_text else torch.no_grad():
            return family.encode_prompts([s.caption for s in samples])

    def _precision(self) -> AbstractContextManager[object]:
        family = self._family
        if family.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(family.device.type, dtype=family.dtype)

    def _draw(self, entry: int, epoch: int, levels: NoiseLevels, noise_offset: float, *, plain: bool = False) -> Sample:
        use = self._cache.entry(entry)
        random = torch.Generator().manual_seed(derived_seed(self._spec.seed, epoch, entry))
        timestep_1 = self._family.sample_timesteps(1, random, levels, tuple(use.mean_CHW.shape))
        is_dropped = float(torch.rand((), generator=random)) < use.rules.dropout_rate and not plain
        latents_CHW = use.mean_CHW + use.std_CHW * torch.randn(use.mean_CHW.shape, generator=random)
        noise_CHW = torch.randn(use.mean_CHW.shape, generator=random)
        if noise_offset:
            offset_C11 = torch.randn((noise_CHW.shape[0], 1, 1), generator=random)
            noise_CHW = noise_CHW + noise_offset * offset_C11
        if is_dropped:
            caption, row = use.rules.dropped, use.dropped_row
        elif use.rules.varies and not plain:
            return Sample(use, latents_CHW, noise_CHW, timestep_1, varied(use.text, use.rules, random), None)
        else:
            caption, row = use.caption, use.text_row
        text = None if self._trains_text else self._cache.texts[row]
        return Sample(use, latents_CHW, noise_CHW, timestep_1, caption, text)


def _weights(samples: Sequence[Sample]) -> Tensor:
    """`[B, 1, H, W]`; ones where a sample has no mask."""
    shape = samples[0].latents_CHW.shape[-2:]
    return torch.stack([torch.ones(1, *shape) if s.use.weight_1HW is None else s.use.weight_1HW for s in samples])


def derived_seed(*parts: int) -> int:
    """A seed in 0..2^63-1 from several numbers."""
    state = np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0]
    return int(state) & (2**63 - 1)
