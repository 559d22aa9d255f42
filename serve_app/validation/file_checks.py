"""The files of a dataset, checked one by one and together, whichever way they came. Blocking: not for an event loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from serve_app.validation.pictures import PictureFacts, PictureProblem, decode_pictures
from storage.errors import InvalidKey
from storage.keys import MANIFEST_NAME, check_filename
from train_jobs.errors import Problem

MIB = 1024 * 1024
FILE_BYTES_MAX = 100 * MIB
TOTAL_BYTES_MAX = 500 * MIB
OVER_TOTAL = f"are over {TOTAL_BYTES_MAX // MIB} MB in all"
IMAGE_TYPES = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "bmp": "image/bmp",
    "gif": "image/gif",
}
TEXT_TYPES = {"txt": "text/plain", "yaml": "application/yaml", "yml": "application/yaml", "json": "application/json"}
EXTENSIONS = (*IMAGE_TYPES, *TEXT_TYPES)
MASK_SUFFIX = "_mask"
TAKEN = "another file of this upload has this name (folders, upper and lower case and Unicode forms make no difference)"
NAMES_SHOWN_MAX = 20
NAME_SHOWN_MAX = 100

Decode = Callable[[Sequence[Path]], list[PictureFacts | PictureProblem]]


class FileProblem(Exception):
    """Why one file is refused; `field` is the part of the request that says so."""

    def __init__(self, field: str, message: str, code: str) -> None:
        super().__init__(message)
        self.field, self.message, self.code = field, message, code

    def at(self, place: str) -> Problem:
        return Problem(f"{place}.{self.field}" if self.field else place, self.message, self.code)


@dataclass(frozen=True)
class FoundFile:
    """A file as it came, on disk. `place` is where the request speaks of it."""

    place: str
    filename: str
    path: Path


@dataclass(frozen=True)
class CheckedFile:
    filename: str
    path: Path
    size_bytes: int
    content_type: str
    kind: Literal["image", "mask", "text"]


def extension_of(filename: str) -> str:
    return PurePosixPath(filename).suffix.removeprefix(".").lower()


def check_name(filename: str, extensions: Sequence[str] = EXTENSIONS) -> None:
    """Raises FileProblem."""
    try:
        check_filename(filename)
    except InvalidKey as invalid:
        raise FileProblem("filename", invalid.reason, "invalid_value") from None
    if filename.lower() == MANIFEST_NAME:
        raise FileProblem("filename", f"{MANIFEST_NAME} is reserved", "invalid_value")
    if extension_of(filename) not in extensions:
        raise FileProblem("filename", f"must end in one of {', '.join(extensions)}", "unsupported")


def check_names(names: Sequence[str], extensions: Sequence[str] = EXTENSIONS) -> list[FileProblem | None]:
    """What is wrong with each name, taken together: no two may be the same but for their case."""
    problems: list[FileProblem | None] = []
    seen: set[str] = set()
    for name in names:
        try:
            if name.lower() in seen:
                raise FileProblem("filename", TAKEN, "duplicate")
            seen.add(name.lower())
            check_name(name, extensions)
        except FileProblem as problem:
            problems.append(problem)
        else:
            problems.append(None)
    return problems


def check_files(
    found: Sequence[FoundFile], decode: Decode = decode_pictures
) -> tuple[list[CheckedFile], list[Problem]]:
    """Names, sizes, and what the files really hold. The problems are in the order of `found`."""
    problems: dict[int, Problem] = {}
    for index, problem in enumerate(check_names([file.filename for file in found])):
        if problem is not None:
            problems[index] = problem.at(found[index].place)
    good = [index for index in range(len(found)) if index not in problems]
    checked: dict[int, CheckedFile] = {}
    masks = mask_names([found[index].filename for index in good])
    facts = _decoded(found, good, decode)
    total_bytes = 0
    for index in good:
        file = found[index]
        try:
            size_bytes = file.path.stat().st_size
            total_bytes += size_bytes
            _check_size(size_bytes, total_bytes)
            checked[index] = _checked(file, size_bytes, facts.get(index), file.filename in masks)
        except FileProblem as problem:
            problems[index] = problem.at(file.place)
    _check_masks(found, facts, masks, problems)
    if not problems and not any(file.kind == "image" for file in checked.values()):
        return [], [Problem("files", "at least one image is needed", "missing")]
    return list(checked.values()), [problems[index] for index in sorted(problems)]


def mask_names(names: Sequence[str]) -> dict[str, str]:
    """The masks among `names`, each with the picture that it belongs to: `x_mask.png` beside `x.jpg`."""
    stems = {name: PurePosixPath(name).stem for name in names if extension_of(name) in IMAGE_TYPES}
    pictures = {stem: name for name, stem in stems.items()}
    return {
        name: pictures[stem.removesuffix(MASK_SUFFIX)]
        for name, stem in stems.items()
        if stem.endswith(MASK_SUFFIX) and stem.removesuffix(MASK_SUFFIX) in pictures
    }


def notes_on(files: Sequence[CheckedFile]) -> list[str]:
    """What is odd about an upload and no error."""
    images = {PurePosixPath(file.filename).stem for file in files if file.kind == "image"}
    captions = {PurePosixPath(file.filename).stem for file in files if file.filename.lower().endswith(".txt")}
    notes = []
    if images - captions:
        notes.append(f"{len(images - captions)} image(s) have no caption")
    notes += [f"Caption '{name}.txt' belongs to no image" for name in sorted(captions - images)]
    lone = sorted(name for name in images if name.endswith(MASK_SUFFIX))
    notes += [f"'{name}' belongs to no image and counts as one" for name in lone]
    return notes


def shown_names(names: Sequence[str]) -> str:
    """Some of them, quoted and cut, and how many there are besides."""
    cut = [name if len(name) <= NAME_SHOWN_MAX else f"{name[:NAME_SHOWN_MAX]}..." for name in names[:NAMES_SHOWN_MAX]]
    listed = ", ".join(repr(name) for name in cut)
    more = len(names) - NAMES_SHOWN_MAX
    return f"{listed} and {more} more" if more > 0 else listed


def _decoded(
    found: Sequence[FoundFile], good: Sequence[int], decode: Decode
) -> dict[int, PictureFacts | PictureProblem]:
    pictures = [index for index in good if extension_of(found[index].filename) in IMAGE_TYPES]
    return dict(zip(pictures, decode([found[index].path for index in pictures]), strict=True))


def _check_size(size_bytes: int, total_bytes: int) -> None:
    if size_bytes == 0:
        raise FileProblem("content", "is empty", "missing")
    if size_bytes > FILE_BYTES_MAX:
        raise FileProblem("content", f"is over {FILE_BYTES_MAX // MIB} MB", "too_large")
    if total_bytes > TOTAL_BYTES_MAX:
        raise FileProblem("content", f"the upload is over {TOTAL_BYTES_MAX // MIB} MB in all", "too_large")


def _checked(
    file: FoundFile, size_bytes: int, facts: PictureFacts | PictureProblem | None, is_mask: bool
) -> CheckedFile:
    if facts is None:
        extension = extension_of(file.filename)
        _check_text(file.path, extension)
        return CheckedFile(file.filename, file.path, size_bytes, TEXT_TYPES[extension], "text")
    if isinstance(facts, PictureProblem):
        raise FileProblem("content", facts.message, facts.code)
    # The real content decides; the extension may be another picture type's.
    content_type = f"image/{facts.format.lower()}"
    return CheckedFile(file.filename, file.path, size_bytes, content_type, "mask" if is_mask else "image")


def _check_masks(
    found: Sequence[FoundFile],
    facts: dict[int, PictureFacts | PictureProblem],
    masks: dict[str, str],
    problems: dict[int, Problem],
) -> None:
    index_of = {found[index].filename: index for index in facts}
    masked: set[str] = set()
    for mask, picture in masks.items():
        if picture in masked:
            # The trainer would take one of them for the mask, and the other for a picture.
            reason = FileProblem("filename", f"the picture '{picture}' has another mask in this upload", "duplicate")
            problems.setdefault(index_of[mask], reason.at(found[index_of[mask]].place))
        masked.add(picture)
        mine, its = facts[index_of[mask]], facts[index_of[picture]]
        if not isinstance(mine, PictureFacts) or not isinstance(its, PictureFacts):
            continue
        if (mine.width_px, mine.height_px) != (its.width_px, its.height_px):
            reason = FileProblem("content", f"a mask must have the size of its picture '{picture}'", "invalid_value")
            problems.setdefault(index_of[mask], reason.at(found[index_of[mask]].place))


def _check_text(path: Path, extension: str) -> None:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileProblem("content", "is not UTF-8 text", "invalid_value") from None
    if extension != "json":
        return
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise FileProblem("content", "is not valid JSON", "invalid_value") from None
