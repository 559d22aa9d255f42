"""Latents and text embeddings, computed once before the training and kept in host memory.

Shape legend: B pictures, C latent channels, H W latent rows and columns. A mirrored picture is its own entry: the
latents of a mirrored picture are not the mirrored latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusion.families import Family, TextEmbeds
from train_jobs.captions import CaptionRules
from train_jobs.data import Use, load_mask, load_pixels
from train_jobs.kept import Kept, digest_of_file, name_of
from train_jobs.peers import Alone, Peers
from train_jobs.sharing import share_out

TEXT_BATCH = 16
PIXELS_PER_BATCH = 4 * 1024 * 1024
LATENTS, TEXTS = "latents", "texts"
VERSION = 1
LATENTS_VERSION = 2
"""To be raised when texts or pictures are scaled or encoded in another way: what was kept before is then no longer
found. Of latents 2 since pictures of 16 bits are read as they are."""


@dataclass(frozen=True)
class CachedUse:
    """Mean and standard deviation of a picture's latents, float32 on the CPU, and the rows in the texts of its caption
    and of what stands for a dropped one.

    `weight_1HW` weighs the loss over the picture with a mean of one; None where all of it counts alike. `text` is the
    caption without its trigger word, for `rules` that vary it.
    """

    name: str
    mean_CHW: Tensor
    std_CHW: Tensor
    text_row: int
    dropped_row: int
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

    def entry(self, index: int) -> CachedUse:
        return self.uses[self.entries[index]]

    def choose(self, wanted: Callable[[CachedUse], bool]) -> list[int]:
        """The entries whose use is wanted."""
        return [i for i in range(len(self.entries)) if wanted(self.entry(i))]

    def buckets(self) -> list[tuple[int, ...]]:
        """The bucket of each entry: its latents' shape."""
        return [tuple(self.entry(i).mean_CHW.shape) for i in range(len(self.entries))]


@dataclass
class Encodings:
    """Latents and text embeddings by what they were made from, kept for later runs.

    `latents_by` and `texts_by` are hashes of everything but the picture, its size and flips, or the prompt: the model's
    weights, their rounding, the dtype. Without `texts_by` texts are not kept.
    """

    kept: Kept
    latents_by: str
    texts_by: str | None
    _pictures: dict[Path, str] = field(default_factory=dict)

    def fetch_moments(self, uses: Sequence[Use]) -> dict[int, tuple[Tensor, Tensor]]:
        """Mean and standard deviation `[C, H, W]` of those that are kept, by place. Raises StorageError."""
        names = [self._latents_name(use) for use in uses]
        found = self.kept.fetch(LATENTS, names)
        parts = {i: _tensors(found[name]) for i, name in enumerate(names) if name in found}
        return {i: (part["mean"], part["std"]) for i, part in parts.items() if part.keys() == {"mean", "std"}}

    def keep_moments(self, uses: Sequence[Use], means_BCHW: Tensor, stds_BCHW: Tensor) -> None:
        pairs = zip(uses, means_BCHW, stds_BCHW, strict=True)
        items = {self._latents_name(u): save({"mean": m.contiguous(), "std": s.contiguous()}) for u, m, s in pairs}
        self.kept.keep(LATENTS, items)

    def fetch_texts(self, prompts: Sequence[str]) -> dict[str, TextEmbeds]:
        """One row each, by prompt. Raises StorageError."""
        if self.texts_by is None:
            return {}
        names = {prompt: name_of(VERSION, self.texts_by, prompt) for prompt in prompts}
        found = self.kept.fetch(TEXTS, list(names.values()))
        parts = {prompt: _tensors(found[name]) for prompt, name in names.items() if name in found}
        return {prompt: TextEmbeds(**part) for prompt, part in parts.items() if "hidden_BLD" in part}

    def keep_texts(self, rows: dict[str, TextEmbeds]) -> None:
        if self.texts_by is not None:
            named = {name_of(VERSION, self.texts_by, prompt): row for prompt, row in rows.items()}
            data = {name: {k: t.contiguous() for k, t in row.tensors().items()} for name, row in named.items()}
            self.kept.keep(TEXTS, {name: save(tensors) for name, tensors in data.items()})

    def _latents_name(self, use: Use) -> str:
        path = use.picture.path
        if path not in self._pictures:
            self._pictures[path] = digest_of_file(path)
        how = [use.width_px, use.height_px, use.is_flipped, use.is_flipped_y]
        return name_of(LATENTS_VERSION, self.latents_by, self._pictures[path], how)


