"""`create_upload` and `finalize_upload`: what arrives is looked at before a dataset exists."""

import asyncio
import hashlib
import io
import unicodedata
import zipfile
from base64 import b64decode
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from serve_app.testing import OTHER_KEY, LocalServer, LocalValidation, picture_base64
from storage.datasets import DatasetNotFound, latest_manifest
from storage.errors import StorageFailed, StorageUnavailable
from storage.jobs_testing import JobsWorld
from storage.testing import InMemoryStore
from tests.serve_app.job_types.asking import cleanup_failures, done, refused

PICTURE = b64decode(picture_base64(8, 8))
MASK = b64decode(picture_base64(8, 8, color="white"))
CAPTION = b"a cat"


def described(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"filename": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]


async def created(server: LocalServer, files: dict[str, bytes], **fields: Any) -> dict[str, Any]:
    payload = {"type": "create_upload", "training_name": "cats", "files": described(files), **fields}
    return await done(server, payload)


async def put(server: LocalServer, upload: dict[str, Any], files: dict[str, bytes]) -> None:
    """As a client with the presigned URLs would."""
    for item in upload["files"]:
        url = urlparse(item["url"])
        asked = parse_qs(url.query)
        assert (asked["method"], asked["extra"]) == (["PUT"], [item["headers"]["Content-Type"]])
        if item["filename"] in files:
            await server.store.put(unquote(url.path.removeprefix("/")), files[item["filename"]])


async def uploaded(server: LocalServer, files: dict[str, bytes], **fields: Any) -> str:
    upload = await created(server, files, **fields)
    await put(server, upload, files)
    return str(upload["token"])


async def finalized(server: LocalServer, token: str) -> dict[str, Any]:
    return await done(server, {"type": "finalize_upload", "token": token})


async def not_finalized(server: LocalServer, token: str) -> dict[str, Any]:
    output = await refused(server, {"type": "finalize_upload", "token": token})
    with pytest.raises(DatasetNotFound):
        await latest_manifest(server.store, server.services.keys_of("matt"), "cats")
    return output


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


async def test_what_was_put_becomes_a_dataset_when_it_is_finalized(server: LocalServer) -> None:
    files = {"1.png": PICTURE, "1.txt": CAPTION, "1_mask.png": MASK}
    token = await uploaded(server, files, trigger_word="ohwx")
    keys = server.services.keys_of("matt")
    with pytest.raises(DatasetNotFound):
        await latest_manifest(server.store, keys, "cats")
    reply = await finalized(server, token)
    assert (reply["total_images"], reply["total_captions"], reply["total_masks"]) == (1, 1, 1)
    assert (reply["trigger_word"], reply["dataset_folder"]) == ("ohwx", "cats")
    manifest = await latest_manifest(server.store, keys, "cats")
    assert {file.filename: await server.store.get(file.key) for file in manifest.files} == files
    assert [key for key in list(server.store.keys()) if "/staging/" in key and not key.endswith("manifest.json")] == []


