"""Zip files of strangers, unpacked under caps that hold while bytes stream. Blocking: not for an event loop."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from serve_app.validation.file_checks import FILE_BYTES_MAX, MIB, FileProblem, FoundFile
from train_jobs.errors import Problem

ENTRIES_MAX = 1000
# Pictures hardly compress; captions do, but are small.
RATIO_MAX = 100
RATIO_SLACK_BYTES = MIB
DIRECTORY_BYTES_MAX = 4 * MIB
CHUNK_BYTES = 64 * 1024

_END = b"PK\x05\x06"
_END_FORMAT = "<4s4H2LH"
_ZIP64_LOCATOR = b"PK\x06\x07"
_END_REACH = 65_557
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})


def unpack(archive: Path, folder: Path, place: str, *, bytes_max: int) -> tuple[list[FoundFile], list[Problem]]:
    """Every file of a zip, written into `folder` under numbers, and what is wrong with the zip.

    Folders inside it are flattened; what macOS adds is left out. Stops at the first cap that is passed: entries,
    bytes of one file, `bytes_max` in all, or bytes out for a byte in.
    """
    found: list[FoundFile] = []
    try:
        _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            left_bytes = bytes_max
            for info in opened.infolist():
                if info.is_dir() or _is_litter(info.filename):
                    continue
                target = folder / str(len(found))
                left_bytes -= _unpack_one(opened, info, target, left_bytes)
                found.append(FoundFile(f"{place}[{info.filename[:100]}]", _plain_name(info.filename), target))
    except FileProblem as problem:
        return [], [problem.at(place)]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, struct.error, UnicodeError, ValueError):
        # What the zip reader raises for damaged or exotic archives.
        return [], [Problem(place, "is not a zip file that can be read", "invalid_value")]
    return found, []


def _check_directory(archive: Path) -> None:
    """The reader loads the whole directory at once, so its size is looked at first. Raises FileProblem."""
    size_bytes = archive.stat().st_size
    with archive.open("rb") as file:
        file.seek(max(0, size_bytes - _END_REACH))
        tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < struct.calcsize(_END_FORMAT):
        raise FileProblem("", "is not a zip file that can be read", "invalid_value")
    _, _, _, _, entries, directory_bytes, _, _ = struct.unpack_from(_END_FORMAT, tail, at)
    if tail[max(0, at - 20) : at].startswith(_ZIP64_LOCATOR):
        raise FileProblem("", "is a zip64 archive, which an upload of this size does not need", "unsupported")
    if entries > ENTRIES_MAX or directory_bytes > DIRECTORY_BYTES_MAX:
        raise FileProblem("", f"has more than {ENTRIES_MAX} files", "too_large")


def _unpack_one(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left_bytes: int) -> int:
    """Bytes written. Raises FileProblem."""
    if info.header_offset < 0:
        # By a directory that is not where the archive says; the reader would seek there.
        raise FileProblem("", "is not a zip file that can be read", "invalid_value")
    if info.flag_bits & 0x1:
        raise FileProblem("", "is encrypted", "unsupported")
    if info.compress_type not in _METHODS:
        raise FileProblem("", "uses a compression other than deflate", "unsupported")
    parts = PurePosixPath(info.filename.replace("\\", "/")).parts
    if ".." in parts or parts[0] == "/":
        raise FileProblem("", "holds a file whose path leads out of it", "invalid_value")
    ratio_bytes_max = RATIO_MAX * info.compress_size + RATIO_SLACK_BYTES
    with opened.open(info) as source, target.open("wb") as sink:
        return _copy(source, sink, left_bytes, ratio_bytes_max)


def _copy(source: IO[bytes], sink: IO[bytes], left_bytes: int, ratio_bytes_max: int) -> int:
    written = 0
    while chunk := source.read(CHUNK_BYTES):
        written += len(chunk)
        if written > FILE_BYTES_MAX:
            raise FileProblem("", f"holds a file over {FILE_BYTES_MAX // MIB} MB", "too_large")
        if written > left_bytes:
            raise FileProblem("", "holds more bytes than an upload may have", "too_large")
        if written > ratio_bytes_max:
            raise FileProblem("", f"is compressed more than {RATIO_MAX} to 1", "too_large")
        sink.write(chunk)
    return written


def _is_litter(name: str) -> bool:
    """What macOS and Windows put into zips beside the user's files."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "__MACOSX" in parts or (bool(parts) and (parts[-1].startswith(".") or parts[-1].lower() == "thumbs.db"))


def _plain_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name
