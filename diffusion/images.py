"""Picture files: reading them, and writing them with the settings that made them inside (a PNG text chunk, or the EXIF
user comment).
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from diffusion.errors import SettingNotSupported

ImageFormat = Literal["png", "jpeg", "webp"]
CONTENT_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
EXTENSIONS: dict[ImageFormat, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
PNG_KEY = "raylora"
THUMBNAIL_SIDE_PX, THUMBNAIL_QUALITY = 256, 80
EXIF_TEXT_BYTES_MAX = 60_000
"""JPEG keeps EXIF in one segment of at most 65,533 bytes."""
_UNICODE = b"UNICODE\0"
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What `read_image` raises for files that are damaged, or no pictures; any of them means the same."""
RANGELESS_MODES = frozenset({"I", "F"})
"""Pillow's for whole numbers of 32 bits and for fractions: a file does not say which of them is white."""


def encode_image(
    image: Image.Image, image_format: ImageFormat, *, settings: Mapping[str, Any] | None = None, quality: int = 92
) -> bytes:
    """The file's bytes. ``settings`` must be JSON-able; ``quality`` (1..100) is for JPEG and WebP.

    In JPEG and WebP, settings too long for EXIF have their longest texts shortened. Raises SettingNotSupported.
    """
    if image_format not in get_args(ImageFormat):
        raise SettingNotSupported("output_format", f"choose one of {', '.join(get_args(ImageFormat))}")
    buffer = io.BytesIO()
    if image_format == "png":
        chunks = PngImagePlugin.PngInfo()
        if settings is not None:
            chunks.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
        image.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    if settings is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _exif_text(dict(settings))
    image.convert("RGB").save(buffer, image_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def thumbnail_uri(image: Image.Image) -> str:
    """A small JPEG as a ``data:`` URI, no side longer than ``THUMBNAIL_SIDE_PX``; for ``modelspec.thumbnail``."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE_PX, THUMBNAIL_SIDE_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_image(source: Path | IO[bytes], formats: tuple[str, ...] | None = None) -> Image.Image:
    """As cameras mean it to be seen, in 8 bits a channel; of an animation the first picture. ``formats`` are Pillow's
    names of those that are read, all by default.

    Raises DECODE_ERRORS; ValueError also where the range of the numbers is unknown.
    """
    with Image.open(source, formats=formats) as image:
        return _in_8_bits(ImageOps.exif_transpose(image))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16 bits to 8 where it converts: everything but the darkest grey would be white."""
    if image.mode in RANGELESS_MODES:
        raise ValueError(f"pictures of the mode {image.mode} have no known range")
    if not image.mode.startswith("I;16"):
        return image
    wide = np.asarray(image)
    grey = Image.fromarray(((wide.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(wide == clear, 0, 255).astype(np.uint8))))


def read_settings(data: bytes) -> dict[str, Any] | None:
    """The settings ``encode_image`` put in, or None when there are none. Raises ValueError when not a picture."""
    try:
        image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError) as exc:
        raise ValueError("not a picture") from exc
    text = image.info.get(PNG_KEY)
    if text is None:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
            return None
        text = comment.removeprefix(_UNICODE).decode("utf-16-be", errors="replace")
    try:
        settings = json.loads(text)
    except ValueError:
        return None  # another program's comment
    return settings if isinstance(settings, dict) else None


def _exif_text(settings: dict[str, Any]) -> bytes:
    """JSON in UTF-16, which is what EXIF 2.3 calls UNICODE; the longest text is halved until it fits."""
    while True:
        encoded = json.dumps(settings, ensure_ascii=False).encode("utf-16-be", errors="replace")
        texts = {key: value for key, value in settings.items() if isinstance(value, str)}
        if len(encoded) <= EXIF_TEXT_BYTES_MAX:
            return _UNICODE + encoded
        key = max(texts, key=lambda name: len(texts[name]), default=None)
        if key is None or len(texts[key]) < 2:
            raise SettingNotSupported("settings", "too long to be embedded in the picture")
        settings[key] = texts[key][: len(texts[key]) // 2]
