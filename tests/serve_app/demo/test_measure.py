"""The demo's one number means what its docstring says."""

import pytest
from PIL import Image

from serve_app.demo.measure import distance_to_set, rms_distance


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def test_equal_pictures_are_at_distance_zero_and_black_and_white_at_one() -> None:
    assert rms_distance(plain(7), plain(7)) == 0
    assert rms_distance(plain(0), plain(255)) == 1


def test_each_picture_counts_by_its_nearest_reference() -> None:
    assert distance_to_set([plain(0), plain(255)], [plain(0), plain(255)]) == 0
    assert distance_to_set([plain(0), plain(255)], [plain(255)]) == 0.5


def test_an_empty_set_is_an_error_and_not_zero() -> None:
    with pytest.raises(ValueError, match="at least one"):
        distance_to_set([], [plain(0)])