def build_cache(
    family: Family,
    uses: Sequence[Use],
    *,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    encodings: Encodings | None = None,
    peers: Peers | None = None,
) -> TrainingCache | None:
    """Encode every picture and caption that `encodings` does not have, each on one of the workers, and give all of
    them to each. None when `should_stop` said so.

    `on_progress(done, total)` counts pictures. Raises ImageUnreadable, StorageError, and whatever the model raises.
    """
    peers = peers or Alone()
    prompts = list(dict.fromkeys([*(use.rules.dropped for use in uses), *(use.picture.caption for use in uses)]))
    rows = _encode_texts(family, prompts, encodings, peers, should_stop)
    if rows is None:
        return None
    moments = _encode_pictures(family, uses, encodings, peers, should_stop, on_progress)
    if moments is None:
        return None
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    entries = tuple(i for i, use in enumerate(uses) for _ in range(use.repeats))
    cached = tuple(_cached(use, *moments[i], row_of) for i, use in enumerate(uses))
    return TrainingCache(cached, entries, tuple(rows[prompt] for prompt in prompts))


def _cached(use: Use, mean_CHW: Tensor, std_CHW: Tensor, row_of: Mapping[str, int]) -> CachedUse:
    return CachedUse(
        name=use.picture.name,
        mean_CHW=mean_CHW,
        std_CHW=std_CHW,
        text_row=row_of[use.picture.caption],
        dropped_row=row_of[use.rules.dropped],
        caption=use.picture.caption,
        text=use.picture.text,
        rules=use.rules,
        weight_1HW=mask_weight(load_mask(use), (mean_CHW.shape[1], mean_CHW.shape[2])),
        loss_weight=use.loss_weight,
        is_regularisation=use.is_regularisation,
        is_validation=use.is_validation,
    )


def _tensors(data: bytes) -> dict[str, Tensor]:
    """None of them where the bytes hold something else, which is then made again."""
    try:
        tensors: dict[str, Tensor] = load(data)
    except (SafetensorError, ValueError):
        return {}
    return tensors


def mask_weight(mask_HW: NDArray[np.float32] | None, latent_size: tuple[int, int]) -> Tensor | None:
    """A mask of pixels as weights of latents, `[1, H, W]`, scaled to a mean of one.

    ai-toolkit scales over the batch; here each picture for itself, so that a sample does not depend on its batch.
    """
    if mask_HW is None:
        return None
    weight = nn.functional.adaptive_avg_pool2d(torch.from_numpy(mask_HW)[None], latent_size)
    return weight / weight.mean().clamp(min=1e-6)


def _by_size(uses: Sequence[Use], indexes: Sequence[int]) -> list[list[int]]:
    """These indexes in batches of equal picture size and bounded area."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index in indexes:
        by_size.setdefault((uses[index].width_px, uses[index].height_px), []).append(index)
    batches: list[list[int]] = []
    for (width_px, height_px), same in by_size.items():
        count = min(16, max(1, PIXELS_PER_BATCH // (width_px * height_px)))
        batches.extend(same[start : start + count] for start in range(0, len(same), count))
    return batches


@torch.no_grad()
def _encode_texts(
    family: Family, prompts: Sequence[str], encodings: Encodings | None, peers: Peers,
    should_stop: Callable[[], bool] | None,
) -> dict[str, TextEmbeds] | None:  # fmt: skip
    """One row each, by prompt."""

    def make(some: Sequence[str]) -> dict[str, TextEmbeds]:
        embeds = family.encode_prompts(some).to(device="cpu")
        new = {prompt: embeds.rows([row]) for row, prompt in enumerate(some)}
        if encodings is not None:
            encodings.keep_texts(new)
        return new

    return share_out(
        peers,
        prompts,
        fetch=lambda own: {} if encodings is None else encodings.fetch_texts(own),
        batches=lambda missing: [missing[i : i + TEXT_BATCH] for i in range(0, len(missing), TEXT_BATCH)],
        make=make,
        on_done=lambda _: None,
        should_stop=should_stop,
    )


def _encode_pictures(
    family: Family, uses: Sequence[Use], encodings: Encodings | None, peers: Peers,
    should_stop: Callable[[], bool] | None, on_progress: Callable[[int, int], None] | None,
) -> dict[int, tuple[Tensor, Tensor]] | None:  # fmt: skip
    """Mean and standard deviation by place in `uses`."""

    def fetch(own: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        if encodings is None:
            return {}
        return {own[i]: pair for i, pair in encodings.fetch_moments([uses[place] for place in own]).items()}

    def make(batch: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        images_BCHW = torch.stack([torch.from_numpy(load_pixels(uses[i])) for i in batch])
        mean_BCHW, std_BCHW = (moment.float().cpu() for moment in family.encode_image_moments(images_BCHW))
        if encodings is not None:
            encodings.keep_moments([uses[i] for i in batch], mean_BCHW, std_BCHW)
        return {i: (mean_BCHW[row].clone(), std_BCHW[row].clone()) for row, i in enumerate(batch)}

    return share_out(
        peers,
        range(len(uses)),
        fetch=fetch,
        batches=lambda missing: _by_size(uses, missing),
        make=make,
        on_done=lambda done: on_progress(done, len(uses)) if on_progress is not None and done else None,
        should_stop=should_stop,
    )