async def test_what_cannot_be_cleaned_up_is_counted_and_spoils_no_dataset(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    before = cleanup_failures().get("staging", 0)
    server.store.fail("delete_many", StorageFailed("delete_many", 4, "connection"))
    assert (await finalized(server, token))["upload_id"] == token
    assert cleanup_failures()["staging"] == before + 1


async def test_finalizing_again_gives_the_same_dataset(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    first = await finalized(server, token)
    again = await finalized(server, token)
    assert again["upload_id"] == first["upload_id"]
    assert again["uploaded_files"] == first["uploaded_files"]


class HeldStore(InMemoryStore):
    """`operation` waits before it does anything, and says so."""

    def __init__(self, of: InMemoryStore, operation: str) -> None:
        self.__dict__.update(of.__dict__)
        self._operation = operation
        self.waits, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def _enter(self, operation: str, *keys: str) -> None:
        if operation == self._operation:
            self.waits.set()
            await self.may_go_on.wait()
        await super()._enter(operation, *keys)


@pytest.mark.parametrize("operation", ["head", "download_file", "put"])
async def test_a_repeated_finalize_at_another_replica_gets_the_reply_of_the_first(
    server: LocalServer, world: JobsWorld, operation: str
) -> None:
    """Wherever the first is slow, the repetition is done before it goes on."""
    token = await uploaded(server, {"1.png": PICTURE, "1.txt": CAPTION})
    held = HeldStore(server.store, operation)
    first = asyncio.create_task(LocalValidation(held, world.clock).finalize_upload("matt", {"token": token}))
    await held.waits.wait()
    again = await LocalValidation(server.store, world.clock).finalize_upload("matt", {"token": token})
    held.may_go_on.set()
    assert await first == again
    keys = server.services.keys_of("matt")
    manifest = await latest_manifest(server.store, keys, "cats", upload_id=token)
    assert [await server.store.get(file.key) for file in manifest.files] == [PICTURE, CAPTION]


async def test_a_finalize_that_is_repeated_meanwhile_waits_for_the_first_and_does_nothing_itself(
    server: LocalServer,
) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    before = server.store.calls.copy()
    replies = await asyncio.gather(*(finalized(server, token) for _ in range(3)))
    assert replies[0]["uploaded_files"] == replies[1]["uploaded_files"] == replies[2]["uploaded_files"]
    assert (server.store.calls - before)["download_file"] == 1


async def test_a_put_after_finalizing_changes_nothing(server: LocalServer) -> None:
    files = {"1.png": PICTURE}
    upload = await created(server, files)
    await put(server, upload, files)
    reply = await finalized(server, upload["token"])
    await put(server, upload, {"1.png": b"something else"})
    assert await server.store.get(reply["s3_keys"][0]) == PICTURE
    assert (await finalized(server, upload["token"]))["uploaded_files"] == reply["uploaded_files"]


async def test_everything_that_arrived_wrongly_is_named_at_once(server: LocalServer) -> None:
    files = {"1.png": PICTURE, "2.png": PICTURE, "3.png": PICTURE, "4.png": PICTURE}
    upload = await created(server, files)
    other = bytes([*PICTURE[:-1], PICTURE[-1] ^ 1])
    await put(server, upload, {"1.png": PICTURE, "2.png": PICTURE + b"x", "3.png": other})
    output = await not_finalized(server, upload["token"])
    assert [problem["path"] for problem in output["validation_errors"]] == [
        "files[1].size",
        "files[2].sha256",
        "files[3]",
    ]


async def test_bytes_that_are_no_picture_make_no_dataset(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE, "2.png": b"no picture"})
    output = await not_finalized(server, token)
    assert [problem["path"] for problem in output["validation_errors"]] == ["files[1].content"]


async def test_a_zip_is_unpacked_with_captions_and_masks(server: LocalServer) -> None:
    inside = {"set/1.png": PICTURE, "set/1.txt": CAPTION, "set/1_mask.png": MASK, "__MACOSX/1": b"x"}
    reply = await finalized(server, await uploaded(server, {"set.zip": zip_of(inside)}))
    assert [file["filename"] for file in reply["uploaded_files"]] == ["1.png", "1.txt", "1_mask.png"]
    assert (reply["total_images"], reply["total_masks"]) == (1, 1)


async def test_a_zip_is_checked_like_any_other_upload(server: LocalServer) -> None:
    inside = {"a/1.png": PICTURE, "b/1.png": PICTURE, "2.png": b"no picture", "3.heic": b"x"}
    output = await not_finalized(server, await uploaded(server, {"set.zip": zip_of(inside)}))
    assert {problem["path"] for problem in output["validation_errors"]} == {
        "files[0][b/1.png].filename",
        "files[0][2.png].content",
        "files[0][3.heic].filename",
    }
    bomb = await uploaded(server, {"set.zip": zip_of({"1.png": PICTURE, "1.txt": b"\0" * 2**22})})
    assert "100 to 1" in (await not_finalized(server, bomb))["error"]


async def test_stray_files_in_a_zip_are_named_as_left_out_however_often_it_is_finalized(server: LocalServer) -> None:
    inside = {"set/1.png": PICTURE, "set/1.txt": CAPTION, "set/README.md": b"x", "set/.DS_Store": b"x"}
    token = await uploaded(server, {"set.zip": zip_of(inside)})
    reply = await finalized(server, token)
    assert [file["filename"] for file in reply["uploaded_files"]] == ["1.png", "1.txt"]
    assert reply["warnings"] == [
        "Left out of 'set.zip' (no picture, caption or mask): 'set/README.md'",
        "Left out of 'set.zip' (made by the operating system, or hidden): 'set/.DS_Store'",
    ]
    assert (await finalized(server, token))["warnings"] == reply["warnings"]


async def test_pictures_in_a_folder_of_masks_are_stored_as_masks(server: LocalServer) -> None:
    inside = {"set/1.png": PICTURE, "set/masks/1.png": MASK, "set/masks/2.png": MASK}
    reply = await finalized(server, await uploaded(server, {"set.zip": zip_of(inside)}))
    assert [file["filename"] for file in reply["uploaded_files"]] == ["1.png", "1_mask.png"]
    assert (reply["total_images"], reply["total_masks"]) == (1, 1)
    assert [note for note in reply["warnings"] if "masks/2.png" in note and note.startswith("Left out")]
    assert [note for note in reply["warnings"] if "masks/1.png" in note and note.startswith("Taken")]


async def test_a_zip_without_a_picture_is_refused_with_what_was_left_out_of_it(server: LocalServer) -> None:
    output = await not_finalized(server, await uploaded(server, {"set.zip": zip_of({"notes.md": b"x", "1.txt": b"x"})}))
    [problem] = output["validation_errors"]
    assert (problem["path"], problem["code"]) == ("files", "missing")
    assert "'notes.md'" in problem["message"]


async def test_two_masks_of_one_picture_are_refused(server: LocalServer) -> None:
    files = {"1.png": PICTURE, "1_mask.png": MASK, "1_mask.jpg": MASK}
    output = await not_finalized(server, await uploaded(server, files))
    [problem] = output["validation_errors"]
    assert (problem["path"], problem["code"]) == ("files[2].filename", "duplicate")


async def test_decomposed_names_are_taken_and_come_back_composed(server: LocalServer) -> None:
    names = {"\u00e9.png": PICTURE, "\u00e9.txt": CAPTION}
    upload = await created(server, {unicodedata.normalize("NFD", name): data for name, data in names.items()})
    assert [place["filename"] for place in upload["files"]] == list(names)
    await put(server, upload, names)
    reply = await finalized(server, upload["token"])
    assert [file["filename"] for file in reply["uploaded_files"]] == list(names)
    assert reply["statistics"]["images_with_captions"] == 1


async def test_names_that_are_equal_once_composed_are_refused(server: LocalServer) -> None:
    twice = {"\u00e9.png": PICTURE, unicodedata.normalize("NFD", "\u00e9.png"): PICTURE}
    output = await refused(server, {"type": "create_upload", "training_name": "cats", "files": described(twice)})
    [problem] = output["validation_errors"]
    assert (problem["path"], problem["code"]) == ("files[1].filename", "duplicate")
    output = await not_finalized(server, await uploaded(server, {"set.zip": zip_of(twice)}))
    [problem] = output["validation_errors"]
    assert (problem["code"], "Unicode" in problem["message"]) == ("duplicate", True)


async def test_a_mask_of_another_size_is_refused(server: LocalServer) -> None:
    small = b64decode(picture_base64(4, 8))
    output = await not_finalized(server, await uploaded(server, {"1.png": PICTURE, "1_mask.png": small}))
    assert [problem["path"] for problem in output["validation_errors"]] == ["files[1].content"]


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ({"filename": "../1.png", "size": 1}, "files[0].filename"),
        ({"filename": "1.exe", "size": 1}, "files[0].filename"),
        ({"filename": "manifest.json", "size": 1}, "files[0].filename"),
        ({"filename": "1.png", "size": 0}, "files.0.size"),
        ({"filename": "1.png", "size": 100 * 2**20 + 1}, "files[0].size"),
        ({"filename": "1.zip", "size": 501 * 2**20}, "files"),
        ({"filename": "1.png", "size": 1, "content_type": "image/jpeg"}, "files[0].content_type"),
        ({"filename": "1.png", "size": 1, "sha256": "x"}, "files.0.sha256"),
    ],
)
async def test_a_promise_that_cannot_be_kept_is_refused(server: LocalServer, file: dict[str, Any], path: str) -> None:
    output = await refused(server, {"type": "create_upload", "training_name": "cats", "files": [file]})
    found = output["validation_errors"][0]["path"]
    assert found.replace("[", ".").replace("]", "") == path.replace("[", ".").replace("]", "")
    assert list(server.store.keys()) == []


