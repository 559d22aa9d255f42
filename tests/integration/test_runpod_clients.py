"""The clients that exist, on jobs that really train and generate: RunPod's for Python and JavaScript, and receivers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import threading
import unicodedata
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from serve_app.cli.client import ApiClient
from tests.integration.instance import REPOSITORY, Running, training_config

NODE = Path(__file__).parent / "node"
PICTURES = REPOSITORY / "examples" / "zib" / "images"
PICTURE = {"prompt": "a large red star", "num_inference_steps": 2, "width": 64, "height": 64}
LONG = {**PICTURE, "num_inference_steps": 400, "num_images": 4}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def runpod(running: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
    import runpod

    monkeypatch.setattr(runpod, "api_key", running.api_key)
    monkeypatch.setattr(runpod, "endpoint_url_base", f"{running.url}/v2")
    return runpod


def test_the_python_client_streams_the_steps_and_then_the_pictures(runpod: Any) -> None:
    job = runpod.Endpoint("local").run({**PICTURE, "num_inference_steps": 4, "wait": True, "stepz": 3})
    chunks = list(job.stream())
    steps = [chunk["step"] for chunk in chunks if chunk.get("stage") == "denoising"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4
    assert chunks[-1]["images"][0]["type"] == "redirect"
    assert job.output(timeout=30)["images"]
    assert job.output(timeout=30)["warnings"] == ["Unknown field 'stepz' was ignored"]


def test_the_python_client_cancels_work_and_purges_the_queue(runpod: Any, client: ApiClient) -> None:
    endpoint = runpod.Endpoint("local")
    jobs = [endpoint.run({**LONG, "seed": seed, "wait": True}) for seed in range(3)]
    assert endpoint.purge_queue()["status"] == "completed"
    for job in jobs:
        assert job.cancel()["status"] == "CANCELLED"
    ended = [client.follow(process["id"], lambda _: None) for process in client.processes(3)]
    assert [process["status"] for process in ended] == ["cancelled"] * 3


async def cancelled_after_a_preview(job: Any, seen: list[dict[str, Any]]) -> None:
    async for chunk in job.stream():
        seen.append(chunk)
        if any("preview" in earlier for earlier in seen):
            await job.cancel()


async def test_the_asyncio_client_follows_a_training_and_stops_it_between_two_steps(
    running: Running, runpod: Any, client: ApiClient, trained: dict[str, Any]
) -> None:
    import aiohttp

    config = training_config(name="stopped", steps=100_000, save_every=3)
    config["config"]["process"][0]["sample"].update(sample_every=3, sample_steps=2)
    seen: list[dict[str, Any]] = []
    async with aiohttp.ClientSession() as session:
        job = await runpod.AsyncioEndpoint("local", session).run({"type": "train", "config": config, "wait": True})
        # The client never ends the stream of a cancelled job by itself: the 404 after the last chunk does.
        with pytest.raises(KeyError):
            await cancelled_after_a_preview(job, seen)
        assert await job.status() == "CANCELLED"
    told = [chunk for chunk in seen if "loss" in chunk]
    assert [chunk["step"] for chunk in told] == sorted(chunk["step"] for chunk in told)
    previews = [chunk["preview"] for chunk in seen if "preview" in chunk]
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {running.api_key}"}) as http:
        kept = await http.get(f"{running.url}/v1/trainings/{seen[-1]['process_id']}/checkpoints")
    async with httpx.AsyncClient() as http:
        picture = await http.get(previews[0])
    assert picture.headers["content-type"].startswith("image/")
    process_id = seen[-1]["process_id"]
    assert (seen[-1]["status"], client.process(process_id)["status"]) == ("cancelled", "cancelled")
    assert kept.json()["items"]


def node_with_the_client() -> str:
    """Node's path, with the JavaScript client installed once and kept; skips where that cannot be done."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not here")
    if not (NODE / "node_modules" / "runpod-sdk").is_dir():
        command = [npm, "ci", "--no-audit", "--no-fund", "--omit=peer"]
        done = subprocess.run(command, cwd=NODE, capture_output=True, timeout=120)
        if done.returncode != 0:
            pytest.skip("the JavaScript client could not be installed")
    return node


