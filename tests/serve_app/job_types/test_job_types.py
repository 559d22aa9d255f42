"""What each job type answers, through /runsync."""

import asyncio
import json
from typing import Any

from serve_app.job_types import HANDLERS
from serve_app.testing import (
    OTHER_KEY,
    LocalServer,
    train_config,
    upload_payload,
)
from storage.datasets import latest_manifest
from storage.errors import StorageFailed
from storage.job_state import JobKind, JobState
from tests.serve_app.job_types.asking import OWNER, ask, done, refused, trained
from train_jobs.spec import TrainSpec


async def test_every_job_type_of_this_landing_is_known() -> None:
    assert set(HANDLERS) == {
        "health",
        "train",
        "train_with_yaml",
        "generate",
        "upload_training_data",
        "upload_training_files",
        "create_upload",
        "finalize_upload",
        "processes",
        "process_status",
        "cancel",
        "lora",
        "list_models",
        "download",
        "download_by_key",
        "download_file",
        "bulk_download",
        "list_files",
        "list_dataset_folders",
        "delete_results",
    }


async def test_health_tells_what_is_broken(server: LocalServer) -> None:
    server.store.break_down(StorageFailed("get", 4, "connection"))
    output = await done(server, {"type": "health"})
    assert output["status"] == "unhealthy"
    assert output["services"]["storage"]["error"] == "storage_failed"
    assert output["services"]["jobs"]["ok"]
    assert output["services"]["gpu"]["device"] == "cpu"


# --- training


