"""Files by key, by path, in bulk and their deletion; and that another tenant's are not there."""

import base64
import hashlib
import io
import json
import zipfile
from typing import Any
from urllib.parse import urlparse

import pytest

from serve_app.ingress import runpod_output
from serve_app.job_types.stored_files import INLINE_BYTES_MAX
from serve_app.testing import OTHER_KEY, LocalServer, upload_payload
from storage.job_record import NewJob
from storage.job_state import JobKind
from tests.serve_app.job_types.asking import ask, done, refused

OWNER = "w"


async def finished(server: LocalServer, kind: JobKind, files: dict[str, bytes]) -> str:
    """A completed process; `files` by `folder/name` lie where its record says."""
    record = await server.jobs.create(NewJob(kind=kind, tenant="matt", request={"name": "x"}))
    await server.jobs.claim(kind, OWNER)
    await server.jobs.start(record.id, OWNER)
    output: dict[str, list[dict[str, Any]]] = {"loras": [], "samples": [], "images": []}
    for path, data in files.items():
        key = server.services.keys_of("matt").process_prefix(record.id) + path
        await server.store.put(key, data)
        folder, filename = path.split("/")
        listed = {"lora": "loras"}.get(folder, folder)
        output[listed].append({"key": key, "filename": filename, "size_bytes": len(data)})
    await server.jobs.complete(record.id, OWNER, output)
    return record.id


async def training(server: LocalServer) -> str:
    return await finished(
        server, JobKind.TRAINING, {"lora/a.safetensors": b"weights", "samples/1.png": b"one", "samples/2.png": b"two"}
    )


async def generation(server: LocalServer) -> str:
    return await finished(server, JobKind.GENERATION, {"images/0.png": b"picture"})


def bytes_behind(server: LocalServer, url: str) -> bytes:
    return server.store._objects[urlparse(url).path.removeprefix("/")].data


@pytest.mark.parametrize("form", ["{key}", "s3://bucket/{key}", "{path}"])
async def test_a_file_is_downloaded_by_its_key(server: LocalServer, form: str) -> None:
    process_id = await training(server)
    path = f"processes/{process_id}/lora/a.safetensors"
    named = form.format(key=f"raylora/matt/{path}", path=path)
    reply = await done(server, {"type": "download_by_key", "s3_key": named, "something": "else"})
    assert (reply["type"], reply["filename"], reply["size"]) == ("url", "a.safetensors", 7)
    assert bytes_behind(server, reply["url"]) == b"weights"


@pytest.mark.parametrize(
    "key",
    ["raylora/matt2/x", "raylora/matt/../matt2/x", "../matt2/x", "raylora/processes/x.json", "no/such", "/", "a//b"],
)
@pytest.mark.parametrize(("kind", "field"), [("download_by_key", "s3_key"), ("download_file", "file_path")])
async def test_what_is_not_the_tenants_own_is_not_found(server: LocalServer, kind: str, field: str, key: str) -> None:
    for stored in ("raylora/matt2/x", "raylora/processes/x.json"):
        await server.store.put(stored, b"theirs")
    assert (await refused(server, {"type": kind, field: key}))["error_type"] == "object_not_found"


async def test_a_small_file_comes_as_data_and_a_large_one_as_a_redirect(server: LocalServer) -> None:
    large = b"x" * (INLINE_BYTES_MAX + 1)
    process_id = await finished(server, JobKind.GENERATION, {"images/s.png": large[1:], "images/l.png": large})
    path = f"processes/{process_id}/images"
    small = await done(server, {"type": "download_file", "file_path": f"{path}/s.png"})
    assert (small["type"], small["size"], small["content_type"]) == ("file_data", INLINE_BYTES_MAX, "image/png")
    assert base64.b64decode(small["data"]) == large[1:]
    reply = await done(server, {"type": "download_file", "file_path": f"{path}/l.png"})
    assert (reply["type"], reply["size"], reply["content_type"]) == ("redirect", len(large), "image/png")
    assert reply["sha256"] == hashlib.sha256(large).hexdigest()
    assert bytes_behind(server, reply["url"]) == large


async def test_files_are_listed_by_kind_below_a_path_and_no_further(server: LocalServer) -> None:
    one, two = await training(server), await generation(server)
    await server.store.put("raylora/matt2/processes/train_1/lora/theirs.safetensors", b"x")
    await server.store.put(f"raylora/matt/processes/{one}9/lora/neighbour.safetensors", b"x")
    await server.store.put(f"raylora/matt/processes/{one}/checkpoints/1/state.safetensors", b"x")
    everything = await done(server, {"type": "list_files"})
    assert {item["filename"] for item in everything["lora_files"]} == {"a.safetensors", "neighbour.safetensors"}
    assert everything["total_files"] == 5
    mine = await done(server, {"type": "list_files", "path": f"processes/{one}"})
    assert [item["filename"] for item in mine["lora_files"]] == ["a.safetensors"]
    assert {item["process_id"] for item in mine["image_files"]} == {one}
    assert (await done(server, {"type": "list_files", "path": f"processes/{two}/"}))["total_files"] == 1
    assert (await refused(server, {"type": "list_files", "path": "../matt2"}))["error_type"] == "object_not_found"


async def test_listings_do_not_stop_at_a_thousand_keys(server: LocalServer) -> None:
    for index in range(1001):
        await server.store.put(f"raylora/matt/processes/gen_1/images/{index}.png", b"x")
    assert (await done(server, {"type": "list_files"}))["total_files"] == 1001


