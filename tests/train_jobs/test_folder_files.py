"""What a folder's files are, and what they are called when they are uploaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from train_jobs.folder_files import masks_beside, picture_files, upload_groups


def _write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")


def _stored(folder: Path) -> list[list[str]]:
    return sorted(sorted(group) for group in upload_groups(folder, ".txt"))


def test_a_mask_beside_its_picture_is_not_trained_on(tmp_path: Path) -> None:
    _write(tmp_path, "a.jpg", "a_mask.png", "lone_mask.png", "_mask.png")
    assert [path.name for path in picture_files(tmp_path)] == ["_mask.png", "a.jpg", "lone_mask.png"]


def test_a_picture_goes_with_its_caption_and_its_mask(tmp_path: Path) -> None:
    _write(tmp_path, "a.PNG", "a.txt", "a_mask.png", "b.jpg", "c.txt", "lone_mask.png", ".hidden.png")
    assert _stored(tmp_path) == [["a.png", "a.txt", "a_mask.png"], ["b.jpg"], ["lone_mask.png"]]


def test_names_become_such_as_are_stored_and_stay_apart(tmp_path: Path) -> None:
    _write(tmp_path, "a.png", "a.webp", "a.txt", "sub/a.png", "sub/a.txt", "sub/a_mask.png", "sub_a.png", "\xfc #1.jpg")
    assert _stored(tmp_path) == [
        ["a.png", "a.txt"],
        ["a_2.txt", "a_2.webp"],
        ["sub_a.png", "sub_a.txt", "sub_a_mask.png"],
        ["sub_a_2.png"],
        ["\xfc _1.jpg"],
    ]


def test_no_picture_becomes_another_ones_mask(tmp_path: Path) -> None:
    _write(tmp_path, "a.png", "a/mask.png", "b_mask/x.png", "b_mask_x_mask.jpg")
    (tmp_path / "stored").mkdir()
    for group in upload_groups(tmp_path, ".txt"):
        for name in group:
            (tmp_path / "stored" / name).touch()
    assert len(picture_files(tmp_path / "stored")) == 4
    assert masks_beside(tmp_path / "stored") == {}


def test_the_command_line_needs_no_torch_for_it() -> None:
    code = "import sys, serve_app.cli.trainings, train_jobs.folder_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
