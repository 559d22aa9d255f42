"""The main job over real HTTP, Ray and S3: upload, train, generate, download; and what a user can get wrong."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from serve_app.cli.client import ApiClient, ApiError
from tests.integration.instance import EXAMPLE, REPOSITORY, Running, training_config

MODEL = REPOSITORY / "assets" / "tiny" / "model"
PICTURES = REPOSITORY / "examples" / "zib" / "images"
PROMPT = "a large red star on a blue background"
STEPS, GUIDANCE, SEED = 6, 3.0, 5

pytestmark = pytest.mark.timeout(600)


def generated(client: ApiClient, **fields: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels [H, W, 3] in 0-1 of the one picture asked for, and its item in the reply."""
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED, "width": 64, "height": 64}
    reply = client.call("generate", prompt=PROMPT, wait=True, **(settings | fields))
    item = reply["images"][0]
    response = httpx.get(item["url"])
    response.raise_for_status()
    assert len(response.content) == item["size"]
    return np.asarray(Image.open(io.BytesIO(response.content)).convert("RGB")) / 255, item


def stock_picture(lora: Path | None = None) -> np.ndarray:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    image = pipeline(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        height=64,
        width=64,
    ).images[0]
    return np.asarray(image.convert("RGB")) / 255


def test_a_served_picture_equals_the_stock_pipelines(client: ApiClient) -> None:
    pixels, item = generated(client)
    assert item["seed"] == SEED
    # Half a level of rounding to 8 bits may fall on either side.
    assert np.abs(pixels - stock_picture()).max() <= 1.5 / 255


def test_a_trained_lora_serves_the_picture_that_stock_diffusers_makes_with_it(
    client: ApiClient, trained: dict[str, Any], tmp_path: Path
) -> None:
    reply = client.call("download", process_id=trained["id"])
    file = tmp_path / reply["filename"]
    assert client.fetch(reply["url"], file) == reply["size"]
    with_lora, _ = generated(client, loras=[{"id": trained["id"], "scale": 1.0}])
    without, _ = generated(client)
    assert np.abs(with_lora - stock_picture(file)).max() <= 1.5 / 255
    assert np.abs(with_lora - without).max() > 0.05


def test_the_training_leaves_a_record_a_model_and_its_progress(client: ApiClient, trained: dict[str, Any]) -> None:
    assert (trained["step"], trained["total_steps"]) == (8, 8)
    assert trained["metrics"]["loss"] > 0
    assert trained["id"] in {process["id"] for process in client.processes(100)}
    models = client.call("lora")["models"]
    assert [model["trigger_word"] for model in models if model["process_id"] == trained["id"]] == ["zib"]


def test_the_runpod_client_runs_a_job_by_its_own_rules(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpod

    monkeypatch.setattr(runpod, "api_key", running.api_key)
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{running.url}/v2")
    endpoint = runpod.Endpoint("local")
    job = endpoint.run({"input": {"prompt": PROMPT, "num_inference_steps": 2, "width": 64, "height": 64, "wait": True}})
    output = job.output(timeout=120)
    assert job.status() == "COMPLETED"
    assert output["images"][0]["type"] == "redirect"
    assert endpoint.health()["jobs"]["completed"] >= 1
    assert endpoint.run_sync({"input": {"type": "health"}}, timeout=60)["status"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic cmF5bG9yYQ=="])
def test_without_the_key_every_route_but_liveness_is_closed(running: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    with httpx.Client(base_url=running.url, headers=headers) as http:
        assert http.get("/livez").status_code == 200
        for method, path in (
            ("GET", "/readyz"),
            ("POST", "/v2/local/run"),
            ("POST", "/v2/local/runsync"),
            ("GET", "/v2/local/health"),
            ("GET", "/v2/local/status/x"),
        ):
            reply = http.request(method, path, json={"input": {}} if method == "POST" else None)
            assert reply.status_code == 401, path
            assert {"error", "code"} & reply.json().keys()


def test_a_data_set_that_does_not_exist_is_named_before_anything_is_queued(client: ApiClient) -> None:
    before = [process["id"] for process in client.processes(100)]
    with pytest.raises(ApiError, match="no-such-set"):
        client.call("train", config=training_config(name="n", steps=1, dataset="no-such-set"))
    assert [process["id"] for process in client.processes(100)] == before


def test_a_corrupt_picture_is_named_and_nothing_of_the_upload_becomes_visible(client: ApiClient) -> None:
    good = (PICTURES / "zib_red_0.png").read_bytes()
    files = [
        {"filename": "good.png", "content": base64.b64encode(good).decode()},
        {"filename": "bad.png", "content": base64.b64encode(good[: len(good) // 2]).decode()},
    ]
    with pytest.raises(ApiError, match=r"bad\.png|files"):
        client.call("upload_training_data", training_name="broken", files=files)
    with pytest.raises(ApiError, match="broken"):
        client.call("train", config=training_config(name="n", steps=1, dataset="broken"))


def test_everything_wrong_in_a_configuration_is_said_at_once(client: ApiClient) -> None:
    config = training_config(name="n", steps=1)
    config["config"]["process"][0]["train"].update(steps=-1, lr="fast")
    config["config"]["process"][0]["network"]["type"] = "no-such-network"
    with pytest.raises(ApiError) as caught:
        client.call("train", config=config)
    for place in ("train.steps", "train.lr", "network.type"):
        assert place in str(caught.value)


def test_a_generation_with_an_unknown_lora_fails_by_name(client: ApiClient) -> None:
    with pytest.raises(ApiError, match="train_000000000000"):
        client.call("generate", prompt=PROMPT, loras=[{"id": "train_000000000000"}], wait=True)


def test_a_job_submitted_to_ray_is_the_same_training_with_the_same_record(
    running: Running, client: ApiClient, tmp_path: Path
) -> None:
    # Inside the working folder, which is all that travels to the job, and under a name that git ignores not.
    folder = tmp_path / "project"
    shutil.copytree(PICTURES, folder / "pictures")
    (folder / "train.yaml").write_text(json.dumps(training_config(name="submitted", steps=3, dataset="pictures")))
    driver = ("python", "-m", "train_jobs.run", "--config", "train.yaml")
    done = running.ray_job(*driver, options=("--working-dir", str(folder)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    process = next(iter(client.processes(1)))
    assert (process["status"], process["total_steps"]) == ("completed", 3)
    assert process["config"]["name"] == "submitted"
    assert client.call("download", process_id=process["id"])["size"] > 0


def test_the_command_line_prints_json_and_fails_with_a_status(running: Running, trained: dict[str, Any]) -> None:
    def raylora(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from serve_app.cli.main import main; main()", *arguments]
        return subprocess.run(
            command, env={**running.environment, **environment}, capture_output=True, text=True, timeout=120
        )

    listed = raylora("jobs", "--json")
    assert trained["id"] in {process["id"] for process in json.loads(listed.stdout)["processes"]}
    assert json.loads(raylora("doctor", "--json").stdout)["checks"]
    wrong = raylora("jobs", "--json", RAYLORA_API_KEY="wrong")
    assert (wrong.returncode, json.loads(wrong.stdout)["code"]) == (4, "unauthorized")
    missing = raylora("download", "train_000000000000")
    assert missing.returncode == 1
    assert "not found" in missing.stderr
    again = raylora("up")
    assert again.returncode == 1
    assert "already running" in again.stderr


def test_the_example_configuration_is_one_that_the_parser_takes_whole() -> None:
    from train_jobs.aitoolkit import parse_train_yaml

    parsed = parse_train_yaml(EXAMPLE.read_text())
    assert parsed.spec.train.steps > 0
