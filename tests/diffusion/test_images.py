from __future__ import annotations

import io
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import SettingNotSupported
from diffusion.images import CONTENT_TYPES, EXTENSIONS, ImageFormat, encode_image, read_image, read_settings

FORMATS = get_args(ImageFormat)
SETTINGS: dict[str, Any] = {"prompt": "ein grünes Ei, 卵 🥚", "seed": 2**60, "guidance": 7.5, "loras": [{"id": "x"}]}


@pytest.fixture
def picture() -> Image.Image:
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    return Image.fromarray(np.stack([ramp, ramp * 2, 255 - ramp], axis=-1))


@pytest.mark.parametrize("image_format", FORMATS)
def test_settings_come_back_from_the_file(image_format: ImageFormat, picture: Image.Image) -> None:
    data = encode_image(picture, image_format, settings=SETTINGS)
    assert read_settings(data) == SETTINGS
    opened = Image.open(io.BytesIO(data))
    assert (opened.format, opened.size) == (image_format.upper(), picture.size)
    assert opened.get_format_mimetype() == CONTENT_TYPES[image_format]
    assert image_format in EXTENSIONS


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_file_without_settings_has_none(image_format: ImageFormat, picture: Image.Image) -> None:
    assert read_settings(encode_image(picture, image_format)) is None


def test_png_keeps_every_pixel_and_the_others_come_close(picture: Image.Image) -> None:
    original = np.asarray(picture).astype(int)
    worst = {}
    for image_format in FORMATS:
        opened = Image.open(io.BytesIO(encode_image(picture, image_format))).convert("RGB")
        worst[image_format] = float(np.abs(np.asarray(opened).astype(int) - original).mean())
    assert worst["png"] == 0
    assert max(worst.values()) < 5


def test_transparency_is_dropped_where_the_format_has_none(picture: Image.Image) -> None:
    assert Image.open(io.BytesIO(encode_image(picture.convert("RGBA"), "jpeg"))).mode == "RGB"


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_a_prompt_too_long_for_exif_is_shortened(image_format: ImageFormat, picture: Image.Image) -> None:
    settings = read_settings(encode_image(picture, image_format, settings=SETTINGS | {"prompt": "é" * 100_000}))
    assert settings is not None
    assert 10_000 < len(settings["prompt"]) < 100_000
    assert settings["seed"] == SETTINGS["seed"]


def test_settings_that_cannot_be_shortened_are_refused(picture: Image.Image) -> None:
    with pytest.raises(SettingNotSupported):
        encode_image(picture, "jpeg", settings={"numbers": list(range(100_000))})


def test_an_unknown_format_is_refused(picture: Image.Image) -> None:
    with pytest.raises(SettingNotSupported, match="png, jpeg, webp"):
        encode_image(picture, "gif")  # type: ignore[arg-type]


def test_another_programs_comment_is_not_taken_for_settings(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "hello".encode("utf-16-be")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert read_settings(buffer.getvalue()) is None


def test_bytes_that_are_no_picture_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a picture"):
        read_settings(b"hello")


def _read(image: Image.Image, suffix: str = "png", **options: Any) -> Image.Image:
    data = io.BytesIO()
    image.save(data, suffix, **options)
    data.seek(0)
    return read_image(data)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    read = _read(Image.fromarray(np.array([[0, 257, 20_000, 32_768, 65_535]], dtype=np.uint16)))
    assert read.mode == "L"
    assert np.asarray(read).tolist() == [[0, 1, 78, 128, 255]]


def test_a_clear_shade_of_16_bits_stays_clear() -> None:
    read = _read(Image.fromarray(np.array([[0, 20_000, 65_535]], dtype=np.uint16)), transparency=20_000)
    assert np.asarray(read.convert("RGBA"))[0, :, 3].tolist() == [255, 0, 255]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="no known range"):
        _read(Image.fromarray(np.array([[0, 1]], dtype=kind)), "tiff")


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_a_photograph_that_lies_on_its_side_is_turned(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert _read(Image.new(mode, (4, 2)), exif=exif).size == (2, 4)


def test_of_an_animation_the_first_picture_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        read = _read(frames[0], suffix, save_all=True, append_images=frames[1:], lossless=True)
        assert read.convert("RGB").getpixel((0, 0)) == (255 if suffix != "webp" else pytest.approx(255, abs=2), 0, 0)


def test_inks_become_colours() -> None:
    red, green, blue = np.asarray(_read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg").convert("RGB"))[4, 4]
    assert red > 240 > 15 > max(green, blue)


def test_a_palettes_clear_colour_stays_clear() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    read = _read(image, "gif", transparency=0).convert("RGBA")
    assert read.getpixel((0, 0))[3] == 0  # type: ignore[index]
    assert read.getpixel((1, 0)) == (255, 0, 0, 255)