async def test_train_answers_at_once_and_leaves_a_record_that_the_driver_can_read(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    output = await done(server, {"type": "train", "config": train_config()})
    assert output["process_id"].startswith("train_")
    assert output["status"] == "starting"
    assert {"message", "ignored", "warnings"} <= set(output)
    record = await server.jobs.get(output["process_id"])
    spec = TrainSpec.model_validate(record.request)
    manifest = await latest_manifest(server.store, server.services.keys_of("matt"), "cats")
    assert (spec.datasets[0].dataset, spec.datasets[0].upload_id) == ("cats", manifest.upload_id)
    assert record.state is JobState.QUEUED


async def test_a_data_set_of_the_older_layout_is_trained_on_by_the_tenant_it_belongs_to(server: LocalServer) -> None:
    await server.store.put("raylora/dataset/cats/a.png", b"picture")
    output = await done(server, {"type": "train", "config": train_config()})
    spec = TrainSpec.model_validate((await server.jobs.get(output["process_id"])).request)
    manifest = await latest_manifest(server.store, server.services.keys_of("matt"), "cats")
    assert spec.datasets[0].upload_id == manifest.upload_id
    assert [file.key for file in manifest.files] == ["raylora/dataset/cats/a.png"]
    refusal = await refused(server, {"type": "train", "config": train_config()}, OTHER_KEY)
    assert refusal["error_type"] == "dataset_not_found"


async def test_train_takes_yaml_text_under_either_name(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    yaml = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      network: {type: lora, linear: 4, linear_alpha: 4}
      datasets: [{folder_path: cats}]
      train: {steps: 10, lr: 1e-4}
      model: {name_or_path: tiny}
"""
    assert (await done(server, {"type": "train_with_yaml", "yaml_config": yaml}))["process_id"]


async def test_a_training_with_wait_stays_in_progress_and_shows_how_far_it_is(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    async with server.client() as http:
        body = {"input": {"type": "train", "config": train_config(), "wait": True}}
        job_id = (await http.post("/v2/ep/run", json=body)).json()["id"]
        [record] = await server.jobs.claim(JobKind.TRAINING, OWNER)
        await server.jobs.start(record.id, OWNER)
        progress = {"step": 3, "total_steps": 10, "loss": 0.5, "eta_s": 7.0}
        await server.jobs.heartbeat(record.id, OWNER, progress=progress)
        reply = (await http.get(f"/v2/ep/status/{job_id}")).json()
        assert reply["status"] == "IN_PROGRESS"
        shown = {name: reply["output"][name] for name in ("process_id", "progress", "step", "total_steps", "eta")}
        assert shown == {"process_id": record.id, "progress": 30.0, "step": 3, "total_steps": 10, "eta": 7.0}
        await server.jobs.fail(record.id, OWNER, "non_finite_loss", "The loss became NaN.")
        # A status is answered from a watched copy, which may be a moment behind.
        async with asyncio.timeout(20):
            while reply["status"] == "IN_PROGRESS":
                await asyncio.sleep(0.01)
                reply = (await http.get(f"/v2/ep/status/{job_id}")).json()
    assert (reply["status"], reply["error"]) == ("FAILED", "The loss became NaN.")


async def test_a_training_is_refused_before_anything_is_queued(server: LocalServer) -> None:
    missing = await refused(server, {"type": "train", "config": train_config("nobody")})
    assert (missing["error_type"], missing["error"]) == (
        "dataset_not_found",
        "Dataset 'nobody' was not found. Upload it first.",
    )
    unknown = await refused(server, {"type": "train", "config": train_config(model="org/unknown")})
    assert unknown["error_type"] == "model_not_served"
    assert "tiny" in unknown["error"]
    both = await refused(server, {"type": "train", "config": {"config": {"process": [{"train": {"steps": -1}}]}}})
    assert len(both["validation_errors"]) > 1
    for payload in ({"type": "train"}, {"type": "train", "config": "a: b", "yaml_config": "a: b"}):
        assert (await refused(server, payload))["validation_errors"][0]["path"] == "config"
    assert sum((await server.jobs.counts()).values()) == 0


async def test_a_generation_has_one_config(server: LocalServer) -> None:
    output = await refused(server, {"type": "generate", "config": "a: b", "yaml_config": "a: b"})
    assert [problem["path"] for problem in output["validation_errors"]] == ["yaml_config"]


async def test_another_tenants_dataset_does_not_exist(server: LocalServer) -> None:
    await done(server, upload_payload("cats"), key=OTHER_KEY)
    output = await refused(server, {"type": "train", "config": train_config("cats")})
    assert output["error_type"] == "dataset_not_found"


async def test_a_servers_environment_and_paths_cannot_be_asked_for(server: LocalServer) -> None:
    output = await refused(server, {"type": "train", "config": train_config(model="/etc/passwd")})
    assert output["error_type"] == "config_invalid"


# --- pictures


async def test_a_seed_left_open_is_chosen_and_recorded(server: LocalServer) -> None:
    output = await done(server, {"prompt": "a cat", "wait": False})
    record = await server.jobs.get(output["process_id"])
    assert record.request["spec"]["seed"] == 1234
    assert record.request["spec"]["model"] == "tiny"


async def test_adapters_are_found_by_training_by_name_and_by_path(server: LocalServer) -> None:
    process_id = await trained(server)
    key = server.services.keys_of("matt").lora_file(process_id, "my_lora.safetensors")
    payloads: list[dict[str, Any]] = [
        {"loras": [{"id": process_id, "scale": 0.5}]},
        {"loras": [{"id": "my_lora", "scale": 0.5}]},
        {"loras": [{"path": key, "scale": 0.5}]},
        {"loras": [{"path": f"s3://bucket/{key}", "scale": 0.5}]},
        {"lora": {"id": process_id, "scale": 0.5}},
    ]
    for payload in payloads:
        output = await done(server, {"prompt": "a cat", "wait": False, **payload})
        [lora] = (await server.jobs.get(output["process_id"])).request["loras"]
        assert (lora["key"], lora["scale"], len(lora["sha256"])) == (key, 0.5, 64)
        asked = payload.get("loras", [payload.get("lora")])[0]
        assert {name: lora[name] for name in ("id", "path")} == {"id": None, "path": None} | {
            name: value for name, value in asked.items() if name != "scale"
        }
    for short in ({"lora": process_id}, {"model_path": key}):
        output = await done(server, {"prompt": "a cat", "wait": False, **short})
        [lora] = (await server.jobs.get(output["process_id"])).request["loras"]
        assert (lora["key"], lora["scale"]) == (key, 1.0)


async def test_an_adapter_of_a_checkpoint_is_found_while_its_training_runs(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    process_id = (await done(server, {"type": "train", "config": train_config()}))["process_id"]
    keys = server.services.keys_of("matt")
    state = json.dumps({"sha256": {"adapter.safetensors": "ab" * 32}}).encode()
    for name, data in {"adapter.safetensors": b"weights", "state.json": state}.items():
        await server.store.put(keys.checkpoint_file(process_id, 20, name), data)
    await server.store.put(keys.checkpoint_file(process_id, 40, "adapter.safetensors"), b"the others are to come")
    asked = {"id": process_id, "step": 20, "scale": 0.5}
    output = await done(server, {"prompt": "a cat", "wait": False, "loras": [asked]})
    request = (await server.jobs.get(output["process_id"])).request
    [lora] = request["loras"]
    assert (lora["id"], lora["key"]) == (
        f"{process_id}@20",
        keys.checkpoint_file(process_id, 20, "adapter.safetensors"),
    )
    assert (lora["scale"], lora["sha256"]) == (0.5, "ab" * 32)
    for wrong in ({"step": 40}, {"step": 10}, {"id": "train_0123456789ab"}, {"id": "my_lora"}):
        output = await refused(server, {"prompt": "a cat", "loras": [asked | wrong]})
        assert output["error_type"] == "lora_not_usable", wrong
    nameless = {"path": lora["key"], "step": 20}
    assert (await refused(server, {"prompt": "a cat", "loras": [nameless]}))["validation_errors"]
    async with server.client(OTHER_KEY) as http:
        foreign = await http.post("/v1/generations", json={"prompt": "a cat", "loras": [asked]})
    async with server.client() as http:
        native = await http.post("/v1/generations", json={"prompt": "a cat", "loras": [asked]})
    assert (foreign.status_code, foreign.json()["code"]) == (400, "lora_not_usable")
    assert native.status_code == 202
    assert native.json()["spec"]["loras"] == [asked]


async def test_adapters_that_cannot_be_applied_are_refused(server: LocalServer) -> None:
    theirs = "raylora/matt2/processes/train_0123456789ab/lora/a.safetensors"
    await server.store.put(theirs, b"x")
    await done(server, upload_payload("cats"))
    unfinished = (await done(server, {"type": "train", "config": train_config()}))["process_id"]
    own = "raylora/matt/processes/train_0123456789ab/lora/a.safetensors"
    for lora in (
        {"id": "train_0123456789ab"},
        {"id": unfinished},
        {"path": theirs},
        {"path": own},
        {"path": "raylora/matt/../matt2/a.safetensors"},
        {"path": "/etc/passwd"},
    ):
        output = await refused(server, {"prompt": "a cat", "loras": [lora]})
        assert output["error_type"] == "lora_not_usable", lora


async def test_an_unknown_field_is_a_warning(server: LocalServer) -> None:
    output = await done(server, {"prompt": "a cat", "wait": False, "stepz": 3})
    assert output["warnings"] == ["Unknown field 'stepz' was ignored"]


async def test_a_generation_that_is_waited_for_still_tells_of_an_unknown_field(server: LocalServer) -> None:
    output = await _waited_for(server, {"prompt": "a cat", "stepz": 3}, JobKind.GENERATION, {"images": []})
    assert output["images"] == []
    assert output["warnings"] == ["Unknown field 'stepz' was ignored"]


async def test_what_stands_beside_a_generate_config_without_effect_is_told(server: LocalServer) -> None:
    config = {
        "job": "generate",
        "config": {
            "name": "g",
            "process": [{"type": "to_folder", "model": {"name_or_path": "tiny"}, "generate": {"prompts": ["a"]}}],
        },
    }
    output = await done(server, {"type": "generate", "config": config, "width": 64, "wiat": True})
    assert output["warnings"] == [
        "'width' was ignored: it does not go with a config",
        "Unknown field 'wiat' was ignored",
    ]


async def test_a_body_of_unknown_fields_makes_no_endless_list(server: LocalServer) -> None:
    output = await done(server, {"prompt": "a cat", "wait": False, **{f"field{i:04}": 1 for i in range(1000)}})
    assert len(output["warnings"]) == 51
    assert output["warnings"][-1] == "950 more unknown fields were ignored"


async def test_a_wrong_kind_does_not_hide_a_wrong_number(server: LocalServer) -> None:
    wrong = {"prompt": "a cat", "height": "x", "seed": [], "width": -1, "num_images": 99, "loras": [{"id": 5}]}
    output = await refused(server, wrong)
    found = [problem["path"] for problem in output["validation_errors"]]
    assert sorted(found) == ["height", "loras[0].id", "num_images", "seed", "width"]


async def test_an_empty_prompt_is_named(server: LocalServer) -> None:
    output = await refused(server, {"type": "generate", "prompt": "  "})
    assert [problem["path"] for problem in output["validation_errors"]] == ["prompt"]


async def test_a_generate_config_is_accepted_at_once(server: LocalServer) -> None:
    process = {
        "type": "to_folder",
        "model": {"name_or_path": "tiny"},
        "generate": {"prompts": ["a", "b"], "width": 64, "height": 64, "seed": 3},
    }
    config = {"job": "generate", "config": {"name": "g", "process": [process]}}
    output = await done(server, {"type": "generate", "config": config})
    spec = (await server.jobs.get(output["process_id"])).request["spec"]
    assert (spec["prompts"], spec["seed"], spec["width"]) == (["a", "b"], 3, 64)


# --- uploads


# --- processes and files


async def test_a_mask_set_or_an_adapter_that_is_not_there_is_named_before_anything_is_queued(
    server: LocalServer,
) -> None:
    await done(server, upload_payload("cats"))
    masked = train_config("cats")
    masked["config"]["process"][0]["datasets"][0]["mask_path"] = "never-uploaded"
    assert (await refused(server, {"type": "train", "config": masked}))["error_type"] == "dataset_not_found"
    begun = train_config("cats")
    begun["config"]["process"][0]["network"]["pretrained_lora_path"] = "elsewhere/a.safetensors"
    output = await refused(server, {"type": "train", "config": begun})
    assert output["validation_errors"][0]["path"] == "config.process[0].network.pretrained_lora_path"
    assert (await done(server, {"type": "processes"}))["processes"] == []


async def test_a_training_may_begin_from_an_adapter_of_the_older_layout(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    begun = train_config("cats")
    key = "raylora/results/matt/lora/old.safetensors"
    begun["config"]["process"][0]["network"]["pretrained_lora_path"] = key
    process_id = (await done(server, {"type": "train", "config": begun}))["process_id"]
    record = await server.services.jobs.get(process_id, tenant="matt")
    assert record.request["network"]["pretrained"] == key
    await done(server, upload_payload("cats"), key=OTHER_KEY)
    output = await refused(server, {"type": "train", "config": begun}, key=OTHER_KEY)
    assert output["validation_errors"][0]["path"] == "config.process[0].network.pretrained_lora_path"


async def test_a_checked_config_is_reported_key_by_key_and_starts_nothing(server: LocalServer) -> None:
    asked = {"type": "train", "config": train_config("cats", do_cfg=True), "check": True, "upload": ["cats"]}
    report = await done(server, asked)
    assert report["warnings"] == ["Unknown field 'upload' was ignored"]
    verdicts = {key["path"]: key["verdict"] for key in report["keys"]}
    assert not report["accepted"]
    assert verdicts["config.process[0].train.do_cfg"] == "refused"
    assert verdicts["config.process[0].train.steps"] == "honoured"
    await done(server, upload_payload("cats"))
    fine = await done(server, {"type": "train", "config": train_config("cats"), "check": True})
    assert fine["accepted"]
    assert fine["counts"].keys() <= {"honoured", "ignored"}
    assert fine["run"]["steps"] == 10
    elsewhere = await done(server, {"type": "train", "config": train_config("cats", "other"), "check": True})
    assert not elsewhere["accepted"]
    assert (await done(server, {"type": "processes"}))["processes"] == []


async def test_a_check_finds_the_data_sets_that_are_not_there(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    await done(server, upload_payload("theirs"), OTHER_KEY)
    await server.store.put("raylora/dataset/older/a.png", b"picture")
    await server.store.put("raylora/dataset/words/a.txt", b"text")
    stored = set(server.store.keys())
    config = train_config("cats")
    process = config["config"]["process"][0]
    [entry] = process["datasets"]
    process["datasets"] = [
        {**entry, "mask_path": "never-uploaded"},
        {**entry, "folder_path": "/data/theirs"},
        {**entry, "folder_path": "older"},
        {**entry, "folder_path": "words"},
        {**entry, "folder_path": "to-come"},
    ]
    process["validation"] = {"dataset_path": "no-such-set"}
    process["network"]["pretrained_lora_path"] = "elsewhere/a.safetensors"
    report = await done(server, {"type": "train", "config": config, "check": True, "uploads": ["to-come"]})
    at = "config.process[0]"
    assert not report["accepted"]
    assert {key["path"]: key["note"] for key in report["keys"] if key["verdict"] == "invalid"} == {
        f"{at}.datasets[0].mask_path": "there is no data set 'never-uploaded' here: upload it first, or name another",
        f"{at}.datasets[1].folder_path": "there is no data set 'theirs' here: upload it first, or name another",
        f"{at}.datasets[3].folder_path": "data set 'words' has no pictures",
        f"{at}.validation.dataset_path": "there is no data set 'no-such-set' here: upload it first, or name another",
        f"{at}.network.pretrained_lora_path": "is not a .safetensors file of yours",
    }
    assert report["counts"]["invalid"] == 5
    assert {need["path"] for need in report["needs"] if need.get("found") is False} == {
        f"{at}.datasets[0].mask_path",
        f"{at}.datasets[1].folder_path",
        f"{at}.validation.dataset_path",
        f"{at}.network.pretrained_lora_path",
    }
    assert set(server.store.keys()) == stored
    assert (await done(server, {"type": "processes"}))["processes"] == []


async def test_a_check_and_the_training_agree_on_what_is_there(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    for name, code in (("cats", None), ("never-uploaded", "dataset_not_found")):
        config = train_config(name)
        report = await done(server, {"type": "train", "config": config, "check": True})
        assert report["accepted"] == (code is None)
        reply = await ask(server, {"type": "train", "config": config})
        assert reply["output"].get("error_type") == code


async def _waited_for(
    server: LocalServer, payload: dict[str, Any], kind: JobKind, output: dict[str, Any]
) -> dict[str, Any]:
    """The final output of a job that lasts until its work has ended with `output`."""
    async with server.client() as http:
        job_id = (await http.post("/v2/ep/run", json={"input": payload})).json()["id"]
        [record] = await server.jobs.claim(kind, OWNER)
        await server.jobs.start(record.id, OWNER)
        await server.jobs.complete(record.id, OWNER, output)
        reply = (await http.get(f"/v2/ep/status-sync/{job_id}?wait=5000")).json()
    assert reply["status"] == "COMPLETED"
    final: dict[str, Any] = reply["output"]
    return final


async def test_a_training_that_is_waited_for_still_tells_of_unknown_fields(server: LocalServer) -> None:
    await done(server, upload_payload("cats"))
    config = train_config()
    config["config"]["process"][0]["train"]["stepz"] = 5
    payload = {"type": "train", "config": config, "wait": True, "webhok": "x"}
    twice = "In dataset 'cats' these pictures are the same: a.png, b.png."
    output = await _waited_for(server, payload, JobKind.TRAINING, {"loras": [], "warnings": [twice]})
    unknown = "config.process[0].train.stepz: is not a key known here and has no effect; did you mean 'steps'?"
    assert output["warnings"] == ["Unknown field 'webhok' was ignored", unknown, twice]
    assert "ignored" in output
