"""Job types asked through /runsync, as clients do."""

from typing import Any

from serve_app.testing import (
    LocalServer,
    train_config,
    upload_payload,
)
from storage.counters import CLEANUP_FAILURES
from storage.job_state import JobKind
from storage.ray_counters import of_this_process


async def ask(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    async with server.client(**({} if key is None else {"key": key})) as http:
        reply = await http.post("/v2/ep/runsync", json={"input": payload})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return body


async def done(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    reply = await ask(server, payload, key)
    assert reply["status"] == "COMPLETED", reply
    output: dict[str, Any] = reply["output"]
    return output


async def refused(server: LocalServer, payload: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    reply = await ask(server, payload, key)
    assert reply["status"] == "FAILED", reply
    assert reply["error"] == reply["output"]["error"]
    output: dict[str, Any] = reply["output"]
    return output


def cleanup_failures() -> dict[str, float]:
    """How many so far, by the kind of thing."""
    return of_this_process().counts().get(CLEANUP_FAILURES, {})


OWNER = "driver-1"


async def trained(server: LocalServer, folder: str = "cats", **files: Any) -> str:
    """A completed training's process id; its adapter is stored."""
    await done(server, upload_payload(folder))
    process_id = str((await done(server, {"type": "train", "config": train_config(folder)}))["process_id"])
    key = server.services.keys_of("matt").lora_file(process_id, "my_lora.safetensors")
    info = await server.store.put(key, b"weights" * 1000)
    lora = {
        "id": process_id,
        "key": key,
        "filename": "my_lora.safetensors",
        "sha256": info.sha256,
        "size_bytes": info.size_bytes,
        "step": 10,
        "format": "diffusers",
    }
    earlier = {**lora, "key": key.replace("my_lora", "my_lora_5"), "filename": "my_lora_5.safetensors", "step": 5}
    await server.jobs.claim(JobKind.TRAINING, OWNER)
    await server.jobs.start(process_id, OWNER, worker_id="w")
    await server.jobs.complete(
        process_id, OWNER, {"loras": [earlier, lora], "trigger_word": "ohwx", "base_model": "tiny", **files}
    )
    return process_id
