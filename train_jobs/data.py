"""A folder of pictures and captions, and how each picture is used.

Pictures keep their shape: each goes to the aspect-ratio bucket nearest to it (after ai-toolkit `toolkit/buckets.py`),
is scaled to cover it and cropped around the centre. Captions follow `toolkit/dataloader_mixins.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion.images import DECODE_ERRORS, read_image
from train_jobs.captions import CaptionRules, with_trigger
from train_jobs.errors import DatasetEmpty, ImageUnreadable
from train_jobs.folder_files import masks_beside, picture_files
from train_jobs.spec import DatasetSpec

ROUNDING = 1e-9


@dataclass(frozen=True)
class Picture:
    """A readable picture file. Sizes are after the camera's rotation is applied. `name` is safe to show.

    `caption` has the trigger word in it; `text` is what it was made from.
    """

    path: Path
    name: str
    width_px: int
    height_px: int
    caption: str
    text: str = ""
    mask_path: Path | None = None


@dataclass(frozen=True)
class Use:
    """One way a picture is trained on: at a bucket's size, perhaps mirrored, `repeats` times an epoch.

    `loss_weight` multiplies its loss; `dataset` gives the rules of its masks.
    """

    picture: Picture
    width_px: int
    height_px: int
    is_flipped: bool
    repeats: int
    caption_dropout_rate: float
    is_flipped_y: bool = False
    dataset: DatasetSpec | None = None
    loss_weight: float = 1.0
    is_validation: bool = False

    @property
    def rules(self) -> CaptionRules:
        spec = self.dataset
        if spec is None:
            return CaptionRules(self.caption_dropout_rate)
        return CaptionRules(
            self.caption_dropout_rate, spec.shuffle_tokens, spec.token_dropout_rate, spec.keep_tokens,
            spec.trigger_word, trigger_in_front=not spec.is_regularisation, dropped=spec.dropped_caption,
        )  # fmt: skip

    @property
    def is_regularisation(self) -> bool:
        return self.dataset is not None and self.dataset.is_regularisation


def read_folder(folder: Path, spec: DatasetSpec, masks: Path | None = None) -> list[Picture]:
    """Every picture below `folder`, decoded once to be sure of it, in name order.

    `masks` is a folder with a mask of the same name, whatever its suffix, for some or all of them; any other picture
    `x` has the mask `x_mask` beside it, where there is one.
    Raises DatasetEmpty; ImageUnreadable with the names of all the pictures that cannot be decoded.
    """
    pictures: list[Picture] = []
    broken: list[str] = []
    mask_of = {m.relative_to(masks).with_suffix("").as_posix(): m for m in picture_files(masks)} if masks else {}
    beside = masks_beside(folder)
    for path in picture_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            width_px, height_px = read_image(path).size
        except DECODE_ERRORS:
            broken.append(name)
            continue
        text = read_text(path, spec)
        caption = caption_of(text, spec)
        mask = mask_of.get(path.relative_to(folder).with_suffix("").as_posix(), beside.get(path.with_suffix("")))
        pictures.append(Picture(path, name, width_px, height_px, caption, text, mask))
    if broken:
        raise ImageUnreadable(broken)
    if not pictures:
        raise DatasetEmpty(spec.label)
    return pictures


def same_pictures(pictures: Sequence[Picture]) -> list[tuple[str, ...]]:
    """Names of pictures whose files are equal byte by byte, group by group in name order."""
    by_digest: dict[str, list[str]] = {}
    for picture in pictures:
        with picture.path.open("rb") as file:
            by_digest.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), []).append(picture.name)
    return [tuple(names) for names in by_digest.values() if len(names) > 1]


def read_text(path: Path, spec: DatasetSpec) -> str:
    """The text beside a picture, or the default."""
    return own_text(path, spec) or spec.default_caption or ""


def own_text(path: Path, spec: DatasetSpec) -> str:
    """The text beside a picture, in one line; empty where there is none."""
    beside = path.with_suffix(spec.caption_ext)
    return " ".join(beside.read_text(encoding="utf-8-sig", errors="replace").split()) if beside.is_file() else ""


def caption_of(text: str, spec: DatasetSpec) -> str:
    """`text` with the trigger word; a regularisation picture, which shows something else, has it only where the text
    asks for it."""
    return with_trigger(text, spec.trigger_word, in_front=not spec.is_regularisation)


def plan_uses(
    pictures: Sequence[Picture],
    spec: DatasetSpec,
    *,
    size_multiple: int,
    regularisation_weight: float = 1.0,
    held_out: frozenset[str] = frozenset(),
) -> list[Use]:
    """Each picture at each resolution, and mirrored too with `flip_x` and `flip_y`.

    `size_multiple`: both sides of every bucket are multiples of it, in pixels. Pictures whose names are `held_out`
    are used once, for validation.
    """
    weight = spec.loss_multiplier * (regularisation_weight if spec.is_regularisation else 1.0)
    flips = [(False, False), *([(True, False)] if spec.flip_x else []), *([(False, True)] if spec.flip_y else [])]
    if spec.flip_x and spec.flip_y:
        flips.append((True, True))
    uses: list[Use] = []
    for resolution_px in spec.resolutions_px:
        for picture in pictures:
            width_px, height_px = bucket_of(picture, spec, resolution_px, size_multiple)
            if picture.name in held_out:
                uses.append(Use(picture, width_px, height_px, False, 1, 0.0, dataset=spec, is_validation=True))
                continue
            uses.extend(
                Use(picture, width_px, height_px, x, spec.repeats, spec.caption_dropout_rate, y, spec, weight)
                for x, y in flips
            )
    return uses


def choose_held_out(pictures: Sequence[Picture], share: float, seed: int) -> frozenset[str]:
    """Names of about `share` of the pictures, at least one and never all of them."""
    count = min(max(1, round(share * len(pictures))), len(pictures) - 1)
    order = np.random.default_rng([seed, len(pictures)]).permutation(len(pictures))
    return frozenset(pictures[i].name for i in order[: max(0, count)])


def bucket_of(picture: Picture, spec: DatasetSpec, resolution_px: int, size_multiple: int) -> tuple[int, int]:
    """Width and height of a picture's bucket; a square of the resolution without buckets."""
    if not spec.buckets:
        side_px = max(size_multiple, resolution_px // size_multiple * size_multiple)
        return side_px, side_px
    step_px = math.lcm(spec.bucket_step_px, size_multiple)
    return bucket_size(picture.width_px, picture.height_px, resolution_px, step_px)


def bucket_size(width_px: int, height_px: int, resolution_px: int, step_px: int) -> tuple[int, int]:
    """The size on the step that keeps most of the picture at nearest to its own area, capped at the resolution squared.

    ai-toolkit looks at the area alone, and so may crop half of a small square picture away; here a candidate's score
    is the part of the picture left after cropping, times how near its area is to the wanted one.
    """
    area_max = resolution_px * resolution_px
    area = min(width_px * height_px, area_max)
    scale = math.sqrt(area / (width_px * height_px))
    columns, rows = width_px * scale / step_px, height_px * scale / step_px
    candidates = [
        (c * step_px, r * step_px)
        for c in {math.floor(columns + ROUNDING), math.ceil(columns - ROUNDING)}
        for r in {math.floor(rows + ROUNDING), math.ceil(rows - ROUNDING)}
        if c > 0 and r > 0 and c * r * step_px * step_px <= area_max
    ]
    if not candidates:
        return max(1, math.floor(columns)) * step_px, max(1, math.floor(rows)) * step_px

    def score(size: tuple[int, int]) -> float:
        shape = size[0] * height_px / (size[1] * width_px)
        share = size[0] * size[1] / area
        return min(shape, 1 / shape) * min(share, 1 / share)

    return max(sorted(candidates), key=score)


def load_pixels(use: Use) -> NDArray[np.float32]:
    """`[3, height, width]` in -1..1. Transparency is put on white. Raises ImageUnreadable."""
    try:
        upright = read_image(use.picture.path)
        pixels = ImageOps.fit(on_white(upright), (use.width_px, use.height_px), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        raise ImageUnreadable([use.picture.name]) from None
    array = np.asarray(_flipped(pixels, use), dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def load_mask(use: Use) -> NDArray[np.float32] | None:
    """`[height, width]` in 0..1, how much each pixel counts; None where all count alike. Raises ImageUnreadable."""
    spec, picture = use.dataset, use.picture
    if spec is None or (picture.mask_path is None and not spec.alpha_mask):
        return None
    try:
        upright = read_image(picture.mask_path or picture.path)
        grey = upright.convert("L") if picture.mask_path is not None else upright.convert("RGBA").getchannel("A")
        fitted = ImageOps.fit(grey, (use.width_px, use.height_px), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        raise ImageUnreadable([picture.name]) from None
    mask = np.asarray(_flipped(fitted, use), dtype=np.float32) / 255.0
    mask = 1.0 - mask if spec.invert_mask else mask
    return np.ascontiguousarray(spec.mask_min_value + (1.0 - spec.mask_min_value) * mask)


def _flipped(image: Image.Image, use: Use) -> Image.Image:
    image = ImageOps.mirror(image) if use.is_flipped else image
    return ImageOps.flip(image) if use.is_flipped_y else image


def on_white(image: Image.Image) -> Image.Image:
    """In RGB, transparency put on white."""
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Batch:
    """Samples of one bucket that are trained on together: `(entry, epoch)` pairs, entries numbering the uses with
    their repeats. A pair occurs once in a training, so it can seed the sample's random numbers."""

    entries: tuple[int, ...]
    epoch: int


class BatchPlan:
    """The order of a whole training, a pure function of the seed: any batch can be computed from its number alone.

    `bucket_of_entry` gives each entry's bucket; `entries` are those that take part, all by default. Each of them comes
    once an epoch; batches hold one bucket each, so the last one of a bucket may be short.
    """

    def __init__(
        self, bucket_of_entry: Sequence[object], *, batch_size: int, seed: int, entries: Sequence[int] | None = None
    ) -> None:
        self._buckets: dict[object, list[int]] = {}
        for entry in range(len(bucket_of_entry)) if entries is None else entries:
            self._buckets.setdefault(bucket_of_entry[entry], []).append(entry)
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = sum(-(-len(entries) // batch_size) for entries in self._buckets.values())
        self._epoch: int = -1
        self._batches: list[Batch] = []

    def batch(self, number: int) -> Batch:
        """Batch `number` of the training, counted from 0 through all epochs."""
        epoch, index = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = list(self._shuffled(epoch))
            self._epoch = epoch
        return self._batches[index]

    def _shuffled(self, epoch: int) -> Iterator[Batch]:
        random = np.random.default_rng([self._seed, epoch])
        batches: list[Batch] = []
        for entries in self._buckets.values():
            order = [entries[i] for i in random.permutation(len(entries))]
            batches.extend(
                Batch(tuple(order[start : start + self._batch_size]), epoch)
                for start in range(0, len(order), self._batch_size)
            )
        for index in random.permutation(len(batches)):
            yield batches[index]


class TurnsPlan:
    """Regularisation batches take turns with the others, which come first (ai-toolkit does the same)."""

    def __init__(self, plan: BatchPlan, regularisation: BatchPlan) -> None:
        self._plans = (plan, regularisation)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the training, counted from 0 through all epochs."""
        return self._plans[number % 2].batch(number // 2)
