"""Latents and text embeddings, computed once before the training and kept in host memory.

Shape legend: B pictures, C latent channels, H W latent rows and columns. A mirrored picture is its own entry: the
latents of a mirrored picture are not the mirrored latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.families import Family, TextEmbeds
from train_jobs.data import Use, load_pixels

TEXT_BATCH = 16
PIXELS_PER_BATCH = 4 * 1024 * 1024


@dataclass(frozen=True)
class CachedUse:
    """Mean and standard deviation of a picture's latents, float32 on the CPU, and its caption's row in the texts."""

    name: str
    mean_CHW: Tensor
    std_CHW: Tensor
    text_row: int
    caption_dropout_rate: float


@dataclass(frozen=True)
class TrainingCache:
    """What the loop reads. `entries` maps an entry (a use, once per repeat) to its use; `texts` are on the CPU."""

    uses: tuple[CachedUse, ...]
    entries: tuple[int, ...]
    texts: tuple[TextEmbeds, ...]
    empty_text_row: int

    def entry(self, index: int) -> CachedUse:
        return self.uses[self.entries[index]]

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
                caption_dropout_rate=use.caption_dropout_rate,
            )
        done += len(batch)
        if on_progress is not None:
            on_progress(done, len(uses))
    entries = tuple(i for i, use in enumerate(uses) for _ in range(use.repeats))
    return TrainingCache(tuple(c for c in cached if c is not None), entries, texts, row_of[""])


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
