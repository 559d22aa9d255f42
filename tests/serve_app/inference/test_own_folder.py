from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.inference import own_folder as module
from serve_app.inference.own_folder import own_folder

CLAIM = "import sys; from pathlib import Path; from serve_app.inference.own_folder import own_folder; "


def test_a_folder_that_an_ended_process_left_is_removed_and_one_that_is_held_stays(tmp_path: Path) -> None:
    parent = tmp_path / "cache" / "loras"
    code = CLAIM + "(own_folder(Path(sys.argv[1])) / 'adapter').write_text('x')"
    subprocess.run([sys.executable, "-c", code, str(parent)], check=True)
    (left,) = (path for path in parent.iterdir() if path.is_dir())
    assert (left / "adapter").exists()

    first, second = own_folder(parent), own_folder(parent)
    assert first != second
    assert {path for path in parent.iterdir() if path.is_dir()} == {first, second}


def test_what_cannot_be_removed_is_counted_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, str]] = []
    monkeypatch.setattr(module, "note_cleanup_failure", lambda what, error: counted.append((what, error)))
    (tmp_path / "left" / ".lock").mkdir(parents=True)  # no file can be opened there
    assert own_folder(tmp_path).is_dir()
    assert counted == [("cached_adapter", "IsADirectoryError")]
