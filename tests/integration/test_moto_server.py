"""What the S3 store and moto's server make of each other, with the settings for moto and those for AWS."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest

from storage.digests import Crc32
from storage.file_parts import FilePart
from storage.objects import PutItem
from storage.s3 import S3Store
from storage.settings import S3Settings
from tests.integration.s3_stores import (
    PART_BYTES,
    check_presigned_urls,
    check_that_a_missing_bucket_can_be_made,
    moto_settings,
    no_wait,
)

Backend = Literal["moto", "aws"]


def settings_for(url: str, backend: Backend) -> S3Settings:
    return moto_settings(url, backend).model_copy(
        update={"part_size_bytes": PART_BYTES, "multipart_threshold_bytes": PART_BYTES}
    )


@pytest.fixture(params=["moto", "aws"])
def settings(request: pytest.FixtureRequest, moto_url: str) -> S3Settings:
    return settings_for(moto_url, request.param)


@pytest.fixture
async def moto_store(settings: S3Settings) -> AsyncIterator[S3Store]:
    async with S3Store(settings, sleep=no_wait) as store:
        await store.ensure_bucket()
        yield store


@pytest.fixture
async def aws_store(moto_url: str) -> AsyncIterator[S3Store]:
    async with S3Store(settings_for(moto_url, "aws"), sleep=no_wait) as store:
        await store.ensure_bucket()
        yield store


async def test_what_the_server_can_do_is_found_out(moto_store: S3Store, settings: S3Settings) -> None:
    found = await moto_store.capabilities()

    assert found.conditional_writes
    assert found.ranged_reads
    assert found.multipart_listing
    assert found.answers_with_etag
    assert found.keeps_metadata == (settings.backend == "aws")
    assert await moto_store.list("raylora/probes/") == []


async def test_a_presigned_url_gets_and_puts_without_credentials(moto_store: S3Store, key: str) -> None:
    async with aiohttp.ClientSession() as client:
        await check_presigned_urls(client, moto_store, key)


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
async def test_a_missing_bucket_is_a_misconfiguration_that_ensure_bucket_mends(
    settings: S3Settings, region: str
) -> None:
    await check_that_a_missing_bucket_can_be_made(settings, region)


async def test_orphan_multipart_uploads_are_found_and_aborted(moto_store: S3Store, key: str) -> None:
    prefix = f"{key.rpartition('/')[0]}/"
    upload_id = await moto_store._files._begin_upload(key, None, None)

    pending = await moto_store.list_uploads(prefix)
    assert [(upload.key, upload.upload_id) for upload in pending] == [(key, upload_id)]
    await moto_store.abort_upload(key, upload_id)
    await moto_store.abort_upload(key, upload_id)

    assert await moto_store.list_uploads(prefix) == []


async def test_more_than_a_page_of_keys_is_listed_and_deleted(moto_store: S3Store, key: str) -> None:
    prefix = f"{key.rpartition('/')[0]}/"
    keys = [f"{prefix}{number:04d}" for number in range(1001)]
    outcomes = await moto_store.put_many([PutItem(each, b"1") for each in keys])
    assert all(outcome.error is None for outcome in outcomes)

    assert [info.key for info in await moto_store.list(prefix)] == keys
    assert await moto_store.delete_many(keys) == len(keys)
    assert await moto_store.list(prefix) == []


async def test_a_file_in_parts_has_its_digest_noted_where_the_backend_keeps_notes(
    moto_store: S3Store, settings: S3Settings, key: str, large_file: Path, content: bytes, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(content).hexdigest()

    up = await moto_store.upload_file(large_file, key)
    noted = (await moto_store.head(key)).sha256
    down = await moto_store.download_file(key, tmp_path / "back")

    assert up.sha256 == down.sha256 == sha256
    assert noted == (sha256 if settings.backend == "aws" else None)


async def test_on_aws_an_upload_and_each_of_its_parts_agree_on_their_checksums(
    aws_store: S3Store, key: str, large_file: Path, content: bytes
) -> None:
    sent: list[tuple[str, str, dict[str, str], bytes]] = []

    def record(request: Any, **_: Any) -> None:
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        body = request.body if isinstance(request.body, bytes) else b""
        sent.append((request.method, request.url, headers, body))

    for client in (await aws_store._clients.internal(), await aws_store._clients.patient()):
        client.meta.events.register("before-send.s3", record)

    await aws_store.upload_file(large_file, key)

    begun = next(headers for method, url, headers, _ in sent if method == "POST" and url.endswith("?uploads"))
    parts = {headers["x-amz-checksum-crc32"] for method, _, headers, _ in sent if method == "PUT"}
    completed = next(body.decode() for method, url, _, body in sent if method == "POST" and "uploadId" in url)
    expected = [_crc32(content[first : first + PART_BYTES]) for first in range(0, len(content), PART_BYTES)]
    assert begun["x-amz-checksum-algorithm"] == "CRC32"
    assert parts == set(expected)
    assert [completed.count(f"<ChecksumCRC32>{crc32}<") for crc32 in expected] == [1, 1, 1]


async def test_on_aws_no_part_is_read_on_the_event_loop(
    aws_store: S3Store, key: str, large_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: set[threading.Thread] = set()
    pieces = FilePart._pieces

    def recorded(part: FilePart, start: int, wanted: int) -> Sequence[bytes]:
        readers.add(threading.current_thread())
        return pieces(part, start, wanted)

    monkeypatch.setattr(FilePart, "_pieces", recorded)

    await aws_store.upload_file(large_file, key)

    assert readers
    assert threading.current_thread() not in readers


def _crc32(data: bytes) -> str:
    crc32 = Crc32()
    crc32.update(data)
    return crc32.base64()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
