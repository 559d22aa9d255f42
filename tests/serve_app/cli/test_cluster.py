"""What commands that join the instance's Ray cluster bring along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = "import os; from serve_app.cli.cluster import bring_token; bring_token(); print(os.environ.get('RAY_AUTH_MODE'))"


def _mode(home: Path) -> str:
    """In a process of its own, because Ray keeps what it has read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**kept, "HOME": str(home)}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_token_of_this_user_is_shown_where_there_is_one(tmp_path: Path) -> None:
    assert _mode(tmp_path) == "None"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    assert _mode(tmp_path) == "token"
