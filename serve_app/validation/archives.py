"""Zip files of strangers, unpacked under caps that hold while bytes stream. Blocking: not for an event loop."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from serve_app.validation.archive_names import named_files, notes_on_names
from serve_app.validation.file_checks import FILE_BYTES_MAX, MIB, FileProblem, FoundFile
from train_jobs.errors import Problem

FILES_MAX = 1000
# A Mac's own zip has a twin for each file, and entries for folders.
ENTRIES_MAX = 4 * FILES_MAX
# Pictures hardly compress; captions do, but are small.
RATIO_MAX = 100
RATIO_SLACK_BYTES = MIB
DIRECTORY_BYTES_MAX = 4 * MIB
CHUNK_BYTES = 64 * 1024

_END = b"PK\x05\x06"
_END_FORMAT = "<4s4H2LH"
_ZIP64_LOCATOR = b"PK\x06\x07"
_END_REACH = 65_557
_UTF8_FLAG = 0x800
_OVER_FILE = f"holds a file over {FILE_BYTES_MAX // MIB} MB"
_OVER_RATIO = f"is compressed more than {RATIO_MAX} to 1"
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})


@dataclass(frozen=True)
class Unpacked:
    """`files` are on disk. `notes` tell what was left out, and why. With `problems` there are no files."""

    files: list[FoundFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def unpack(archive: Path, folder: Path, place: str, *, bytes_max: int, shown_name: str = "zip") -> Unpacked:
    """The files of a zip that are for a data set, written into `folder` under numbers.

    Their names are those of `archive_names.named_files`; what is left out is never opened. Refused whole: a path that
    leads out, a link, and the first cap that is passed (entries, bytes of one file, `bytes_max` in all, or bytes out
    for a byte in). `shown_name` is the zip's in the notes.
    """
    found: list[FoundFile] = []
    try:
        _check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            entries = [(path, info) for info in opened.infolist() if not (path := _checked_path(info)).endswith("/")]
            paths = [path for path, _ in entries]
            named = named_files(paths)
            if len(named.kept) > FILES_MAX:
                raise FileProblem("", f"has more than {FILES_MAX} files for a data set", "too_large")
            for index in named.left_out:
                _check_unopened(entries[index][1])
            left_bytes = bytes_max
            for index, filename in named.kept.items():
                path, info = entries[index]
                target = folder / str(len(found))
                left_bytes -= _unpack_one(opened, info, target, left_bytes)
                found.append(FoundFile(f"{place}[{path[:100]}]", filename, target))
    except FileProblem as problem:
        return Unpacked(problems=[problem.at(place)])
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, struct.error, UnicodeError, ValueError):
        # What the zip reader raises for damaged or exotic archives.
        return Unpacked(problems=[Problem(place, "is not a zip file that can be read", "invalid_value")])
    return Unpacked(found, notes_on_names(shown_name, paths, named))


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
        raise FileProblem("", f"has more than {ENTRIES_MAX} entries", "too_large")


def _checked_path(info: zipfile.ZipInfo) -> str:
    """An entry's path, parted by "/"; that of a folder ends in one. Raises FileProblem for what may be in no zip."""
    path = _decoded_path(info).replace("\\", "/")
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise FileProblem("", "holds a file whose path leads out of it", "invalid_value")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise FileProblem("", "holds a link or another special file: zip the files themselves", "unsupported")
    return path


def _check_unopened(info: zipfile.ZipInfo) -> None:
    """By what the directory says; of files that are opened it is measured. Raises FileProblem."""
    if info.file_size > FILE_BYTES_MAX:
        raise FileProblem("", _OVER_FILE, "too_large")
    if info.file_size > _ratio_bytes_max(info):
        raise FileProblem("", _OVER_RATIO, "too_large")


def _decoded_path(info: zipfile.ZipInfo) -> str:
    """macOS writes UTF-8 without the flag that says so, which the reader then takes for code page 437."""
    if info.flag_bits & _UTF8_FLAG:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _unpack_one(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left_bytes: int) -> int:
    """Bytes written. Raises FileProblem."""
    if info.header_offset < 0:
        # By a directory that is not where the archive says; the reader would seek there.
        raise FileProblem("", "is not a zip file that can be read", "invalid_value")
    if info.flag_bits & 0x1:
        raise FileProblem("", "is encrypted", "unsupported")
    if info.compress_type not in _METHODS:
        raise FileProblem("", "uses a compression other than deflate", "unsupported")
    with opened.open(info) as source, target.open("wb") as sink:
        return _copy(source, sink, left_bytes, _ratio_bytes_max(info))


def _ratio_bytes_max(info: zipfile.ZipInfo) -> int:
    return RATIO_MAX * info.compress_size + RATIO_SLACK_BYTES


def _copy(source: IO[bytes], sink: IO[bytes], left_bytes: int, ratio_bytes_max: int) -> int:
    written = 0
    while chunk := source.read(CHUNK_BYTES):
        written += len(chunk)
        if written > FILE_BYTES_MAX:
            raise FileProblem("", _OVER_FILE, "too_large")
        if written > left_bytes:
            raise FileProblem("", "holds more bytes than an upload may have", "too_large")
        if written > ratio_bytes_max:
            raise FileProblem("", _OVER_RATIO, "too_large")
        sink.write(chunk)
    return written
