"""Latents and text embeddings, computed once before the training and kept in host memory.

Shape legend: B pictures, C latent channels, H W latent rows and columns. A mirrored picture is its own entry: the
latents of a mirrored picture are not the mirrored latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.families import Family, TextEmbeds
from train_jobs.captions import CaptionRules
from train_jobs.data import Use, load_mask, load_pixels

TEXT_BATCH = 16
PIXELS_PER_BATCH = 4 * 1024 * 1024


@dataclass(frozen=True)
class CachedUse:
    """Mean and standard deviation of a picture's latents, float32 on the CPU, and its caption's row in the texts.

    `weight_1HW` weighs the loss over the picture with a mean of one; None where all of it counts alike. `text` is the
    caption without its trigger word, for `rules` that vary it.
    """

    name: str
    mean_CHW: Tensor
    std_CHW: Tensor
    text_row: int
    caption: str
    text: str
    rules: CaptionRules
    weight_1HW: Tensor | None = None
    loss_weight: float = 1.0
    is_regularisation: bool = False
    is_validation: bool = False


@dataclass(frozen=True)
class TrainingCache:
    """What the loop reads. `entries` maps an entry (a use, once per repeat) to its use; `texts` are on the CPU."""

    uses: tuple[CachedUse, ...]
    entries: tuple[int, ...]
    texts: tuple[TextEmbeds, ...]
    empty_text_row: int

    def entry(self, index: int) -> CachedUse:
        return self.uses[self.entries[index]]

    def choose(self, wanted: Callable[[CachedUse], bool]) -> list[int]:
        """The entries whose use is wanted."""
        return [i for i in range(len(self.entries)) if wanted(self.entry(i))]

    def buckets(self) -> list[tuple[int, ...]]:
        """The bucket of each entry: its latents' shape."""
        return [tuple(self.entry(i).mean_CHW.shape) for i in range(len(self.entries))]


def build_cache(
    family: Family,
    uses: Sequence[Use],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingCache | None:
    """Encode every picture and caption. None when `should_stop` said so.

    `on_progress(done, total)` counts pictures. Raises ImageUnreadable, and whatever the model raises.
    """
    texts, row_of = _encode_texts(family, ["", *(use.picture.caption for use in uses)])
    cached: list[CachedUse | None] = [None] * len(uses)
    done = 0
    for batch in _by_size(uses):
        if should_stop is not None and should_stop():
            return None
        images_BCHW = torch.stack([torch.from_numpy(load_pixels(uses[i])) for i in batch])
        mean_BCHW, std_BCHW = (moment.float().cpu() for moment in family.encode_image_moments(images_BCHW))
        for row, i in enumerate(batch):
            use = uses[i]
            cached[i] = CachedUse(
                name=use.picture.name,
                mean_CHW=mean_BCHW[row].clone(),
                std_CHW=std_BCHW[row].clone(),
                text_row=row_of[use.picture.caption],
                caption=use.picture.caption,
                text=use.picture.text,
                rules=use.rules,
                weight_1HW=mask_weight(load_mask(use), (mean_BCHW.shape[2], mean_BCHW.shape[3])),
                loss_weight=use.loss_weight,
                is_regularisation=use.is_regularisation,
                is_validation=use.is_validation,
            )
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(uses))
    entries = tuple(i for i, use in enumerate(uses) for _ in range(use.repeats))
    return TrainingCache(tuple(c for c in cached if c is not None), entries, texts, row_of[""])


def mask_weight(mask_HW: NDArray[np.float32] | None, latent_size: tuple[int, int]) -> Tensor | None:
    """A mask of pixels as weights of latents, `[1, H, W]`, scaled to a mean of one.

    ai-toolkit scales over the batch; here each picture for itself, so that a sample does not depend on its batch.
    """
    if mask_HW is None:
        return None
    weight = nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask_HW)[None], latent_size)
    return weight / weight.mean().clamp(min=1e-6)


def _by_size(uses: Sequence[Use]) -> list[list[int]]:
    """Indexes in batches of equal picture size and bounded area."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, use in enumerate(uses):
        by_size.setdefault((use.width_px, use.height_px), []).append(index)
    batches: list[list[int]] = []
    for (width_px, height_px), indexes in by_size.items():
        count = min(16, max(1, PIXELS_PER_BATCH // (width_px * height_px)))
        batches.extend(indexes[start : start + count] for start in range(0, len(indexes), count))
    return batches


@torch.no_grad()
def _encode_texts(family: Family, prompts: Sequence[str]) -> tuple[tuple[TextEmbeds, ...], dict[str, int]]:
    unique = list(dict.fromkeys(prompts))
    rows: list[TextEmbeds] = []
    for start in range(0, len(unique), TEXT_BATCH):
        embeds = family.encode_prompts(unique[start : start + TEXT_BATCH]).to(device="cpu")
        rows.extend(embeds.rows([row]) for row in range(len(embeds)))
    return tuple(rows), {prompt: row for row, prompt in enumerate(unique)}
