"""What tests of the S3 store have in common."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal

import aiohttp
import pytest
from pydantic import SecretStr

from storage.errors import StorageMisconfigured
from storage.s3 import S3Store
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


async def check_that_a_missing_bucket_can_be_made(settings: S3Settings, region: str) -> None:
    """`settings` lead to any bucket of the server."""
    missing = settings.model_copy(update={"bucket": f"b{secrets.token_hex(6)}", "region": region})
    async with S3Store(missing) as store:
        assert (await store.health()).detail == "storage_misconfigured"
        with pytest.raises(StorageMisconfigured):
            await store.list("raylora/")

        await store.ensure_bucket()
        await store.ensure_bucket()

        assert (await store.health()).ok


async def check_presigned_urls(client: aiohttp.ClientSession, store: S3Store, key: str) -> str:
    """Puts and gets without credentials. Returns the URL to get by."""
    put_url = await store.presign_put(key, content_type="text/plain")
    get_url = await store.presign_get(key, filename="mein Bild.txt")
    async with client.put(put_url, data=b"1234", headers={"Content-Type": "text/plain"}) as answer:
        assert answer.status == 200
    async with client.get(get_url) as answer:
        assert (answer.status, await answer.read()) == (200, b"1234")
        assert "mein Bild.txt" in answer.headers["Content-Disposition"]
    return get_url