async def test_a_promise_at_the_limits_is_taken(server: LocalServer) -> None:
    for file in ({"filename": "1.png", "size": 100 * 2**20}, {"filename": "1.ZIP", "size": 500 * 2**20}):
        await done(server, {"type": "create_upload", "training_name": "cats", "files": [file]})


async def test_a_token_of_nobody_or_of_another_tenant_is_not_found(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    for wrong in ("20260102T030405000000Z-deadbeef", "../x", "x"):
        assert (await refused(server, {"type": "finalize_upload", "token": wrong}))["error_type"] == "upload_not_found"
    reply = await refused(server, {"type": "finalize_upload", "token": token}, key=OTHER_KEY)
    assert reply["error_type"] == "upload_not_found"


async def test_a_store_that_fails_while_finalizing_leaves_the_upload_to_finalize_again(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    server.store.fail("put", StorageFailed("put", 4, "connection"))
    assert (await not_finalized(server, token))["error_type"] == "dataset_not_stored"
    assert (await finalized(server, token))["uploaded_count"] == 1


async def test_while_the_storage_is_away_an_upload_job_says_when_to_send_it_again(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    server.store.break_down(StorageUnavailable("get", 41.2))
    output = await refused(server, {"type": "finalize_upload", "token": token})
    assert (output["error_type"], output["retry_after_s"]) == ("storage_unavailable", 42)
    server.store.recover()
    assert (await finalized(server, token))["uploaded_count"] == 1


async def test_an_abandoned_upload_is_removed_after_a_day(server: LocalServer) -> None:
    token = await uploaded(server, {"1.png": PICTURE})
    server.services.clock.advance(24 * 3600)  # type: ignore[attr-defined]
    await created(server, {"2.png": PICTURE})
    assert [key for key in list(server.store.keys()) if token in key] == []
    assert (await refused(server, {"type": "finalize_upload", "token": token}))["error_type"] == "upload_not_found"


async def test_a_file_larger_than_a_body_goes_through(server: LocalServer) -> None:
    big = PICTURE + b"\0" * (server.services.limits.runsync_body_bytes_max + 1)
    assert (await finalized(server, await uploaded(server, {"1.png": big})))["total_size"] == len(big)
