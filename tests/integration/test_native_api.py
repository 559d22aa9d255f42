"""The native REST surface, and the real clients of OpenAI and Hugging Face, over the running instance."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.integration.conftest import PICTURES
from tests.integration.instance import Running

PROMPT = "a large red star on a blue background"
DRAWN = {"width": 64, "height": 64, "num_inference_steps": 4, "seed": 5}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def http(running: Running) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    with httpx.Client(base_url=f"{running.url}/v1", headers=headers, timeout=120) as client:
        yield client


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def drawn(http: httpx.Client, **fields: Any) -> np.ndarray:
    reply = http.post("/generations", json={"prompt": PROMPT, **DRAWN, **fields}, params={"wait": 60})
    assert reply.status_code == 200, reply.text
    assert reply.json()["state"] == "COMPLETED", reply.text
    return pixels(httpx.get(reply.json()["images"][0]["url"]).content)


def events(http: httpx.Client, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with http.stream("GET", path) as reply:
        assert reply.status_code == 200
        name = ""
        for line in reply.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_openais_client_draws_by_url_and_in_the_body(running: Running, http: httpx.Client) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=running.api_key, max_retries=0)
    extra = {"seed": DRAWN["seed"], "steps": DRAWN["num_inference_steps"]}
    by_url = client.images.generate(prompt=PROMPT, model="tiny", size="64x64", n=2, extra_body=extra)  # type: ignore[call-overload]
    inline = client.images.generate(
        prompt=PROMPT, model="tiny", size="64x64", response_format="b64_json", extra_body=extra
    )  # type: ignore[call-overload]
    first = pixels(httpx.get(by_url.data[0].url).content)
    assert len(by_url.data) == 2
    # One level: where rounding to bytes meets the noise of batching two.
    assert np.abs(first - pixels(base64.b64decode(inline.data[0].b64_json))).max() <= 1
    assert np.abs(first - drawn(http)).max() <= 1
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, model="no-such-model")
    assert refused.value.code == "model_not_served"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).images.generate(prompt=PROMPT)


def test_hugging_faces_client_draws(running: Running, http: httpx.Client) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(model=f"{running.url}/v1/hf/tiny", token=running.api_key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = client.text_to_image(PROMPT, **DRAWN)
        with pytest.raises(HfHubHTTPError):
            InferenceClient(model=f"{running.url}/v1/hf/none", token=running.api_key).text_to_image(PROMPT)
    assert np.array_equal(np.asarray(image.convert("RGB")).astype(int), drawn(http))


def test_a_training_is_followed_by_its_events_and_its_adapter_is_used_and_brought_in_again(http: httpx.Client) -> None:
    files = [
        {"filename": path.name, "content": base64.b64encode(path.read_bytes()).decode()}
        for path in sorted(PICTURES.iterdir())
    ]
    stored = http.post("/datasets", json={"name": "native-zib", "trigger_word": "zib", "files": files})
    assert stored.status_code == 201, stored.text
    spec = {
        "name": "native",
        "model": "tiny",
        "datasets": [{"dataset": "native-zib", "resolutions_px": [64]}],
        "network": {"rank": 4},
        "train": {"steps": 3, "batch_size": 2, "learning_rate": 0.01},
    }
    once = {"Idempotency-Key": "native-training"}
    accepted = http.post("/trainings", json={"spec": spec}, headers=once)
    assert accepted.status_code == 202, accepted.text
    assert http.post("/trainings", json={"spec": spec}, headers=once).json() == accepted.json()
    training = accepted.json()["training"]["id"]
    told = list(events(http, f"/trainings/{training}/events"))
    assert [state["state"] for name, state in told if name == "state"][-2:] == ["RUNNING", "COMPLETED"]
    assert told[-1][1]["result"]["lora_id"] == training
    assert http.get(f"/trainings/{training}/loss").json()["complete"]
    assert [item["step"] for item in http.get(f"/trainings/{training}/checkpoints").json()["items"]] == [3]

    download = http.get(f"/loras/{training}/download").json()
    data = httpx.get(download["url"]).content
    asked = {"name": "again", "filename": "again.safetensors", "size_bytes": len(data), "sha256": download["sha256"]}
    started = http.post("/loras/import", json=asked).json()
    upload = started["upload"]
    httpx.request(upload["method"], upload["url"], headers=upload["headers"], content=data).raise_for_status()
    assert http.post(f"/loras/{started['id']}/finish").status_code == 201
    trained, imported = (drawn(http, loras=[{"id": name}]) for name in (training, started["id"]))
    assert np.array_equal(trained, imported)
    assert not np.array_equal(trained, drawn(http))
    assert http.delete(f"/loras/{training}").status_code == 204
    assert training not in {lora["id"] for lora in http.get("/loras").json()["items"]}
