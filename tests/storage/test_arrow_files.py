"""Arrow's own calls, as Ray Train makes them, on the in-memory store."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSelector, FileType, PyFileSystem, copy_files
from pydantic import SecretStr

from storage.actor import StorageClient
from storage.arrow_files import ObjectFiles, arrow_files
from storage.blocking import BlockingStorage
from storage.errors import InvalidKey, StorageUnavailable
from storage.settings import S3Settings
from storage.testing import InMemoryStore

ROOT = "raylora/matt/processes/p/ray-train/"
RUN = f"{ROOT}run"


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


@pytest.fixture
def files(store: InMemoryStore) -> Iterator[Any]:
    blocking = BlockingStorage(store)
    yield PyFileSystem(ObjectFiles(blocking, ROOT))
    blocking.close()


def _write(files: Any, path: str, data: bytes = b"1") -> None:
    with files.open_output_stream(path) as stream:
        stream.write(data)


def _listed(files: Any, path: str, *, recursive: bool) -> dict[str, FileType]:
    return {info.path: info.type for info in files.get_file_info(FileSelector(path, recursive=recursive))}


def test_a_file_is_an_object_of_the_same_key(files: Any, store: InMemoryStore) -> None:
    _write(files, f"{RUN}/a.bin", b"one" * 1000)

    assert store.keys() == [f"{RUN}/a.bin"]
    info = files.get_file_info(f"{RUN}/a.bin")
    assert (info.type, info.size) == (FileType.File, 3000)
    for opened in (files.open_input_stream, files.open_input_file):
        with opened(f"{RUN}/a.bin") as stream:
            assert stream.read() == b"one" * 1000


def test_a_folder_is_there_while_something_lies_in_it(files: Any, store: InMemoryStore) -> None:
    files.create_dir(RUN)
    assert files.get_file_info(RUN).type == FileType.NotFound
    _write(files, f"{RUN}/deep/a")

    assert [files.get_file_info(path).type for path in (RUN, f"{RUN}/deep", ROOT)] == [FileType.Directory] * 3
    assert files.get_file_info(f"{RUN}/dee").type == FileType.NotFound
    files.delete_dir(RUN)
    assert files.get_file_info(RUN).type == FileType.NotFound
    assert store.keys() == []


def test_a_listing_names_files_and_folders_but_no_neighbours(files: Any) -> None:
    for path in ("a", "deep/b", "deep/er/c"):
        _write(files, f"{RUN}/{path}")
    _write(files, f"{RUN}2/d")
    folder, file = FileType.Directory, FileType.File

    assert _listed(files, RUN, recursive=False) == {f"{RUN}/a": file, f"{RUN}/deep": folder}
    assert _listed(files, RUN, recursive=True) == {
        f"{RUN}/a": file,
        f"{RUN}/deep": folder,
        f"{RUN}/deep/b": file,
        f"{RUN}/deep/er": folder,
        f"{RUN}/deep/er/c": file,
    }


def test_whole_folders_travel_there_and_back(files: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"a" * 100_000)
    (source / "deep" / "b").write_bytes(b"")
    target.mkdir()

    copy_files(str(source), RUN, destination_filesystem=files)
    copy_files(RUN, str(target), source_filesystem=files)

    assert (target / "a").read_bytes() == b"a" * 100_000
    assert (target / "deep" / "b").read_bytes() == b""


def test_files_are_copied_and_deleted_one_by_one(files: Any, store: InMemoryStore) -> None:
    _write(files, f"{RUN}/a")
    files.copy_file(f"{RUN}/a", f"{RUN}/b")
    files.delete_file(f"{RUN}/a")

    assert store.keys() == [f"{RUN}/b"]


@pytest.mark.parametrize(
    "call",
    [
        lambda files: files.open_input_stream(f"{RUN}/a"),
        lambda files: files.delete_file(f"{RUN}/a"),
        lambda files: files.copy_file(f"{RUN}/a", f"{RUN}/b"),
        lambda files: files.delete_dir(RUN),
        lambda files: files.delete_dir_contents(RUN),
        lambda files: files.get_file_info(FileSelector(RUN)),
    ],
)
def test_what_is_missing_is_a_file_not_found_without_its_path(files: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        call(files)
    assert "raylora" not in str(missing.value)


def test_what_may_be_missing_may_be_missing(files: Any) -> None:
    files.delete_dir_contents(RUN, missing_dir_ok=True)
    assert files.get_file_info(FileSelector(RUN, allow_not_found=True)) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda files: files.move(f"{RUN}/a", f"{RUN}/b"),
        lambda files: files.open_append_stream(f"{RUN}/a"),
        lambda files: files.open_output_stream(f"{RUN}/a", metadata={"Content-Type": "text/plain"}),
        lambda files: files.delete_dir_contents("/", accept_root_dir=True),
    ],
)
def test_what_objects_cannot_do_is_refused_in_words(files: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises(NotImplementedError, match="not offered"):
        call(files)


@pytest.mark.parametrize("path", ["raylora/matt/processes/p/lora/a", "raylora/matt", f"{ROOT}../lora/a", f"{ROOT}a//b"])
def test_nothing_outside_the_prefix_is_reached(files: Any, store: InMemoryStore, path: str) -> None:
    for call in (files.get_file_info, files.open_output_stream, files.open_input_stream, files.create_dir):
        with pytest.raises(InvalidKey):
            call(path)
    assert not store.calls


def test_a_failure_of_storage_stays_what_it_is(files: Any, store: InMemoryStore) -> None:
    stream = files.open_output_stream(f"{RUN}/a")
    store.fail("upload_file", StorageUnavailable("put", 60))
    with pytest.raises(StorageUnavailable):
        stream.close()
    assert store.keys() == []


def test_a_stream_that_is_dropped_leaves_no_object(files: Any, store: InMemoryStore) -> None:
    stream = files.open_output_stream(f"{RUN}/a")
    stream.write(b"half")
    del stream
    gc.collect()

    assert store.keys() == []


def test_it_travels_to_other_processes() -> None:
    settings = S3Settings(access_key_id=SecretStr("a"), secret_access_key=SecretStr("b"))
    files = arrow_files(StorageClient(settings), ROOT)

    again = pickle.loads(pickle.dumps(files))  # noqa: S301

    assert again.type_name == files.type_name
    with pytest.raises(InvalidKey):
        again.open_output_stream("elsewhere")


def test_a_prefix_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidKey):
        arrow_files(InMemoryStore(), "raylora/matt")


async def test_it_may_be_used_on_a_thread_that_runs_an_event_loop(files: Any) -> None:
    _write(files, f"{RUN}/a")
    await asyncio.sleep(0)
    assert files.get_file_info(f"{RUN}/a").is_file
