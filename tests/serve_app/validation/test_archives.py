"""Zips under their caps: whatever comes, the outcome is files on disk or a problem, and never more than was allowed."""

import io
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.validation import archives
from serve_app.validation.archives import unpack

ROOM = 10 * 2**20


def zipped(folder: Path, entries: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def refusal(path: Path, tmp_path: Path, bytes_max: int = ROOM) -> str:
    found, problems = unpack(path, tmp_path, "files[0]", bytes_max=bytes_max)
    assert found == []
    [problem] = problems
    assert problem.path == "files[0]"
    return problem.message


def test_folders_are_flattened_and_litter_is_left_out(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"set/a.png": b"1", "set/": b"", "__MACOSX/set/._a.png": b"x", "set/.DS_Store": b"x"})
    found, problems = unpack(path, tmp_path, "files[0]", bytes_max=ROOM)
    assert problems == []
    assert [(file.filename, file.place, file.path.read_bytes()) for file in found] == [
        ("a.png", "files[0][set/a.png]", b"1")
    ]


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/a.png", "..\\a.png"])
def test_a_path_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(zipped(tmp_path, {name: b"1"}), tmp_path)


def test_a_bomb_is_stopped_by_its_ratio_before_it_is_written(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"\0" * (8 * 2**20)})
    assert "100 to 1" in refusal(path, tmp_path)
    assert (tmp_path / "0").stat().st_size < 2 * 2**20


def test_all_files_together_stay_within_their_bytes(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"a" * 600, "b.txt": b"b" * 600}, method=zipfile.ZIP_STORED)
    assert "more bytes" in refusal(path, tmp_path, bytes_max=1000)


def test_a_file_over_its_own_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FILE_BYTES_MAX", 100)
    assert "holds a file over" in refusal(zipped(tmp_path, {"a.txt": b"a" * 101}), tmp_path)


def test_more_entries_than_allowed_are_refused_before_they_are_listed(tmp_path: Path) -> None:
    many = {f"{index}.txt": b"" for index in range(archives.ENTRIES_MAX + 1)}
    assert "more than 1000" in refusal(zipped(tmp_path, many), tmp_path)


def test_a_directory_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"1"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.rfind(b"PK\x05\x06") + 12, 2**31)
    path.write_bytes(data)
    assert "more than 1000" in refusal(path, tmp_path)


def test_encryption_and_other_compressions_are_refused_by_name(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"1"}, method=zipfile.ZIP_BZIP2)
    assert "deflate" in refusal(path, tmp_path)
    path = zipped(tmp_path, {"a.txt": b"1"})
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refusal(path, tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"hello"}, method=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"hello", b"hellO"))
    assert "cannot be read" not in refusal(zipped(tmp_path, {"../x": b""}), tmp_path)
    path = zipped(tmp_path, {"a.txt": b"hello"}, method=zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"hello", b"hellO"))
    assert "not a zip file" in refusal(path, tmp_path)


def small_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", b"abc")
        archive.writestr("b.txt", b"def" * 50, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def test_a_zip_whose_directory_lies_elsewhere_than_it_says_is_refused(tmp_path: Path) -> None:
    data = bytearray(small_zip())
    data[-5] = 1  # of the directory's place: 256 bytes further on
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(data))
    found, [problem] = unpack(path, tmp_path, "files[0]", bytes_max=1000)
    assert (found, problem.path, problem.code) == ([], "files[0]", "invalid_value")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(small_zip()) - 1), st.integers(0, 255)), max_size=6), cut=st.data())
def test_a_damaged_zip_is_files_or_a_problem(tmp_path: Path, edits: list[tuple[int, int]], cut: st.DataObject) -> None:
    data = bytearray(small_zip())
    for at, value in edits:
        data[at] = value
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(data[: cut.draw(st.integers(0, len(data)))]))
    found, problems = unpack(path, tmp_path, "files[0]", bytes_max=1000)
    assert bool(problems) or len(found) <= 2
    assert not (found and problems)
    assert sum(file.path.stat().st_size for file in found) <= 1000
