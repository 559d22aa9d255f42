"""Trainings over /v1: the same records as the RunPod surface has."""

import json
from typing import Any

import httpx
import pytest

from serve_app.testing import OTHER_KEY, TENANT, LocalServer, keys_of, train_config, upload_payload
from storage.errors import JobsUnavailable
from storage.job_state import JobKind
from storage.jobs_testing import JobsWorld

OWNER = "driver-1"
PINS = {"dataset": "upload_id", "mask_dataset": "mask_upload_id"}
SPEC = {"name": "mine", "model": "tiny", "datasets": [{"dataset": "cats", "resolutions_px": [64]}]}


async def upload(http: httpx.AsyncClient, folder: str = "cats") -> None:
    payload = upload_payload(folder)
    body = {"name": folder, "files": [{k: f[k] for k in ("filename", "content")} for f in payload["files"]]}
    assert (await http.post("/v1/datasets", json=body)).status_code == 201


async def create(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    reply = await http.post("/v1/trainings", json=body or {"spec": SPEC})
    assert reply.status_code == 202, reply.text
    training: dict[str, Any] = reply.json()["training"]
    return training


async def settle(server: LocalServer, output: dict[str, Any]) -> str:
    [record] = await server.jobs.claim(JobKind.TRAINING, OWNER)
    await server.jobs.start(record.id, OWNER)
    await server.jobs.complete(record.id, OWNER, output)
    return record.id


async def test_a_training_of_a_plain_spec_is_queued_with_every_default_filled_in(server: LocalServer) -> None:
    async with server.client() as http:
        await upload(http)
        training = await create(http)
        assert training["state"] == "QUEUED"
        assert training["spec"]["train"]["steps"] == 1000
        assert training["spec"]["datasets"][0]["upload_id"]
        assert (await http.get(f"/v1/trainings/{training['id']}")).json() == training


async def test_the_uploads_of_everything_that_a_training_reads_are_pinned_when_it_is_queued(
    server: LocalServer,
) -> None:
    names = ("cats", "masks", "held", "held-masks")
    asked = {
        **SPEC,
        "datasets": [{"dataset": "cats", "mask_dataset": "masks"}],
        "validation": {"dataset": {"dataset": "held", "mask_dataset": "held-masks"}},
    }
    async with server.client() as http:
        first = {}
        for name in names:
            await upload(http, name)
            first[name] = (await http.get(f"/v1/datasets/{name}")).json()["upload_id"]
        spec = (await create(http, spec=asked))["spec"]
    [trained], held = spec["datasets"], spec["validation"]["dataset"]
    assert {of[name]: of[upload_id] for of in (trained, held) for name, upload_id in PINS.items()} == first


async def test_a_training_of_an_ai_toolkit_configuration_is_the_process_that_the_runpod_surface_shows(
    server: LocalServer,
) -> None:
    async with server.client() as http:
        await upload(http)
        training = await create(http, config=train_config())
        body = {"input": {"type": "process_status", "process_id": training["id"]}}
        process = (await http.post("/v2/ep/runsync", json=body)).json()["output"]
    assert (process["id"], process["status"]) == (training["id"], "starting")


async def test_a_finished_training_repeats_the_warnings_of_its_acceptance(server: LocalServer) -> None:
    config = train_config()
    config["config"]["process"][0]["train"]["stepz"] = 5
    async with server.client() as http:
        await upload(http)
        accepted = (await http.post("/v1/trainings", json={"config": config})).json()
        training_id = await settle(server, {"loras": [], "warnings": ["These pictures are the same."]})
        ended = (await http.get(f"/v1/trainings/{training_id}")).json()
    assert accepted["warnings"]
    assert ended["result"]["warnings"] == [*accepted["warnings"], "These pictures are the same."]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_request"),
        ({"spec": SPEC, "config": "x"}, 400, "invalid_request"),
        ({"spec": {**SPEC, "train": {"steps": "10"}}}, 400, "invalid_request"),
        ({"spec": {**SPEC, "datasets": [{"local_path": "/etc"}]}}, 400, "config_invalid"),
        ({"spec": {**SPEC, "model": "/etc"}}, 400, "config_invalid"),
        ({"spec": {**SPEC, "model": "other"}}, 400, "model_not_served"),
        ({"spec": SPEC}, 404, "dataset_not_found"),
        ({"config": "- no mapping"}, 400, "config_invalid"),
    ],
)
async def test_what_cannot_be_trained_is_refused_before_anything_is_queued(
    server: LocalServer, body: dict[str, Any], status: int, code: str
) -> None:
    async with server.client() as http:
        reply = await http.post("/v1/trainings", json=body)
        assert (reply.status_code, reply.json()["code"]) == (status, code)
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.json()["request_id"] == reply.headers["x-request-id"]
        assert (await http.get("/v1/trainings")).json()["items"] == []


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"train": {"steps": 0}}, "spec.train.steps"),
        ({"datasets": [{"local_path": "/etc"}]}, "spec.datasets[0].local_path"),
        ({"model": "/etc"}, "spec.model"),
        ({"network": {"pretrained": "elsewhere/a.safetensors"}}, "spec.network.pretrained"),
    ],
)
async def test_a_problem_of_a_spec_has_its_path_in_the_body(
    server: LocalServer, fields: dict[str, Any], path: str
) -> None:
    async with server.client() as http:
        reply = await http.post("/v1/trainings", json={"spec": SPEC | fields})
    assert [problem["path"] for problem in reply.json()["validation_errors"]] == [path]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"spec": NaN}', b'{"config": "\\ud800"}', b"\xff"])
