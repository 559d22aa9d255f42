"""Objects as a file system of Arrow's, which is how Ray Train reaches its storage: through the storage actor.

A path is an object's key, below one prefix. A folder is there while an object lies below it, so creating one does
nothing. Errors are ours, but for a missing file, which callers expect as FileNotFoundError. Messages hold no paths.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystemHandler, FileType, PyFileSystem

from storage.blocking import BlockingStorage
from storage.errors import InvalidKey, ObjectNotFound
from storage.keys import check_key, check_prefix
from storage.objects import ObjectInfo, ObjectStore


def arrow_files(store: ObjectStore, prefix: str) -> Any:
    """A `pyarrow.fs.FileSystem` over the objects below `prefix`, which ends with "/". Picklable when `store` is.

    Raises InvalidKey for a prefix that is none.
    """
    return PyFileSystem(ObjectFiles(BlockingStorage(store), prefix))


class ObjectFiles(FileSystemHandler):  # type: ignore[misc]
    """What Arrow calls. A path outside `prefix` raises InvalidKey.

    Files go through temporary files of this node, so that their size does not matter; one appears when its stream is
    closed. Moving and appending raise NotImplementedError: an object can do neither.
    """

    def __init__(self, objects: BlockingStorage, prefix: str) -> None:
        self._objects = objects
        self._prefix = check_prefix(prefix)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectFiles, (self._objects, self._prefix)

    def get_type_name(self) -> str:
        return "raylora"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: Sequence[str]) -> list[FileInfo]:
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        folder = self._folder(selector.base_dir)
        found = self._objects.list(folder)
        if not found and not selector.allow_not_found:
            raise _missing()
        files = [_file(info) for info in found if selector.recursive or "/" not in info.key.removeprefix(folder)]
        folders = sorted({name for info in found for name in _folders(info.key, folder)})
        if not selector.recursive:
            folders = [name for name in folders if "/" not in name.removeprefix(folder)]
        return [*files, *(FileInfo(name, FileType.Directory) for name in folders)]

    def create_dir(self, path: str, recursive: bool) -> None:
        self._folder(path)

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        found = self._objects.list(self._folder(path))
        if not found and not missing_dir_ok:
            raise _missing()
        self._objects.delete_many([info.key for info in found])

    def delete_file(self, path: str) -> None:
        self._head(path)
        self._objects.delete(path)

    def copy_file(self, src: str, dest: str) -> None:
        self._head(src)
        self._objects.copy(src, self._key(dest))

    def open_input_stream(self, path: str) -> pa.OSFile:
        return self._downloaded(path)

    def open_input_file(self, path: str) -> pa.OSFile:
        return self._downloaded(path)

    def open_output_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.PythonFile:
        if metadata:
            _refuse("metadata of a file")
        return pa.PythonFile(_Outgoing(self._objects, self._key(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> NoReturn:
        _refuse("appending to a file")

    def move(self, src: str, dest: str) -> NoReturn:
        _refuse("moving a file or folder")

    def delete_root_dir_contents(self) -> NoReturn:
        _refuse("emptying the root")

    def _info(self, path: str) -> FileInfo:
        folder = self._folder(path)
        if folder != self._prefix:
            try:
                return _file(self._objects.head(folder.rstrip("/")))
            except ObjectNotFound:
                pass  # A folder is no object: whether it is one is asked below.
        is_folder = bool(self._objects.list(folder, limit=1))
        return FileInfo(path, FileType.Directory if is_folder else FileType.NotFound)

    def _head(self, path: str) -> ObjectInfo:
        try:
            return self._objects.head(self._key(path))
        except ObjectNotFound:
            raise _missing() from None

    def _downloaded(self, path: str) -> pa.OSFile:
        """Open for reading, and gone from the disk once closed or dropped."""
        key = self._key(path)
        folder = Path(tempfile.mkdtemp(prefix="raylora-read-"))
        try:
            self._objects.download_file(key, folder / "file")
            return pa.OSFile(str(folder / "file"), "r")
        except ObjectNotFound:
            raise _missing() from None
        finally:
            shutil.rmtree(folder)

    def _key(self, path: str) -> str:
        return self._inside(check_key(path))

    def _folder(self, path: str) -> str:
        return self._inside(check_prefix(f"{path.rstrip('/')}/"))

    def _inside(self, key: str) -> str:
        if not key.startswith(self._prefix):
            raise InvalidKey(key, "it lies outside this file system")
        return key


class _Outgoing:
    """A file that is uploaded when it is closed. One that is dropped unclosed leaves nothing."""

    def __init__(self, objects: BlockingStorage, key: str) -> None:
        self._objects = objects
        self._key = key
        self._file = tempfile.NamedTemporaryFile(prefix="raylora-write-")  # noqa: SIM115 - closed in `close`

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """Raises StorageError; the file is closed then too."""
        if self.closed:
            return
        try:
            self._file.flush()
            self._objects.upload_file(Path(self._file.name), self._key)
        finally:
            self._file.close()


def _file(info: ObjectInfo) -> FileInfo:
    return FileInfo(info.key, FileType.File, size=info.size_bytes, mtime=info.modified_at)


def _folders(key: str, below: str) -> list[str]:
    """The folders between `below` and the object."""
    parts = key.removeprefix(below).split("/")[:-1]
    return [below + "/".join(parts[: count + 1]) for count in range(len(parts))]


def _missing() -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} is not offered by the object store")
