"""What the files of a zip are to a data set, by their paths alone: kept under which name, or left out and why. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from serve_app.validation.file_checks import EXTENSIONS, IMAGE_TYPES, MASK_SUFFIX, extension_of, shown_names
from storage.keys import MANIFEST_NAME, composed

MASK_FOLDERS = frozenset({"mask", "masks"})
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"})
# Pictures that somebody meant to train on: they are refused by name, not left out.
UNREAD_PICTURES = frozenset({"avif", "heic", "heif", "jp2", "jxl", "tif", "tiff"})

OF_THE_SYSTEM = "made by the operating system, or hidden"
NO_PART = "no picture, caption or mask"
RESERVED = "the name is reserved"
NOT_OF_A_PICTURE = (
    "in a folder of masks and of no picture: name a mask like its picture ('masks/x.png' for 'x.png'), or put"
    f" 'x{MASK_SUFFIX}.png' beside it"
)


@dataclass(frozen=True)
class NamedFiles:
    """`kept`: the name in the data set by the index of the path. `left_out`: the reason by the index. `masks`: the
    indexes of what was found in a folder of masks.
    """

    kept: Mapping[int, str] = field(default_factory=dict)
    left_out: Mapping[int, str] = field(default_factory=dict)
    masks: Sequence[int] = ()


def named_files(paths: Sequence[str]) -> NamedFiles:
    """`paths` are parted by "/". Folders are flattened.

    A picture in a folder `mask` or `masks` is the mask of the picture of the same stem outside of it, as ai-toolkit's
    `mask_path` reads such a folder; it gets the name `x_mask`, by which the trainer knows a mask. A folder that all
    files are in is only how the zip was made: what it is called says nothing.
    """
    parts = [PurePosixPath(composed(path)).parts for path in paths]
    left_out = {index: reason for index, of in enumerate(parts) if (reason := _why_left_out(of)) is not None}
    rest = [index for index in range(len(parts)) if index not in left_out]
    shared = _shared_depth([parts[index] for index in rest])
    masks = [index for index in rest if MASK_FOLDERS & {part.lower() for part in parts[index][shared:-1]}]
    kept = {index: parts[index][-1] for index in rest if index not in masks}
    stems = {_stem(name) for name in kept.values() if extension_of(name) in IMAGE_TYPES}
    for index in masks:
        name = PurePosixPath(parts[index][-1])
        extension = extension_of(name.name)
        stem = next((stem for stem in (name.stem.removesuffix(MASK_SUFFIX), name.stem) if stem in stems), None)
        if extension in IMAGE_TYPES and stem is not None:
            kept[index] = f"{stem}{MASK_SUFFIX}{name.suffix}"
        elif extension in UNREAD_PICTURES:
            kept[index] = name.name
        else:
            left_out[index] = NOT_OF_A_PICTURE
    return NamedFiles(dict(sorted(kept.items())), dict(sorted(left_out.items())), [i for i in masks if i in kept])


def notes_on_names(archive: str, paths: Sequence[str], files: NamedFiles) -> list[str]:
    """What was left out of the zip, a line for each reason, and what was taken for masks."""
    notes = []
    for reason in Counter(files.left_out.values()):
        names = shown_names([paths[index] for index, why in files.left_out.items() if why == reason])
        notes.append(f"Left out of '{archive}' ({reason}): {names}")
    if files.masks:
        names = shown_names([paths[index] for index in files.masks])
        notes.append(f"Taken from '{archive}' as masks of the pictures of the same names: {names}")
    return notes


def _why_left_out(parts: tuple[str, ...]) -> str | None:
    name = parts[-1]
    if "__MACOSX" in parts or any(part.startswith(".") for part in parts) or name.lower() in SYSTEM_FILES:
        return OF_THE_SYSTEM
    if name.lower() == MANIFEST_NAME:
        return RESERVED
    return None if extension_of(name) in (*EXTENSIONS, *UNREAD_PICTURES) else NO_PART


def _shared_depth(parts: Sequence[tuple[str, ...]]) -> int:
    """How many folders, from the top, all files are in."""
    depth = min((len(of) - 1 for of in parts), default=0)
    return next((level for level in range(depth) if len({of[level] for of in parts}) > 1), depth)


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
