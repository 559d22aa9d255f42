"""How far pictures are from a set of others, in one plain number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image


def _pixels(image: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    return np.asarray(image.convert("RGB").resize(size), dtype=np.float64) / 255


def rms_distance(a: Image.Image, b: Image.Image) -> float:
    """Root mean square difference over pixels and channels, both scaled 0-1: 0 equal, 1 black against white."""
    return float(np.sqrt(np.mean((_pixels(a, b.size) - _pixels(b, b.size)) ** 2)))


def distance_to_set(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Mean over ``images`` of the RMS distance to the nearest reference. Raises ValueError where either is empty."""
    if not images or not references:
        raise ValueError("both sets need at least one picture")
    return float(np.mean([min(rms_distance(image, reference) for reference in references) for image in images]))
