"""A folder of pictures and captions, and how each picture is used.

Pictures keep their shape: each goes to the aspect-ratio bucket nearest to it (after ai-toolkit `toolkit/buckets.py`),
is scaled to cover it and cropped around the centre. Captions follow `toolkit/dataloader_mixins.py`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from train_jobs.errors import DatasetEmpty, ImageUnreadable
from train_jobs.spec import DatasetSpec

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
ROUNDING = 1e-9
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """A readable picture file. Sizes are after the camera's rotation is applied. `name` is safe to show."""

    path: Path
    name: str
    width_px: int
    height_px: int
    caption: str


@dataclass(frozen=True)
class Use:
    """One way a picture is trained on: at a bucket's size, perhaps mirrored, `repeats` times an epoch."""

    picture: Picture
    width_px: int
    height_px: int
    is_flipped: bool
    repeats: int
    caption_dropout_rate: float


def read_folder(folder: Path, spec: DatasetSpec) -> list[Picture]:
    """Every picture below `folder`, decoded once to be sure of it, in name order.

    Raises DatasetEmpty; ImageUnreadable with the names of all the pictures that cannot be decoded.
    """
    pictures: list[Picture] = []
    broken: list[str] = []
    for path in picture_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            with Image.open(path) as image:
                image.load()
                width_px, height_px = ImageOps.exif_transpose(image).size
        except DECODE_ERRORS:
            broken.append(name)
            continue
        pictures.append(Picture(path, name, width_px, height_px, read_caption(path, spec)))
    if broken:
        raise ImageUnreadable(broken)
    if not pictures:
        raise DatasetEmpty(spec.label)
    return pictures


def picture_files(folder: Path) -> list[Path]:
    """Files with a picture's suffix, hidden ones and masks left out, in name order. A missing folder has none.

    A mask is `x_mask.png` beside a picture `x`.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    pictures = {path.with_suffix("") for path in found}
    return [path for path in found if not (path.stem.endswith("_mask") and _unmasked(path) in pictures)]


def _unmasked(path: Path) -> Path:
    """The picture that a mask would belong to, without a suffix."""
    return path.with_name(path.stem.removesuffix("_mask") or "_")


def read_caption(path: Path, spec: DatasetSpec) -> str:
    """The text beside a picture, or the default; `[trigger]` replaced, and the trigger word put first if absent."""
    text = ""
    beside = path.with_suffix(spec.caption_ext)
    if beside.is_file():
        text = " ".join(beside.read_text(encoding="utf-8-sig", errors="replace").split())
    if not text:
        text = spec.default_caption or ""
    return with_trigger(text, spec.trigger_word)


def with_trigger(text: str, trigger_word: str | None) -> str:
    """`toolkit/prompt_utils.py: inject_trigger_into_prompt`."""
    word = (trigger_word or "").strip()
    text = re.sub(r"\[(?:trigger|name)\]", lambda _: word, text)
    if word and word not in text:
        text = f"{word} {text}"
    return text.strip()


def plan_uses(pictures: Sequence[Picture], spec: DatasetSpec, *, size_multiple: int) -> list[Use]:
    """Each picture at each resolution, and mirrored too with `flip_x`.

    `size_multiple`: both sides of every bucket are multiples of it, in pixels.
    """
    uses: list[Use] = []
    for resolution_px in spec.resolutions_px:
        for picture in pictures:
            width_px, height_px = bucket_of(picture, spec, resolution_px, size_multiple)
            uses.extend(
                Use(picture, width_px, height_px, is_flipped, spec.repeats, spec.caption_dropout_rate)
                for is_flipped in ((False, True) if spec.flip_x else (False,))
            )
    return uses


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
        with Image.open(use.picture.path) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = ImageOps.fit(_on_white(upright), (use.width_px, use.height_px), Image.Resampling.BICUBIC)
    except DECODE_ERRORS:
        raise ImageUnreadable([use.picture.name]) from None
    if use.is_flipped:
        pixels = ImageOps.mirror(pixels)
    array = np.asarray(pixels, dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _on_white(image: Image.Image) -> Image.Image:
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

    `bucket_of_entry` gives each entry's bucket. Every entry comes once an epoch; batches hold one bucket each, so
    the last one of a bucket may be short.
    """

    def __init__(self, bucket_of_entry: Sequence[object], *, batch_size: int, seed: int) -> None:
        self._buckets: dict[object, list[int]] = {}
        for entry, bucket in enumerate(bucket_of_entry):
            self._buckets.setdefault(bucket, []).append(entry)
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