async def test_a_body_that_is_no_json_object_is_refused(server: LocalServer, content: bytes) -> None:
    async with server.client() as http:
        reply = await http.post("/v1/trainings", content=content)
    assert (reply.status_code, reply.json()["code"]) == (400, "body_invalid")


async def test_pages_follow_one_another_newest_first_and_choose_by_state(server: LocalServer, world: JobsWorld) -> None:
    made = []
    for _ in range(3):
        world.clock.advance(1)
        made.append(world.create(JobKind.TRAINING, tenant=TENANT, request={"name": "n"}).id)
    await server.jobs.request_cancel(made[0], tenant=TENANT)
    async with server.client() as http:
        first = (await http.get("/v1/trainings", params={"limit": 2})).json()
        second = (await http.get("/v1/trainings", params={"limit": 2, "cursor": first["next_cursor"]})).json()
        assert [item["id"] for item in first["items"] + second["items"]] == made[::-1]
        assert second["next_cursor"] is None
        chosen = (await http.get("/v1/trainings", params={"state": "CANCELLED"})).json()["items"]
        assert [item["id"] for item in chosen] == made[:1]
        assert (await http.get("/v1/trainings", params={"cursor": "x"})).json()["code"] == "invalid_cursor"


@pytest.mark.parametrize("what", ["", "/events", "/checkpoints", "/samples", "/logs", "/loss"])
async def test_another_tenants_training_does_not_exist(server: LocalServer, world: JobsWorld, what: str) -> None:
    training = world.create(JobKind.TRAINING, tenant=TENANT)
    async with server.client(OTHER_KEY) as http:
        reply = await http.get(f"/v1/trainings/{training.id}{what}")
    assert (reply.status_code, reply.json()["code"]) == (404, "job_not_found")


async def test_a_generation_is_no_training(server: LocalServer, world: JobsWorld) -> None:
    generation = world.create(JobKind.GENERATION, tenant=TENANT)
    async with server.client() as http:
        assert (await http.get(f"/v1/trainings/{generation.id}")).status_code == 404
        assert (await http.post(f"/v1/trainings/{generation.id}/cancel")).status_code == 404


async def test_a_queued_training_is_cancelled_once(server: LocalServer, world: JobsWorld) -> None:
    training = world.create(JobKind.TRAINING, tenant=TENANT)
    async with server.client() as http:
        assert (await http.post(f"/v1/trainings/{training.id}/cancel")).json()["state"] == "CANCELLED"
        again = await http.post(f"/v1/trainings/{training.id}/resume")
    assert (again.status_code, again.json()["code"]) == (409, "job_not_retryable")


