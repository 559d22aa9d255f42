"""Processes, their results and what they have stored, through /runsync."""

import pytest

from serve_app.testing import (
    OTHER_KEY,
    LocalServer,
    train_config,
    upload_payload,
)
from storage.job_state import JobKind
from tests.serve_app.job_types.asking import OWNER, done, refused, trained


async def test_processes_are_paged_newest_first_and_only_ones_own(server: LocalServer) -> None:
    made = [(await done(server, {"prompt": p, "wait": False}))["process_id"] for p in "abcde"]
    await done(server, {"prompt": "theirs", "wait": False}, key=OTHER_KEY)
    seen: list[str] = []
    cursor = None
    while True:
        page = await done(server, {"type": "processes", "limit": 2, "cursor": cursor})
        seen += [process["id"] for process in page["processes"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]
    assert {"worker_id", "environment", "data_sources"} <= set(page)


async def test_processes_can_be_chosen_by_status_and_kind(server: LocalServer) -> None:
    process_id = await trained(server)
    await done(server, {"prompt": "a", "wait": False})
    for choice in ({"status": "completed"}, {"process_type": "training"}):
        page = await done(server, {"type": "processes", **choice})
        assert [process["id"] for process in page["processes"]] == [process_id]
    assert (await refused(server, {"type": "processes", "cursor": "x"}))["error_type"] == "invalid_cursor"


async def test_process_status_of_unknown_and_foreign_processes_is_not_found(server: LocalServer) -> None:
    process_id = (await done(server, {"prompt": "a", "wait": False}))["process_id"]
    assert (await done(server, {"type": "process_status", "process_id": process_id}))["status"] == "starting"
    for key, asked in ((OTHER_KEY, process_id), (None, "train_0123456789ab")):
        assert (await done(server, {"type": "process_status", "process_id": asked}, key))["status"] == "not_found"


async def test_cancel_stops_what_runs_and_refuses_what_does_not(server: LocalServer) -> None:
    process_id = (await done(server, {"prompt": "a", "wait": False}))["process_id"]
    assert "cancelled" in (await done(server, {"type": "cancel", "process_id": process_id}))["message"]
    finished = await trained(server)
    for asked in (finished, "train_0123456789ab"):
        output = await refused(server, {"type": "cancel", "process_id": asked})
        assert output["error"] == "Process not found or cannot be cancelled"


@pytest.mark.parametrize("name", ["lora", "list_models"])
async def test_models_are_the_adapters_of_ones_own_completed_trainings(server: LocalServer, name: str) -> None:
    process_id = await trained(server)
    models = (await done(server, {"type": name}))["models"]
    assert [model["filename"] for model in models] == ["my_lora_5.safetensors", "my_lora.safetensors"]
    assert models[1] == {
        "id": process_id,
        "filename": "my_lora.safetensors",
        "name": "my_lora",
        "process_id": process_id,
        "path": f"s3://bucket/raylora/matt/processes/{process_id}/lora/my_lora.safetensors",
        "s3_key": f"raylora/matt/processes/{process_id}/lora/my_lora.safetensors",
        "size_mb": 0.01,
        "modified_date": models[1]["modified_date"],
        "status": "ready",
        "trigger_word": "ohwx",
        "base_model": "tiny",
        "step": 10,
        "format": "diffusers",
    }
    assert (await done(server, {"type": name}, key=OTHER_KEY))["models"] == []


async def test_download_is_a_url_to_the_furthest_trained_adapter(server: LocalServer) -> None:
    process_id = await trained(server)
    output = await done(server, {"type": "download", "process_id": process_id})
    assert (output["type"], output["filename"], output["size"]) == ("url", "my_lora.safetensors", 7000)
    assert output["url"].startswith("http")
    assert len(output["files"]) == 2


async def test_download_says_why_there_is_nothing(server: LocalServer) -> None:
    process_id = (await done(server, {"prompt": "a", "wait": False}))["process_id"]
    assert (await refused(server, {"type": "download", "process_id": process_id}))["error"] == "Process not completed"
    assert (await refused(server, {"type": "download", "process_id": "x"}))["error"] == "Process not found"
    trained_id = await trained(server)
    await done(server, {"type": "delete_results", "result_type": "lora", "process_id": trained_id})
    gone = await refused(server, {"type": "download", "process_id": trained_id})
    assert (gone["error"], gone["error_type"]) == (
        "The process has completed, but its files were deleted.",
        "process_files_deleted",
    )


async def test_a_completed_training_tells_its_best_step_and_its_other_key_format(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    async with server.client() as http:
        body = {"input": {"type": "train", "config": train_config(), "wait": True}}
        job_id = (await http.post("/v2/ep/run", json=body)).json()["id"]
        [record] = await server.jobs.claim(JobKind.TRAINING, OWNER)
        await server.jobs.start(record.id, OWNER)
        await server.jobs.heartbeat(record.id, OWNER, progress={"step": 3, "total_steps": 10, "validation_loss": 0.25})
        running = (await http.get(f"/v2/ep/status/{job_id}")).json()["output"]
        assert running["metrics"]["validation_loss"] == 0.25
        key = server.services.keys_of("matt").lora_file(record.id, "my_lora_kohya.safetensors")
        await server.store.put(key, b"weights")
        export = {"id": record.id, "key": key, "filename": "my_lora_kohya.safetensors", "format": "kohya"}
        await server.jobs.complete(record.id, OWNER, {"loras": [], "exports": [export], "best_step": 7})
        output = (await http.get(f"/v2/ep/status-sync/{job_id}?wait=5000")).json()["output"]
    assert output["best_step"] == 7
    assert [(item["type"], item["format"], item["s3_key"]) for item in output["exports"]] == [
        ("redirect", "kohya", key)
    ]
