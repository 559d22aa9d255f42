"""`raylora keys`: API keys of a running instance, by its own key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Column, Table
from rich.text import Text

COLUMNS = ("id", "tenant", "name", "created_at", "last_used_at", "revoked_at")


def keys_table(keys: Iterable[dict[str, Any]]) -> Table:
    # An id is typed into the next command: of all columns, it is never cut.
    table = Table(*(Column(name, no_wrap=name == "id") for name in COLUMNS))
    for key in keys:
        table.add_row(*(Text(str(key.get(name) or "")) for name in COLUMNS))
    return table
