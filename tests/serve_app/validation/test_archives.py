"""Zips under their caps: whatever comes, the outcome is files on disk or a problem, and never more than was allowed."""

import io
import stat
import struct
import unicodedata
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
    unpacked = unpack(path, tmp_path, "files[0]", bytes_max=bytes_max)
    assert (unpacked.files, unpacked.notes) == ([], [])
    [problem] = unpacked.problems
    assert problem.path == "files[0]"
    return problem.message


def test_folders_are_flattened_and_what_is_for_no_data_set_is_left_out_and_named(tmp_path: Path) -> None:
    inside = {"set/a.png": b"1", "set/": b"", "__MACOSX/set/._a.png": b"x", "set/.DS_Store": b"x", "set/notes.md": b"x"}
    unpacked = unpack(zipped(tmp_path, inside), tmp_path, "files[0]", bytes_max=ROOM, shown_name="set.zip")
    assert unpacked.problems == []
    assert [(file.filename, file.place, file.path.read_bytes()) for file in unpacked.files] == [
        ("a.png", "files[0][set/a.png]", b"1")
    ]
    assert unpacked.notes == [
        "Left out of 'set.zip' (made by the operating system, or hidden): '__MACOSX/set/._a.png', 'set/.DS_Store'",
        "Left out of 'set.zip' (no picture, caption or mask): 'set/notes.md'",
    ]


def test_names_that_macos_wrote_without_saying_that_they_are_utf8_are_read(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Katze \u00e9\u3050.png")
    path = zipped(tmp_path, {decomposed: b"1"})
    data = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x01\x02", 9), (b"PK\x03\x04", 7)):
        assert data[data.find(signature) + at] & 0x08
        data[data.find(signature) + at] &= ~0x08
    path.write_bytes(data)
    [file] = unpack(path, tmp_path, "files[0]", bytes_max=ROOM).files
    assert file.filename == "Katze \u00e9\u3050.png"


@pytest.mark.parametrize("name", ["a.png", "README.md", "__MACOSX/a"])
def test_a_link_is_refused_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zip"
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b.png", b"1")
        archive.writestr(info, b"/etc/passwd")
    assert "link" in refusal(path, tmp_path)


def test_a_bomb_is_refused_though_it_would_be_left_out(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.png": b"1", "notes.md": b"\0" * (8 * 2**20)})
    assert "100 to 1" in refusal(path, tmp_path)


@pytest.mark.parametrize("name", ["../README.md", "/__MACOSX/a", "..\\.DS_Store", "."])
def test_a_path_that_is_none_within_the_zip_is_refused_though_it_would_be_left_out(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(zipped(tmp_path, {"a.png": b"1", name: b"1"}), tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "x/../../a.png", "/a.png", "..\\a.png"])
def test_a_path_out_of_the_archive_is_refused(tmp_path: Path, name: str) -> None:
    assert "leads out" in refusal(zipped(tmp_path, {name: b"1"}), tmp_path)


def test_a_file_without_a_name_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"Q.png": b"1"})
    path.write_bytes(path.read_bytes().replace(b"Q.png", b"\0.png"))
    assert "leads out" in refusal(path, tmp_path)


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
    many = {f"{index}.txt": b"" for index in range(archives.FILES_MAX + 1)}
    assert "more than 1000 files" in refusal(zipped(tmp_path, many), tmp_path)
    entries = {f"__MACOSX/._{index}.txt": b"" for index in range(archives.ENTRIES_MAX + 1)}
    assert "more than 4000 entries" in refusal(zipped(tmp_path, entries), tmp_path)


def test_the_twins_that_a_mac_adds_do_not_count(tmp_path: Path) -> None:
    files = {f"cats/{index}.txt": b"a cat" for index in range(archives.FILES_MAX)}
    twins = {f"__MACOSX/cats/._{index}.txt": b"" for index in range(archives.FILES_MAX)}
    folder = tmp_path / "out"
    folder.mkdir()
    unpacked = archives.unpack(zipped(tmp_path, files | twins), folder, "zip", bytes_max=10**6)
    assert (len(unpacked.files), unpacked.problems) == (archives.FILES_MAX, [])


def test_a_directory_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path, {"a.txt": b"1"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.rfind(b"PK\x05\x06") + 12, 2**31)
    path.write_bytes(data)
    assert "more than 4000" in refusal(path, tmp_path)


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
    unpacked = unpack(path, tmp_path, "files[0]", bytes_max=1000)
    [problem] = unpacked.problems
    assert (unpacked.files, problem.path, problem.code) == ([], "files[0]", "invalid_value")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(small_zip()) - 1), st.integers(0, 255)), max_size=6), cut=st.data())
def test_a_damaged_zip_is_files_or_a_problem(tmp_path: Path, edits: list[tuple[int, int]], cut: st.DataObject) -> None:
    data = bytearray(small_zip())
    for at, value in edits:
        data[at] = value
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(data[: cut.draw(st.integers(0, len(data)))]))
    unpacked = unpack(path, tmp_path, "files[0]", bytes_max=1000)
    assert bool(unpacked.problems) or len(unpacked.files) <= 2
    assert not (unpacked.files and unpacked.problems)
    assert sum(file.path.stat().st_size for file in unpacked.files) <= 1000
