"""What tests of the S3 store have in common."""

from __future__ import annotations

from pathlib import Path

from storage.settings import MIB

PART_BYTES = 5 * MIB


async def no_wait(_: float) -> None:
    return None


def read(path: Path) -> bytes:
    return path.read_bytes()
