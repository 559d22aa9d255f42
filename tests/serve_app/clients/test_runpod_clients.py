"""RunPod's own clients against the HTTP side over a real socket: real records and dispatch, scripted pictures."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.settings import RequestLimits
from serve_app.testing import KEY, LocalServer, ScriptedInference, local_server, train_config, upload_payload
from storage.job_state import JobKind
from storage.jobs import Jobs, utc_now
from storage.jobs_testing import JobsWorld

NODE = Path(__file__).parents[2] / "integration" / "node"
PICTURE = {"prompt": "a large red star"}
OWNER = "driver-1"


@contextlib.asynccontextmanager
async def serving(world: JobsWorld) -> AsyncIterator[tuple[LocalServer, str]]:
    """A server that answers, and its address. Time is real, because the clients' is."""
    jobs = Jobs(world.records, clock=utc_now)
    server = local_server(jobs, utc_now, RequestLimits(same_body_window_s=0))
    dispatcher = GenerationDispatcher(
        server.jobs, server.inference, owner="dispatcher-1", slots=2, heartbeat_s=0.05, poll_s=0.05
    )
    # Connections made before the server is up wait in the socket's backlog.
    listener = socket.create_server(("127.0.0.1", 0))
    http = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off"))
    tasks = [asyncio.create_task(http.serve([listener])), asyncio.create_task(dispatcher.run())]
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}/v2"
    finally:
        http.should_exit = True
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def place(world: JobsWorld) -> AsyncIterator[tuple[LocalServer, str]]:
    async with serving(world) as (server, url):
        yield server, url


@pytest.fixture
def runpod(place: tuple[LocalServer, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    import runpod

    monkeypatch.setattr(runpod, "api_key", KEY)
    monkeypatch.setattr(runpod, "endpoint_url_base", place[1])
    return runpod


async def test_the_python_client_streams_the_steps_and_then_the_pictures(runpod: Any) -> None:
    def use() -> tuple[list[Any], Any, Any]:
        endpoint = runpod.Endpoint("local")
        job = endpoint.run(PICTURE)
        return list(job.stream()), job.output(timeout=10), endpoint.run_sync(PICTURE, timeout=10)

    chunks, output, sync = await asyncio.to_thread(use)
    assert [chunk.get("step") for chunk in chunks] == [1, None]
    assert chunks[-1]["images"][0]["type"] == "redirect"
    assert output["images"]
    assert sync["images"]


async def test_the_python_client_cancels_work_and_purges_what_waits(
    runpod: Any, place: tuple[LocalServer, str]
) -> None:
    inference: ScriptedInference = place[0].inference
    inference.gate = asyncio.Event()

    def use() -> tuple[Any, list[Any], list[str]]:
        endpoint = runpod.Endpoint("local")
        jobs = [endpoint.run(PICTURE) for _ in range(2)]
        while len(inference.begun) < 2:
            jobs[0].status()
        jobs.append(endpoint.run(PICTURE))
        purged = endpoint.purge_queue()
        cancelled = [job.cancel() for job in jobs[:2]]
        return purged, cancelled, [job.output(timeout=10) and job.status() for job in jobs[:2]]

    purged, cancelled, ended = await asyncio.to_thread(use)
    assert purged == {"removed": 1, "status": "completed"}
    assert [reply["status"] for reply in cancelled] == ["CANCELLED"] * 2
    assert ended == ["CANCELLED"] * 2
    assert len(inference.stopped) == 2


async def test_the_asyncio_client_follows_a_training_until_it_is_cancelled(
    runpod: Any, place: tuple[LocalServer, str]
) -> None:
    import aiohttp

    server = place[0]
    async with server.client() as http:
        await http.post("/v2/ep/runsync", json={"input": upload_payload("cats")})
    seen: list[Any] = []
    async with aiohttp.ClientSession() as session:
        job = await runpod.AsyncioEndpoint("local", session).run(
            {"type": "train", "config": train_config(), "wait": True}
        )
        [record] = await server.jobs.claim(JobKind.TRAINING, OWNER)
        await server.jobs.start(record.id, OWNER)
        preview = {"key": f"raylora/matt/processes/{record.id}/samples/1.png", "step": 1}
        await server.jobs.heartbeat(record.id, OWNER, progress={"step": 1, "loss": 0.5, "previews": [preview]})
        # This client never ends the stream of a cancelled job by itself: the 404 after the last chunk does.
        with pytest.raises(KeyError):
            await cancelled_at_the_first_chunk(job, seen, server, record.id)
        assert await job.status() == "CANCELLED"
    assert (seen[0]["step"], seen[0]["loss"], seen[0]["preview"][:4]) == (1, 0.5, "http")
    assert seen[-1]["status"] == "cancelled"


async def cancelled_at_the_first_chunk(job: Any, seen: list[Any], server: LocalServer, process_id: str) -> None:
    async for chunk in job.stream():
        if not seen:
            await job.cancel()
            answer = await server.jobs.heartbeat(process_id, OWNER)
            assert answer.cancel_requested
            await server.jobs.cancelled(process_id, OWNER)
        seen.append(chunk)


async def node_with_the_client() -> str:
    """Node's path, with the JavaScript client installed once and kept; skips where that cannot be done."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not here")
    if not (NODE / "node_modules" / "runpod-sdk").is_dir():
        install = await asyncio.create_subprocess_exec(
            *(npm, "ci", "--no-audit", "--no-fund", "--omit=peer"),
            cwd=NODE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        if await install.wait() != 0:
            pytest.skip("the JavaScript client could not be installed")
    return node


async def test_the_javascript_client_runs_waits_streams_cancels_and_purges(place: tuple[LocalServer, str]) -> None:
    server, url = place
    server.inference.holds = "held"
    node = await node_with_the_client()
    environment = {**os.environ, "RAYLORA_TEST_URL": url, "RAYLORA_TEST_KEY": KEY}
    client = await asyncio.create_subprocess_exec(
        *(node, "client.mjs"), cwd=NODE, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, complaints = await client.communicate()
    assert client.returncode == 0, complaints.decode()[-2000:]
    # The client itself writes to standard output too.
    result = json.loads(said.splitlines()[-1])
    assert (result["runSync"]["completed"], result["runSync"]["succeeded"]) == (True, True)
    assert result["runSync"]["id"].startswith("sync-")
    assert result["run"]["status"] == "IN_QUEUE"
    assert [chunk.get("step") for chunk in result["stream"]] == [1, None]
    assert result["stream"][-1]["images"]
    assert result["status"]["succeeded"] is True
    assert result["health"]["jobs"]["inQueue"] + result["health"]["jobs"]["inProgress"] == 3
    assert result["purge"]["removed"] >= 1
    assert {reply["status"] for reply in result["cancelled"]} == {"CANCELLED"}
    assert (result["pastFirstWait"]["completed"], result["pastFirstWait"]["status"]) == (True, "CANCELLED")
