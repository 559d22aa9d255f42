"""Uploads of data sets in the body, through /runsync."""

from typing import Any

import pytest

from serve_app.testing import (
    LocalServer,
    picture_base64,
    text_base64,
    train_config,
    upload_payload,
)
from storage.datasets import latest_manifest
from storage.errors import StorageFailed
from tests.serve_app.job_types.asking import done, refused


async def test_an_upload_answers_with_every_field(server: LocalServer) -> None:
    output = await done(server, upload_payload("cats"))
    assert (output["uploaded_count"], output["total_images"], output["total_captions"]) == (2, 1, 1)
    assert output["s3_path"] == "s3://bucket/raylora/matt/datasets/cats/"
    assert output["file_types_summary"] == {".png": 1, ".txt": 1}
    assert output["total_size_formatted"].endswith(" B")
    assert set(output["s3_keys"]) <= set(server.store.keys())
    assert output["warnings"] == []
    assert {"training_name", "trigger_word", "message", "statistics", "uploaded_files", "total_size"} <= set(output)


async def test_one_bad_file_stores_nothing_and_all_of_them_are_named(server: LocalServer) -> None:
    files = [
        {"filename": "ok.png", "content": picture_base64()},
        {"filename": "broken.png", "content": text_base64("no picture")},
        {"filename": "half.png", "content": picture_base64(64, 64)[:40]},
        {"filename": "../up.png", "content": picture_base64()},
        {"filename": "a.exe", "content": "AAAA"},
        {"filename": "b.png", "content": "*** no base64 ***"},
        {"filename": "c.png"},
        {"filename": "d.png", "url": "http://169.254.169.254/"},
        {"filename": "e.txt", "content": "gICA"},
        {"filename": "f.json", "content": text_base64("{")},
        {"filename": "OK.png", "content": picture_base64()},
        {"filename": "manifest.json", "content": text_base64("{}")},
    ]
    output = await refused(server, upload_payload("cats", files=files))
    assert [problem["path"] for problem in output["validation_errors"]] == [
        f"files[{index}].{field}"
        for index, field in enumerate(
            [
                "content",
                "content",
                "filename",
                "filename",
                "content",
                "content",
                "url",
                "content",
                "content",
                "filename",
                "filename",
            ],
            start=1,
        )
    ]
    assert list(server.store.keys()) == []


async def test_an_upload_needs_a_picture(server: LocalServer) -> None:
    files = [{"filename": "a.txt", "content": text_base64("a")}]
    assert (await refused(server, upload_payload("cats", files=files)))["validation_errors"][0]["path"] == "files"


@pytest.mark.parametrize(
    "field",
    [
        {"training_name": "a/b"},
        {"dataset_folder": "../x"},
        {"dataset_folder": "."},
        {"dataset_folder": ".."},
        {"dataset_folder": "." * 151},
        {"dataset_folder": "..." + "x" * 148},
        {"trigger_word": "x" * 101},
        {"files": []},
        {"training_name": "x" * 101},
    ],
)
async def test_fields_out_of_range_are_refused(server: LocalServer, field: dict[str, Any]) -> None:
    output = await refused(server, upload_payload("cats", **field))
    assert output["validation_errors"][0]["path"] == next(iter(field))


@pytest.mark.parametrize("folder", [".hidden", "...", "..x", "-cats", "_", "a.b-c_D", "x" * 150])
async def test_a_folder_of_any_of_its_characters_is_stored_trained_on_and_deleted(
    server: LocalServer, folder: str
) -> None:
    await done(server, upload_payload("cats", dataset_folder=folder))
    assert (await done(server, {"type": "list_dataset_folders"}))["folders"] == [folder]
    started = await done(server, {"type": "train", "config": train_config(folder)})
    async with server.client() as http:
        path = f"/v1/datasets/{folder.replace('.', '%2E')}"
        assert (await http.get(path)).json()["name"] == folder
        assert (await http.delete(path)).json()["code"] == "dataset_in_use"
        await done(server, {"type": "cancel", "process_id": started["process_id"]})
        assert (await http.delete(path)).status_code == 204
    assert (await done(server, {"type": "list_dataset_folders"}))["folders"] == []


async def test_an_upload_that_fails_midway_leaves_the_dataset_as_it_was(server: LocalServer) -> None:
    keys = server.services.keys_of("matt")
    first = (await done(server, upload_payload("cats")))["upload_id"]
    server.store.fail("put", StorageFailed("put", 4, "connection"))
    assert (await refused(server, upload_payload("cats")))["error_type"] == "dataset_not_stored"
    assert (await latest_manifest(server.store, keys, "cats")).upload_id == first


async def test_a_new_upload_replaces_the_dataset_unless_asked_to_add(server: LocalServer) -> None:
    keys = server.services.keys_of("matt")
    await done(server, upload_payload("cats"))
    more = [{"filename": "2.png", "content": picture_base64(color="blue")}]
    server.services.clock.advance(1)  # type: ignore[attr-defined]
    await done(server, upload_payload("cats", files=more, cleanup_existing=False))
    added = await latest_manifest(server.store, keys, "cats")
    assert [file.filename for file in added.files] == ["1.png", "1.txt", "2.png"]
    server.services.clock.advance(1)  # type: ignore[attr-defined]
    await done(server, upload_payload("cats", files=more))
    assert [file.filename for file in (await latest_manifest(server.store, keys, "cats")).files] == ["2.png"]


async def test_pictures_without_captions_and_captions_without_pictures_are_warnings(server: LocalServer) -> None:
    files = [{"filename": "a.png", "content": picture_base64()}, {"filename": "b.txt", "content": text_base64("x")}]
    output = await done(server, upload_payload("cats", files=files))
    assert output["warnings"] == ["1 image(s) have no caption", "Caption 'b.txt' belongs to no image"]
