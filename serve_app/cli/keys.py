"""`raylora keys`: API keys of a running instance, by its own key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

COLUMNS = ("id", "tenant", "name", "created_at", "last_used_at", "revoked_at")


def keys_table(keys: Iterable[dict[str, Any]]) -> Table:
    table = Table(*COLUMNS)
    for key in keys:
        table.add_row(*(Text(str(key.get(name) or "")) for name in COLUMNS))
    return table