async def test_a_failed_training_is_resumed_as_the_same_training(server: LocalServer, world: JobsWorld) -> None:
    training = world.running(OWNER, JobKind.TRAINING, tenant=TENANT)
    world.jobs.fail(training.id, OWNER, "out_of_memory", "It did not fit.")
    async with server.client() as http:
        failed = (await http.get(f"/v1/trainings/{training.id}")).json()
        assert failed["error"] == {"code": "out_of_memory", "message": "It did not fit."}
        resumed = (await http.post(f"/v1/trainings/{training.id}/resume")).json()
    assert (resumed["id"], resumed["state"], resumed["attempt"]) == (training.id, "QUEUED", 2)


async def checkpoint(server: LocalServer, training_id: str, step: int) -> None:
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        await server.store.put(keys_of(TENANT).checkpoint_file(training_id, step, name), b"1")


async def test_a_completed_training_gets_more_steps_as_a_training_of_its_own(server: LocalServer) -> None:
    async with server.client() as http:
        await upload(http)
        first = await create(http, spec=SPEC | {"train": {"steps": 20}, "network": {"rank": 3}})
        await settle(server, {"loras": []})
        await checkpoint(server, first["id"], 10)
        await checkpoint(server, first["id"], 20)
        reply = await http.post(f"/v1/trainings/{first['id']}/continue", json={"steps": 50})
        more = reply.json()["training"]
        assert (await http.get(f"/v1/trainings/{first['id']}")).json()["state"] == "COMPLETED"
    assert reply.status_code == 202
    assert (more["state"], more["spec"]["train"]["steps"], more["spec"]["continues"]) == ("QUEUED", 50, first["id"])
    assert more["id"] != first["id"]
    assert more["spec"]["network"] == first["spec"]["network"]
    assert more["spec"]["datasets"] == first["spec"]["datasets"]


async def test_a_cancelled_training_goes_on_to_its_own_number_of_steps(server: LocalServer) -> None:
    async with server.client() as http:
        await upload(http)
        first = await create(http)
        await http.post(f"/v1/trainings/{first['id']}/cancel")
        await checkpoint(server, first["id"], 10)
        reply = await http.post(f"/v1/trainings/{first['id']}/continue", json={})
    assert reply.json()["training"]["spec"]["train"]["steps"] == 1000


async def test_what_cannot_be_continued_says_why(server: LocalServer, world: JobsWorld) -> None:
    async with server.client() as http:
        await upload(http)
        running = await create(http)
        early = await http.post(f"/v1/trainings/{running['id']}/continue", json={})
        await http.post(f"/v1/trainings/{running['id']}/cancel")
        empty = await http.post(f"/v1/trainings/{running['id']}/continue", json={})
        await checkpoint(server, running["id"], 10)
        done = await http.post(f"/v1/trainings/{running['id']}/continue", json={"steps": 10})
    async with server.client(OTHER_KEY) as http:
        foreign = await http.post(f"/v1/trainings/{running['id']}/continue", json={})
    assert (early.status_code, early.json()["code"]) == (409, "training_not_ended")
    assert [problem["code"] for problem in empty.json()["validation_errors"]] == ["no_checkpoint"]
    assert [problem["path"] for problem in done.json()["validation_errors"]] == ["steps"]
    assert (foreign.status_code, foreign.json()["code"]) == (404, "job_not_found")


async def test_a_training_that_ended_early_goes_on_without_that_patience(server: LocalServer) -> None:
    async with server.client() as http:
        await upload(http)
        first = await create(http, spec=SPEC | {"train": {"steps": 20}, "validation": {"patience": 2}})
        await settle(server, {"loras": []})
        await checkpoint(server, first["id"], 12)
        reply = await http.post(f"/v1/trainings/{first['id']}/continue", json={})
    more = reply.json()["training"]["spec"]
    assert (more["train"]["steps"], more["validation"]["patience"]) == (20, None)


