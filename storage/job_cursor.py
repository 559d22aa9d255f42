"""Places in a list of records, as clients hand them back."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime

from storage.errors import InvalidCursor


def cursor_after(created_at: datetime, seq: int) -> str:
    return base64.urlsafe_b64encode(f"{created_at.isoformat()} {seq}".encode()).decode()


def read_cursor(cursor: str) -> tuple[datetime, int]:
    """Raises InvalidCursor."""
    try:
        created_at, seq = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        return datetime.fromisoformat(created_at).astimezone(UTC), int(seq)
    except (ValueError, binascii.Error) as error:
        raise InvalidCursor from error
