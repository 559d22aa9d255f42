"""Which files of a folder are pictures, captions and masks, and what they are called when they are uploaded.

No torch here: the command line imports this module.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import Path

from storage.keys import storable_stem

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
MASK_END = "_mask"


def picture_files(folder: Path) -> list[Path]:
    """Files with a picture's suffix, hidden ones and masks beside pictures left out, in name order.

    A missing folder has none.
    """
    masks = set(masks_beside(folder).values())
    return [path for path in _image_files(folder) if path not in masks]


def masks_beside(folder: Path) -> dict[Path, Path]:
    """The masks that lie beside their pictures: `x_mask.png` for the picture `x.jpg`, whose path without a suffix leads
    to it.
    """
    found = _image_files(folder)
    pictures = {path.with_suffix("") for path in found}
    masks = {_unmasked(path): path for path in found if path.stem.endswith(MASK_END)}
    return {picture: mask for picture, mask in masks.items() if picture in pictures}


def upload_groups(folder: Path, caption_ext: str) -> list[dict[str, Path]]:
    """Each picture with its caption and its mask, by the names they are stored under: such as the storage takes, all of
    them different, and with the same meaning. Folders below `folder` become part of the names.
    """
    masks = masks_beside(folder)
    written = {p: "_".join(p.relative_to(folder).with_suffix("").parts) for p in picture_files(folder)}
    taken: set[str] = set()
    groups: list[dict[str, Path]] = []
    # Those whose names can stay come first, so that they do.
    for picture in sorted(written, key=lambda p: (written[p] != storable_stem(written[p]), written[p], p.suffix)):
        stem = _free_stem(storable_stem(written[picture]), taken)
        taken.add(stem.casefold())
        group = {f"{stem}{picture.suffix.lower()}": picture}
        caption = picture.with_suffix(caption_ext)
        if caption.is_file():
            group[f"{stem}{caption_ext}"] = caption
        mask = masks.get(picture.with_suffix(""))
        if mask is not None:
            group[f"{stem}{MASK_END}{mask.suffix.lower()}"] = mask
        groups.append(group)
    return groups


def _free_stem(wanted: str, taken: Collection[str]) -> str:
    """One that is not taken, and by which no picture would become another's mask."""
    numbered = (wanted if number == 1 else f"{wanted}_{number}" for number in count(1))
    return next(stem for stem in numbered if not _names_meaning(stem.casefold()) & set(taken))


def _names_meaning(stem: str) -> set[str]:
    """The stems with which `stem` would be the same, a picture's mask, or a picture whose mask is another picture."""
    return {stem, f"{stem}{MASK_END}", *([stem.removesuffix(MASK_END)] if stem.endswith(MASK_END) else [])}


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _unmasked(path: Path) -> Path:
    """The picture that a mask would belong to, without a suffix."""
    return path.with_name(path.stem.removesuffix(MASK_END) or "_")