async def test_what_a_training_stored_so_far_is_listed(server: LocalServer, world: JobsWorld) -> None:
    training, keys = world.running(OWNER, JobKind.TRAINING, tenant=TENANT), keys_of(TENANT)
    for step, names in ((10, ("adapter.safetensors", "optimizer.safetensors", "state.json")), (20, ("adapter",))):
        for name in names:
            await server.store.put(keys.checkpoint_file(training.id, step, name), b"abc")
    for step, index in ((20, 0), (10, 1), (10, 0)):
        await server.store.put(keys.sample_image(training.id, step, index, "jpg"), b"picture")
    await server.store.put(keys.training_log(training.id, "train.log"), b"line")
    async with server.client() as http:
        base = f"/v1/trainings/{training.id}"
        checkpoints = (await http.get(f"{base}/checkpoints")).json()["items"]
        samples = (await http.get(f"{base}/samples")).json()["items"]
        logs = (await http.get(f"{base}/logs")).json()["items"]
    assert [(item["step"], item["size_bytes"], len(item["files"])) for item in checkpoints] == [(10, 9, 3)]
    assert [item["is_best"] for item in checkpoints] == [False]
    assert [(item["step"], item["index"]) for item in samples] == [(10, 0), (10, 1), (20, 0)]
    assert all("method=GET" in item["url"] for item in samples)
    assert [item["filename"] for item in logs] == ["train.log"]


async def test_the_best_checkpoint_is_marked_while_a_training_runs_and_after_its_end(
    server: LocalServer, world: JobsWorld
) -> None:
    training = world.running(OWNER, JobKind.TRAINING, tenant=TENANT)
    for step in (10, 20):
        await checkpoint(server, training.id, step)

    async def best(http: httpx.AsyncClient) -> list[int]:
        items = (await http.get(f"/v1/trainings/{training.id}/checkpoints")).json()["items"]
        return [item["step"] for item in items if item["is_best"]]

    async with server.client() as http:
        assert await best(http) == []
        world.jobs.heartbeat(training.id, OWNER, progress={"step": 20, "total_steps": 30, "best_step": 10})
        assert await best(http) == [10]
        assert (await http.get(f"/v1/trainings/{training.id}")).json()["progress"]["best_step"] == 10
        world.jobs.complete(training.id, OWNER, {"best_step": 20})
        assert await best(http) == [20]


async def test_progress_tells_the_gpus_memory_where_there_is_one(server: LocalServer, world: JobsWorld) -> None:
    training = world.running(OWNER, JobKind.TRAINING, tenant=TENANT)
    memory = {"gpu_memory_peak_bytes": 6 * 2**30, "gpu_memory_total_bytes": 24 * 2**30}
    for told, shown in ({}, dict.fromkeys(memory)), (memory, memory):
        world.jobs.heartbeat(training.id, OWNER, progress={"step": 1, "total_steps": 9, **told})
        async with server.client() as http:
            progress = (await http.get(f"/v1/trainings/{training.id}")).json()["progress"]
            reply = await http.post(
                "/v2/ep/runsync", json={"input": {"type": "process_status", "process_id": training.id}}
            )
        assert {name: progress[name] for name in memory} == shown
        metrics = reply.json()["output"]["metrics"]
        assert {name: metrics[name] for name in memory if name in metrics} == told


async def test_the_loss_of_a_training_under_way_is_what_is_stored_and_its_latest_point(
    server: LocalServer, world: JobsWorld
) -> None:
    training = world.running(OWNER, JobKind.TRAINING, tenant=TENANT)
    stored = json.dumps([[1, 0.9], [2, 0.8]]).encode()
    await server.store.put(keys_of(TENANT).training_log(training.id, "loss.json"), stored)
    points = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": 0.8}]
    async with server.client() as http:
        for step, more in ((2, []), (3, [{"step": 3, "loss": 0.5}])):
            world.jobs.heartbeat(training.id, OWNER, progress={"step": step, "total_steps": 9, "loss": 0.5})
            found = (await http.get(f"/v1/trainings/{training.id}/loss")).json()
            assert found == {"complete": False, "points": points + more}


