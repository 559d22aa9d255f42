"""`raylora keys`: API keys of a running instance, by its own key."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

TIMES = {"created": "created_at", "last used": "last_used_at", "revoked": "revoked_at"}
DAY, TIME = "%Y-%m-%d", "%H:%M:%S"
NAMES = {"tenant": 6, "name": 4}
"""Fields that may be folded, and the fewest characters of a line."""
# Of a table of six columns: a line and two spaces each, and the last line.
FRAME_WIDTH = 6 * 3 + 1


def print_keys(console: Console, keys: Sequence[dict[str, Any]]) -> None:
    """Ids, which are typed into the next command, and times are whole in any width; names of any length are folded."""
    id_width = max((len(str(key["id"])) for key in keys), default=0)
    beside_times = id_width + sum(NAMES.values()) + FRAME_WIDTH
    is_wide = console.width >= beside_times + len(TIMES) * len("2026-01-02 03:04:05")
    names = (Column(name, min_width=width, overflow="fold") for name, width in NAMES.items())
    table = Table(Column("id", no_wrap=True), *names, *(Column(name, no_wrap=True) for name in TIMES))
    for key in keys:
        times = [_time(key.get(field), " " if is_wide else "\n") for field in TIMES.values()]
        table.add_row(*(Text(text) for text in (key["id"], *(key[name] for name in NAMES), *times)))
    needed = beside_times + len(TIMES) * len("2026-01-02")
    if console.width < needed:
        table.width = needed
    # What is wider than the terminal goes on in its next line, rather than being cut.
    console.print(table, crop=False)


def _time(written: str | None, between: str) -> str:
    """In this machine's time zone; empty where there is none."""
    if not written:
        return ""
    return datetime.fromisoformat(written).astimezone().strftime(f"{DAY}{between}{TIME}")
