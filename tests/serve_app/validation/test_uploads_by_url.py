"""Files that an upload names by URL: fetched from public addresses, and checked like any others."""

import asyncio
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from serve_app.errors import InvalidRequest
from serve_app.outbound import Outbound
from serve_app.testing import BUCKET, keys_of, picture_base64, text_base64
from serve_app.validation import sources, uploads
from serve_app.validation.uploads import DatasetUploads
from storage.datasets import latest_manifest
from storage.jobs import utc_now
from storage.testing import InMemoryStore

PICTURE = b64decode(picture_base64())


async def public(host: str, port: int) -> list[str]:
    return ["10.0.0.1" if host.startswith("inside") else "93.184.216.34"]


async def arriving(data: bytes) -> AsyncIterator[bytes]:
    """In pieces, as from a network."""
    for start in range(0, len(data), 50):
        yield data[start : start + 50]


def answer(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/1.png":
        return httpx.Response(200, content=arriving(PICTURE))
    return httpx.Response(302, headers={"location": "http://169.254.169.254/"})


async def stored(
    store: InMemoryStore, files: list[dict[str, Any]], answers: Callable[[httpx.Request], httpx.Response] = answer
) -> dict[str, Any]:
    outbound = Outbound(any_address=False, timeout_s=5, resolve=public, transport=httpx.MockTransport(answers))
    datasets = DatasetUploads(store, keys_of, BUCKET, utc_now, outbound)
    return await datasets.store("matt", {"training_name": "cats", "files": files})


async def test_a_picture_by_url_is_stored_beside_a_caption_in_the_request() -> None:
    store = InMemoryStore()
    files = [
        {"filename": "1.png", "url": "https://example.com/1.png"},
        {"filename": "1.txt", "content": text_base64("a cat")},
    ]
    reply = await stored(store, files)
    assert (reply["total_images"], reply["total_captions"]) == (1, 1)
    manifest = await latest_manifest(store, keys_of("matt"), "cats")
    assert await store.get(manifest.files[0].key) == PICTURE


async def test_what_cannot_be_fetched_is_named_with_everything_else() -> None:
    store = InMemoryStore()
    files = [
        {"filename": "1.png", "url": "https://example.com/1.png"},
        {"filename": "2.png", "url": "http://example.com/1.png"},
        {"filename": "3.png", "url": "https://inside.example.com/1.png"},
        {"filename": "4.png", "url": "https://example.com/redirect"},
        {"filename": "5.png"},
        {"filename": "6.txt", "url": "https://example.com/1.png"},
        {"filename": "7.png", "url": "https://a..b/1.png"},
    ]
    with pytest.raises(InvalidRequest) as caught:
        await stored(store, files)
    assert [(problem.path, problem.code) for problem in caught.value.problems] == [
        ("files[1].url", "invalid_value"),
        ("files[2].url", "invalid_value"),
        ("files[3].url", "unavailable"),
        ("files[4].content", "missing"),
        ("files[5].content", "invalid_value"),
        ("files[6].url", "invalid_value"),
    ]
    assert list(store.keys()) == []


@pytest.mark.parametrize("content", [picture_base64(), ""], ids=["bytes", "empty"])
async def test_a_file_with_bytes_and_a_url_is_refused_before_anything_is_fetched(content: str) -> None:
    fetched: list[str] = []

    def noted(request: httpx.Request) -> httpx.Response:
        fetched.append(str(request.url))
        return answer(request)

    files = [
        {"filename": "1.png", "url": "https://example.com/1.png"},
        {"filename": "2.png", "url": "https://example.com/1.png", "content": content},
    ]
    store = InMemoryStore()
    with pytest.raises(InvalidRequest) as caught:
        await stored(store, files, noted)
    [problem] = caught.value.problems
    assert (problem.path, problem.code) == ("files[1].content", "invalid_value")
    assert "not both" in problem.message
    assert (fetched, list(store.keys())) == ([], [])


async def test_a_misspelt_field_of_a_file_is_warned_of() -> None:
    files = [{"filename": "1.png", "content": picture_base64(), "contentType": "image/png"}]
    assert "Unknown field 'files[0].contentType' was ignored" in (await stored(InMemoryStore(), files))["warnings"]


async def test_files_that_are_too_much_together_end_every_fetch_of_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "TOTAL_BYTES_MAX", 5 * len(PICTURE) - 1)
    asked: list[str] = []
    ended: list[str] = []

    async def silent(name: str) -> AsyncIterator[bytes]:
        try:
            yield PICTURE[:1]
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    def answers(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        is_silent = request.url.path.startswith("/silent")
        return httpx.Response(200, content=silent(request.url.path) if is_silent else arriving(PICTURE))

    names = [f"silent{number}" for number in range(4)] + [str(number) for number in range(100 - 4)]
    files = [{"filename": f"{name}.png", "url": f"https://example.com/{name}"} for name in names]
    store = InMemoryStore()
    with pytest.raises(InvalidRequest) as caught:
        await stored(store, files, answers)
    assert [(problem.path, problem.code) for problem in caught.value.problems] == [("files", "too_large")]
    assert len(asked) <= 4 + 5 + uploads.FETCHES_AT_ONCE
    assert sorted(ended) == [f"/silent{number}" for number in range(4)]
    assert list(store.keys()) == []


async def test_a_file_over_the_cap_is_left_off_while_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILE_BYTES_MAX", len(PICTURE) - 1)
    with pytest.raises(InvalidRequest) as caught:
        await stored(InMemoryStore(), [{"filename": "1.png", "url": "https://example.com/1.png"}])
    assert [(problem.path, problem.code) for problem in caught.value.problems] == [("files[0].url", "too_large")]