async def test_the_loss_is_the_latest_point_until_the_history_is_stored(server: LocalServer, world: JobsWorld) -> None:
    training = world.running(OWNER, JobKind.TRAINING, tenant=TENANT)
    world.jobs.heartbeat(training.id, OWNER, progress={"step": 3, "total_steps": 9, "loss": 0.5})
    async with server.client() as http:
        path = f"/v1/trainings/{training.id}/loss"
        assert (await http.get(path)).json() == {"complete": False, "points": [{"step": 3, "loss": 0.5}]}
        history = json.dumps([[1, 0.9], [2, float("nan")]]).encode()
        await server.store.put(keys_of(TENANT).training_log(training.id, "loss.json"), history)
        world.jobs.complete(training.id, OWNER, {})
        points = [{"step": 1, "loss": 0.9}, {"step": 2, "loss": None}]
        assert (await http.get(path)).json() == {"complete": True, "points": points}


def events_of(text: str) -> list[dict[str, str]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in fields:
            found.append(fields)
    return found


async def test_events_tell_each_state_and_end_with_the_last(server: LocalServer, world: JobsWorld) -> None:
    from serve_app.ingress.native.events import EventStream
    from serve_app.ingress.native.views import training_view

    record = world.create(JobKind.TRAINING, tenant=TENANT)
    stream = EventStream(server.services, lambda found: training_view(found, world.clock()), heartbeat_s=0.0)
    events = stream.events(record, None)
    seen = [await anext(events), await anext(events), await anext(events)]
    assert (seen[0], seen[2]) == ("retry: 2000\n\n", ": heartbeat\n\n")
    world.jobs.claim(JobKind.TRAINING, OWNER)
    world.jobs.start(record.id, OWNER)
    seen.append(await anext(events))
    world.jobs.heartbeat(record.id, OWNER, progress={"step": 1, "total_steps": 2})
    seen.append(await anext(events))
    world.jobs.complete(record.id, OWNER, {})
    seen += [text async for text in events]
    told = events_of("".join(seen))
    states = [(event["event"], json.loads(event["data"])["state"]) for event in told]
    assert states == [("state", "QUEUED"), ("state", "RUNNING"), ("progress", "RUNNING"), ("state", "COMPLETED")]
    assert [int(event["id"]) for event in told] == sorted({int(event["id"]) for event in told})


async def test_a_reader_is_told_why_its_events_end_too_early(server: LocalServer, world: JobsWorld) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise JobsUnavailable("wait")

    training = world.create(JobKind.TRAINING, tenant=TENANT)
    server.jobs.wait = away  # type: ignore[method-assign]
    async with server.client() as http:
        [_, told] = events_of((await http.get(f"/v1/trainings/{training.id}/events")).text)
    problem = json.loads(told["data"])
    assert (told["event"], problem["code"], problem["title"]) == ("error", "jobs_unavailable", "Service Unavailable")
    assert problem["detail"] == "The jobs service did not answer. Try again."


async def test_a_reader_that_saw_the_last_event_is_told_that_nothing_follows(
    server: LocalServer, world: JobsWorld
) -> None:
    training = world.create(JobKind.TRAINING, tenant=TENANT)
    await server.jobs.request_cancel(training.id, tenant=TENANT)
    async with server.client() as http:
        path = f"/v1/trainings/{training.id}/events"
        first = await http.get(path)
        [event] = events_of(first.text)
        assert first.headers["content-type"].startswith("text/event-stream")
        assert (await http.get(path, headers={"Last-Event-ID": event["id"]})).status_code == 204
        behind = await http.get(path, headers={"Last-Event-ID": str(int(event["id"]) - 1)})
        assert events_of(behind.text) == [event]
        assert events_of((await http.get(path, headers={"Last-Event-ID": "of-somebody-else"})).text) == [event]
