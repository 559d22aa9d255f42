"""What tests of the S3 store have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from storage.settings import MIB, S3Settings

PART_BYTES = 5 * MIB


async def no_wait(_: float) -> None:
    return None


def read(path: Path) -> bytes:
    return path.read_bytes()


def moto_settings(url: str, backend: Literal["moto", "aws"]) -> S3Settings:
    """For moto's server, which takes any credentials, as itself or as if it were AWS."""
    return S3Settings(
        endpoint_url=url,
        backend=backend,
        access_key_id=SecretStr("moto-key"),
        secret_access_key=SecretStr("moto-secret"),
    )
