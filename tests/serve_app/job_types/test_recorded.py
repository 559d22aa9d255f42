"""Weights are held to the digest that was recorded when they were made, whatever the object itself says."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from serve_app.testing import LocalServer, train_config, upload_payload
from storage.counters import UNVERIFIED_WEIGHTS
from storage.imported_loras import ImportedLora, LoraImport, commit_imported
from storage.ray_counters import of_this_process
from tests.serve_app.job_types.asking import done, refused, trained

WEIGHTS = b"weights" * 1000
CHANGED = b"changed" * 1000
RECORDED = hashlib.sha256(WEIGHTS).hexdigest()
LORA_ID = "lora_0123456789ab"


async def of_a_training(server: LocalServer, _: Any) -> str:
    return server.services.keys_of("matt").lora_file(await trained(server), "my_lora.safetensors")


async def of_a_checkpoint(server: LocalServer, _: Any) -> str:
    keys = server.services.keys_of("matt")
    state = json.dumps({"sha256": {"adapter.safetensors": RECORDED}}).encode()
    await server.store.put(keys.checkpoint_file("train_0123456789ab", 5, "state.json"), state)
    return keys.checkpoint_file("train_0123456789ab", 5, "adapter.safetensors")


async def of_an_import(server: LocalServer, folder: Any) -> str:
    keys, now = server.services.keys_of("matt"), datetime(2026, 1, 1, tzinfo=UTC)
    common: dict[str, Any] = {"id": LORA_ID, "name": "a", "filename": "a.safetensors", "created_at": now}
    size_bytes = len(WEIGHTS)
    key = keys.imported_lora_file(LORA_ID, "a.safetensors")
    asked = LoraImport(size_bytes=size_bytes, **common)
    lora = ImportedLora(key=key, size_bytes=size_bytes, sha256=RECORDED, format="kohya", rank=4, **common)
    (folder / "a").write_bytes(WEIGHTS)
    await commit_imported(server.store, keys, asked, lora, folder / "a")
    return key


def unverified() -> dict[str, float]:
    return of_this_process().counts().get(UNVERIFIED_WEIGHTS, {})


PLACES = pytest.mark.parametrize("place", [of_a_training, of_a_checkpoint, of_an_import])


@PLACES
async def test_an_adapter_by_path_is_held_to_what_was_recorded(server: LocalServer, place: Any, tmp_path: Any) -> None:
    key = await place(server, tmp_path)
    await server.store.put(key, CHANGED)

    output = await done(server, {"prompt": "a cat", "wait": False, "loras": [{"path": key}]})

    [lora] = (await server.jobs.get(output["process_id"])).request["loras"]
    assert lora["sha256"] == RECORDED


@PLACES
async def test_an_adapter_that_a_training_begins_from_is_held_to_what_was_recorded(
    server: LocalServer, place: Any, tmp_path: Any
) -> None:
    key = await place(server, tmp_path)
    await server.store.put(key, CHANGED)
    await done(server, upload_payload("dogs"))
    config = train_config("dogs")
    config["config"]["process"][0]["network"]["pretrained_lora_path"] = key

    output = await done(server, {"type": "train", "config": config})

    network = (await server.jobs.get(output["process_id"])).request["network"]
    assert (network["pretrained"], network["pretrained_sha256"]) == (key, RECORDED)


@PLACES
async def test_weights_that_were_changed_are_not_handed_out(server: LocalServer, place: Any, tmp_path: Any) -> None:
    key = await place(server, tmp_path)
    await server.store.put(key, WEIGHTS)
    assert (await done(server, {"type": "download_file", "file_path": key}))["size"] == len(WEIGHTS)
    await server.store.put(key, CHANGED)

    output = await refused(server, {"type": "download_file", "file_path": key})

    assert output["error_type"] == "integrity_error"


async def test_weights_that_were_changed_are_in_no_bundle(server: LocalServer) -> None:
    process_id = await trained(server)
    keys = server.services.keys_of("matt")
    await server.store.put(keys.lora_file(process_id, "my_lora_5.safetensors"), WEIGHTS)
    await server.store.put(keys.lora_file(process_id, "my_lora.safetensors"), CHANGED)

    output = await refused(server, {"type": "bulk_download", "process_ids": [process_id]})

    assert output["error_type"] == "integrity_error"


@pytest.mark.parametrize(
    "name", ["processes/train_0123456789ab/lora/a", "loras/lora_0123456789ab/a", "processes/x/checkpoints/5/a"]
)
async def test_what_nothing_was_recorded_of_is_counted_and_held_to_what_the_store_says(
    server: LocalServer, name: str
) -> None:
    key, kind = f"raylora/matt/{name}.safetensors", name.partition("/")[0]
    before = unverified().get(kind, 0)
    stored = await server.store.put(key, WEIGHTS)

    output = await done(server, {"prompt": "a cat", "wait": False, "loras": [{"path": key}]})

    [lora] = (await server.jobs.get(output["process_id"])).request["loras"]
    assert lora["sha256"] == stored.sha256
    assert unverified()[kind] == before + 1


async def test_a_checkpoint_whose_state_is_damaged_is_not_drawn_with(server: LocalServer) -> None:
    key = await of_a_checkpoint(server, None)
    await server.store.put(key, WEIGHTS)
    await server.store.put(key.replace("adapter.safetensors", "state.json"), b"{")

    output = await refused(server, {"prompt": "a cat", "loras": [{"path": key}]})

    assert output["error_type"] == "checkpoint_invalid"