async def test_dataset_folders_are_the_tenants_own(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    await done(server, upload_payload("dogs"), key=OTHER_KEY)
    reply = await done(server, {"type": "list_dataset_folders"})
    assert (reply["folders"], reply["prefix"]) == (["cats"], "raylora/matt/datasets/")


async def test_a_bulk_download_has_every_file_and_one_zip_of_them(server: LocalServer) -> None:
    one, two = await training(server), await generation(server)
    reply = await done(server, {"type": "bulk_download", "process_ids": [one, two, one]})
    assert (reply["total_files"], reply["total_size"]) == (4, 20)
    assert [item["type"] for item in reply["download_items"]] == ["lora", "sample", "sample", "image"]
    assert {"filename", "url", "size"} <= set(reply["download_items"][0])
    with zipfile.ZipFile(io.BytesIO(bytes_behind(server, reply["zip_url"]))) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            f"{one}/a.safetensors": b"weights",
            f"{one}/1.png": b"one",
            f"{one}/2.png": b"two",
            f"{two}/0.png": b"picture",
        }


async def test_a_bulk_download_takes_only_what_was_asked_for(server: LocalServer) -> None:
    one = await training(server)
    loras = await done(server, {"type": "bulk_download", "process_ids": [one], "include_images": False})
    assert [item["type"] for item in loras["download_items"]] == ["lora"]
    nothing = {"type": "bulk_download", "process_ids": [one], "include_images": False, "include_loras": False}
    reply = await done(server, nothing)
    assert (reply["download_items"], reply["zip_url"]) == ([], None)


async def test_foreign_processes_are_not_found(server: LocalServer) -> None:
    one = await training(server)
    for payload in (
        {"type": "bulk_download", "process_ids": [one]},
        {"type": "delete_results", "result_type": "lora", "process_id": one},
        {"type": "download", "process_id": one},
    ):
        reply = await ask(server, payload, key=OTHER_KEY)
        assert reply["output"]["error_type"] == "process_not_found"
    assert (await done(server, {"type": "delete_results", "result_type": "lora"}, key=OTHER_KEY))["found"] == 0
    assert (await done(server, {"type": "download", "process_id": one}))["size"] == 7


async def test_deleted_results_are_gone_from_store_and_record_and_others_stay(server: LocalServer) -> None:
    one, two = await training(server), await training(server)
    reply = await done(server, {"type": "delete_results", "result_type": "samples", "process_id": one, "extra": 1})
    assert {name: reply[name] for name in ("status", "result_type", "deleted", "found")} == {
        "status": "completed",
        "result_type": "samples",
        "deleted": 2,
        "found": 2,
    }
    left = [key for key in list(server.store.keys()) if "/samples/" in key]
    assert all(two in key for key in left)
    record = await server.jobs.get(one)
    assert record.output is not None
    assert (record.output["samples"], len(record.output["loras"])) == ([], 1)
    assert (await done(server, {"type": "delete_results", "result_type": "lora"}))["deleted"] == 2
    assert (await done(server, {"type": "list_models"}))["models"] == []


async def test_work_under_way_keeps_its_files(server: LocalServer) -> None:
    await ask(server, {"prompt": "x", "wait": False})
    [record] = await server.jobs.claim(JobKind.GENERATION, OWNER)
    await server.jobs.start(record.id, OWNER)
    await server.store.put(f"raylora/matt/processes/{record.id}/images/0.png", b"x")
    reply = await done(server, {"type": "delete_results", "result_type": "images"})
    assert (reply["deleted"], reply["found"]) == (0, 1)


async def test_a_reply_over_the_limit_is_a_redirect_to_itself(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await training(server)
    whole = await done(server, {"type": "list_files"})
    monkeypatch.setattr(runpod_output, "OUTPUT_BYTES_MAX", 100)
    reply = await done(server, {"type": "list_files"})
    assert (reply["type"], reply["content_type"]) == ("redirect", "application/json")
    data = bytes_behind(server, reply["url"])
    assert (len(data), hashlib.sha256(data).hexdigest()) == (reply["size"], reply["sha256"])
    assert json.loads(data)["lora_files"] == whole["lora_files"]


async def test_files_of_the_older_layout_are_the_first_tenants_to_read(server: LocalServer) -> None:
    key = "raylora/results/person/lora/person.safetensors"
    await server.store.put(key, b"weights")
    await server.store.put("raylora/dataset/zib/a.png", b"picture")
    for named in (key, f"s3://bucket/{key}"):
        reply = await done(server, {"type": "download_by_key", "s3_key": named})
        assert (reply["s3_key"], reply["size"]) == (key, 7)
    listed = await done(server, {"type": "list_files"})
    assert [entry["s3_key"] for entry in listed["lora_files"]] == [key]
    assert (await done(server, {"type": "list_files", "path": "raylora/results/person"}))["total_files"] == 1
    assert (await done(server, {"type": "list_dataset_folders"}))["folders"] == ["zib"]
    assert (await refused(server, {"type": "download_by_key", "s3_key": key}, OTHER_KEY))["error_type"]
    for path in (None, "raylora/results/person"):
        assert (await done(server, {"type": "list_files", "path": path}, OTHER_KEY))["total_files"] == 0
    assert (await done(server, {"type": "list_dataset_folders"}, OTHER_KEY))["folders"] == []