def test_the_javascript_client_runs_waits_streams_cancels_and_purges(running: Running) -> None:
    node = node_with_the_client()
    environment = {**os.environ, "RAYLORA_TEST_URL": f"{running.url}/v2", "RAYLORA_TEST_KEY": running.api_key}
    done = subprocess.run([node, "client.mjs"], cwd=NODE, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    # The client itself writes to standard output too.
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["runSync"]["completed"], result["runSync"]["succeeded"]) == (True, True)
    assert result["runSync"]["id"].startswith("sync-")
    assert result["run"]["status"] == "IN_QUEUE"
    assert [chunk["step"] for chunk in result["stream"] if chunk.get("stage") == "denoising"][-1] == 4
    assert result["stream"][-1]["images"]
    assert result["status"]["succeeded"] is True
    assert set(result["health"]["jobs"]) == {"completed", "failed", "inProgress", "inQueue", "retried"}
    assert result["purge"]["status"] == "completed"
    assert {reply["status"] for reply in result["cancelled"]} == {"CANCELLED"}
    assert (result["pastFirstWait"]["completed"], result["pastFirstWait"]["status"]) == (True, "CANCELLED")


class Receiver(ThreadingHTTPServer):
    """Answers 500 to the first POST of each message and 200 to the next."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receive)
        self.arrived: list[tuple[dict[str, str], bytes]] = []
        self.changed = threading.Condition()

    def wait_for(self, number: int) -> list[tuple[dict[str, str], bytes]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.arrived) >= number, timeout=60)
            return list(self.arrived)


class _Receive(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.changed:
            again = any(headers["webhook-id"] == earlier["webhook-id"] for earlier, _ in self.server.arrived)
            self.server.arrived.append((headers, body))
            self.server.changed.notify_all()
        self.send_response(200 if again else 500)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_webhook_arrives_signed_and_again_where_the_receiver_failed(running: Running, receiver: Receiver) -> None:
    url = f"http://127.0.0.1:{receiver.server_address[1]}/hook"
    body = {"input": {**PICTURE, "wait": True}, "webhook": url}
    headers = {"Authorization": f"Bearer {running.api_key}"}
    job = httpx.post(f"{running.url}/v2/local/runsync", json=body, headers=headers, timeout=60).json()
    (first, sent), (second, again) = receiver.wait_for(2)
    assert first["webhook-id"] == second["webhook-id"]
    verifier = Webhook(httpx.get(f"{running.url}/v1/webhooks/secret", headers=headers).json()["secret"])
    for signed, content in ((first, sent), (second, again)):
        told = verifier.verify(content, signed)
        assert (told["id"], told["status"], told["input"]) == (job["id"], "COMPLETED", body["input"])
        assert httpx.get(told["output"]["images"][0]["url"]).status_code == 200


def zip_of_pictures(number: int) -> bytes:
    """As macOS makes it: all below one folder, names decomposed, and files of its own; one picture has a mask."""
    buffer = io.BytesIO()
    paths = sorted(PICTURES.glob("zib_*"))[: 2 * number]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, f"pictures/{unicodedata.normalize('NFD', 'é')}_{path.name}")
            archive.writestr(f"__MACOSX/pictures/._{path.name}", b"x")
        archive.write(paths[0], f"pictures/masks/é_{paths[0].name}")
        archive.writestr("pictures/README.md", b"x")
    return buffer.getvalue()


def test_a_zip_put_by_presigned_url_becomes_a_dataset(client: ApiClient) -> None:
    data = zip_of_pictures(3)
    name = unicodedata.normalize("NFD", "é.zip")
    file = {"filename": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    upload = client.call("create_upload", training_name="put", files=[file])
    [place] = upload["files"]
    assert httpx.put(place["url"], content=data, headers=place["headers"]).status_code == 200
    reply = client.call("finalize_upload", token=upload["token"])
    assert (reply["total_images"], reply["total_captions"], reply["total_masks"]) == (3, 3, 1)
    assert all(file["filename"].startswith("é_") for file in reply["uploaded_files"])
    assert [note for note in reply["warnings"] if "'pictures/README.md'" in note]
    assert "put" in client.call("list_dataset_folders")["folders"]
    again = client.call("finalize_upload", token=upload["token"])
    assert (again["upload_id"], again["warnings"]) == (reply["upload_id"], reply["warnings"])


def test_the_files_of_a_process_come_by_key_in_data_and_as_one_zip(client: ApiClient, trained: dict[str, Any]) -> None:
    files = client.call("list_files", path=f"processes/{trained['id']}")
    lora = files["lora_files"][0]
    url = client.call("download_by_key", s3_key=lora["s3_key"])["url"]
    assert len(httpx.get(url).content) == lora["size"]
    sample = client.call("download_file", file_path=files["image_files"][0]["path"])
    assert (sample["type"], sample["content_type"]) == ("file_data", "image/png")
    bundle = client.call("bulk_download", process_ids=[trained["id"]])
    with zipfile.ZipFile(io.BytesIO(httpx.get(bundle["zip_url"]).content)) as archive:
        assert f"{trained['id']}/{lora['filename']}" in archive.namelist()
        assert archive.testzip() is None
