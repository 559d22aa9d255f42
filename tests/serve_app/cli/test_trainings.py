"""A configuration's local data sets are found, uploaded in batches, and named in what the server gets."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import trainings
from serve_app.cli.client import ApiClient, ApiError, Unreachable, WrongKey
from serve_app.cli.main import app


class RecordingServer:
    """Answers /runsync like the server does and keeps what was asked. `keys`: what a check finds; `datasets`: what is
    stored."""

    def __init__(self, keys: list[dict[str, str]] | None = None, datasets: tuple[str, ...] = ()) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.checked: list[dict[str, Any]] = []
        self._keys = keys or []
        self._datasets = datasets

    def __call__(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["input"]
        if not asked.get("check"):
            self.inputs.append(asked)
            return self._completed({"ok": True})
        self.checked.append(asked)
        processes = asked["config"]["config"]["process"]
        names = [dataset["folder_path"] for dataset in processes[0]["datasets"]]
        there = {*self._datasets, *asked["uploads"]}
        needs = [{"path": f"datasets[{i}]", "dataset": name, "found": name in there} for i, name in enumerate(names)]
        missing = [{"path": n["path"], "verdict": "invalid", "note": "no"} for n in needs if not n["found"]]
        keys = [*self._keys, *missing]
        return self._completed({"accepted": not keys, "counts": {}, "keys": keys, "run": {}, "needs": needs})

    def _completed(self, output: dict[str, Any]) -> httpx.Response:
        return httpx.Response(200, json={"id": "sync-1", "status": "COMPLETED", "output": output})


def client_of(handler: Callable[[httpx.Request], httpx.Response]) -> ApiClient:
    return ApiClient("http://testserver", "key", transport=httpx.MockTransport(handler))


def write_config(folder: Path, folder_path: str) -> Path:
    file = folder / "train.yaml"
    file.write_text(
        yaml.safe_dump(
            {"job": "extension", "config": {"name": "n", "process": [{"datasets": [{"folder_path": folder_path}]}]}}
        )
    )
    return file


def test_a_folder_beside_the_configuration_is_uploaded_and_replaced_by_its_name(tmp_path: Path) -> None:
    images = tmp_path / "pets" / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(b"png")
    (images / "a.txt").write_text("a cat")
    (images / "notes.md").write_text("left out")
    server = RecordingServer()
    with client_of(server) as client:
        body = trainings.prepare_training(client, write_config(tmp_path, "pets/images"), on_upload=lambda _: None)
    assert body["config"]["process"][0]["datasets"][0]["folder_path"] == "pets-images"
    assert server.inputs[0]["dataset_folder"] == "pets-images"
    sent = {f["filename"]: base64.b64decode(f["content"]) for f in server.inputs[0]["files"]}
    assert sent == {"a.png": b"png", "a.txt": b"a cat"}


def test_a_name_that_is_no_local_folder_is_left_for_the_server(tmp_path: Path) -> None:
    server = RecordingServer(datasets=("uploaded-before",))
    with client_of(server) as client:
        body = trainings.prepare_training(client, write_config(tmp_path, "uploaded-before"), on_upload=lambda _: None)
    assert body["config"]["process"][0]["datasets"][0]["folder_path"] == "uploaded-before"
    assert server.inputs == []


def test_a_large_folder_goes_in_batches_that_keep_a_picture_with_its_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "UPLOAD_BATCH_BYTES", 25)
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(b"0123456789")
        (tmp_path / f"{index}.txt").write_text("x")
    server = RecordingServer()
    with client_of(server) as client:
        trainings.upload_folder(client, tmp_path, "d", on_upload=lambda _: None)
    batches = [[f["filename"] for f in request["files"]] for request in server.inputs]
    assert batches == [["0.png", "0.txt", "1.png", "1.txt"], ["2.png", "2.txt", "3.png", "3.txt"], ["4.png", "4.txt"]]
    assert [request["cleanup_existing"] for request in server.inputs] == [True, False, False]


def test_a_folder_without_pictures_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    server = RecordingServer()
    with client_of(server) as client, pytest.raises(ApiError, match="no pictures"):
        trainings.upload_folder(client, tmp_path, "d", on_upload=lambda _: None)
    assert server.inputs == []


def test_a_yaml_error_says_where(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("config: [1, 2\njob: x")
    with client_of(RecordingServer()) as client, pytest.raises(ApiError, match="line 2"):
        trainings.prepare_training(client, file, on_upload=lambda _: None)


def test_a_refused_key_and_a_silent_server_are_different_errors() -> None:
    def refused(_: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"error": "no"})

    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client_of(refused) as client, pytest.raises(WrongKey, match="RAYLORA_API_KEY"):
        client.call("health")
    with client_of(silent) as client, pytest.raises(Unreachable, match="raylora up"):
        client.call("health")


def test_what_validation_found_is_shown_line_by_line() -> None:
    def failed(_: httpx.Request) -> httpx.Response:
        problems = [{"path": "files[0]", "message": "not a picture", "code": "image_unreadable"}]
        return httpx.Response(
            200,
            json={
                "id": "x",
                "status": "FAILED",
                "error": "Invalid request: 1 problem",
                "output": {"error_type": "validation", "validation_errors": problems},
            },
        )

    with client_of(failed) as client, pytest.raises(ApiError) as caught:
        client.call("upload_training_data")
    assert str(caught.value) == "Invalid request: 1 problem\n  files[0]: not a picture"
    assert caught.value.code == "validation"


@pytest.mark.parametrize(("change", "status"), [("", 0), ("do_cfg: true", 2)])
def test_a_config_is_checked_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, status: int
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    file = tmp_path / "train.yaml"
    file.write_text(
        "job: extension\nconfig: {name: n, process: [{type: sd_trainer, network: {type: lora},"
        " model: {name_or_path: m}, datasets: [{folder_path: /data/x}], train: {steps: 5, " + change + "}}]}"
    )
    result = CliRunner().invoke(app, ["train", str(file), "--check", "--json"])
    assert result.exit_code == status, result.output
    assert json.loads(result.stdout)["accepted"] == (status == 0)
    assert "No API key" in json.loads(result.stdout)["unchecked"]
    plain = CliRunner().invoke(app, ["train", str(file), "--check"])
    assert "honoured  config.process[0].train.steps" in plain.stdout
    assert "not checked: the server's models, data sets and limits. No API key" in plain.stderr


def test_folders_that_have_one_name_are_data_sets_of_their_own(tmp_path: Path) -> None:
    folders = [tmp_path / above / "cats" / "images" for above in ("mine", "yours")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / f"{number}.png").write_bytes(b"png")
    datasets = [{"folder_path": str(folder)} for folder in (*folders, folders[0])]
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "n", "process": [{"datasets": datasets}]}}))
    server = RecordingServer()
    with client_of(server) as client:
        body = trainings.prepare_training(client, file, on_upload=lambda _: None)
    first, second, again = [d["folder_path"] for d in body["config"]["process"][0]["datasets"]]
    assert (first == again, first == second) == (True, False)
    sent = {request["dataset_folder"]: [f["filename"] for f in request["files"]] for request in server.inputs}
    assert sent == {first: ["0.png"], second: ["1.png"]}


def test_masks_and_validation_pictures_beside_the_configuration_are_uploaded_too(tmp_path: Path) -> None:
    for name in ("images", "masks", "held"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "a.png").write_bytes(b"png")
    process = {
        "datasets": [{"dataset_path": "pets/images", "mask_path": "pets/masks"}],
        "validation": {"folder_path": "pets/held"},
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "n", "process": [process]}}))
    server = RecordingServer()
    with client_of(server) as client:
        body = trainings.prepare_training(client, file, on_upload=lambda _: None)
    sent = body["config"]["process"][0]
    assert sent["datasets"] == [{"folder_path": "pets-images", "mask_path": "pets-masks"}]
    assert sent["validation"] == {"folder_path": "pets-held"}
    assert {request["dataset_folder"] for request in server.inputs} == {"pets-images", "pets-masks", "pets-held"}


def test_a_name_that_is_neither_a_folder_nor_a_data_set_is_refused(tmp_path: Path) -> None:
    server = RecordingServer()
    with client_of(server) as client, pytest.raises(ApiError, match="'nowhere' is neither a folder here"):
        trainings.prepare_training(client, write_config(tmp_path, "nowhere"), on_upload=lambda _: None)
    assert server.inputs == []


def test_a_configuration_that_the_server_refuses_is_not_uploaded_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"png")
    server = RecordingServer(keys=[{"path": "model", "verdict": "refused", "note": "'x' is not served here"}])
    with client_of(server) as client, pytest.raises(ApiError, match="model: 'x' is not served here"):
        trainings.prepare_training(client, write_config(tmp_path, "images"), on_upload=lambda _: None)
    assert server.inputs == []


def test_a_check_asks_the_server_where_one_answers_and_uploads_nothing(tmp_path: Path) -> None:
    (tmp_path / "pets" / "images").mkdir(parents=True)
    server = RecordingServer(keys=[{"path": "model", "verdict": "refused", "note": "'x' is not served here"}])
    report = trainings.check_training(write_config(tmp_path, "pets/images"), lambda: client_of(server))
    assert (report.unchecked, report.found["accepted"]) == (None, False)
    assert server.checked[0]["config"]["config"]["process"][0]["datasets"] == [{"folder_path": "pets-images"}]
    assert server.inputs == []


def test_local_masks_are_no_fault_in_a_check_without_a_server(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    file = tmp_path / "train.yaml"
    process = {
        "type": "sd_trainer", "network": {"type": "lora"}, "model": {"name_or_path": "m"}, "train": {"steps": 5},
        "datasets": [{"folder_path": "images", "mask_path": "masks"}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "n", "process": [process]}}))

    def silent() -> ApiClient:
        raise Unreachable("http://testserver")

    report = trainings.check_training(file, silent)
    assert report.found["accepted"], report.found["keys"]


def test_names_that_the_server_does_not_take_are_made_plain_and_stay_apart(tmp_path: Path) -> None:
    for stem in ("a #1", "a _1", "cafe\u0301", "\U0001f525"):
        (tmp_path / f"{stem}.png").write_bytes(b"png")
        (tmp_path / f"{stem}.txt").write_text(stem)
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    server = RecordingServer()
    with client_of(server) as client:
        trainings.upload_folder(client, tmp_path, "d", on_upload=lambda _: None)
    sent = {f["filename"]: base64.b64decode(f["content"]).decode() for f in server.inputs[0]["files"]}
    captions = {name: text for name, text in sent.items() if name.endswith(".txt")}
    assert captions == {
        "a _1.txt": "a _1", "a _1_2.txt": "a #1", "caf\xe9.txt": "cafe\u0301", "_.txt": "\U0001f525"
    }  # fmt: skip
    assert sent.keys() == {name.removesuffix(".txt") + end for name in captions for end in (".txt", ".png")}


def test_masks_and_pictures_in_subfolders_are_uploaded_too(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "a_mask.png", "a.txt", "sub/b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    server = RecordingServer()
    with client_of(server) as client:
        trainings.upload_folder(client, tmp_path, "d", on_upload=lambda _: None)
    assert [f["filename"] for f in server.inputs[0]["files"]] == ["a.png", "a.txt", "a_mask.png", "sub_b.jpg"]


def test_a_list_of_problems_is_not_shown_twice() -> None:
    def refused(_: httpx.Request) -> httpx.Response:
        problems = [{"path": "width", "message": "is too small"}, {"path": "seed", "message": "is missing"}]
        return httpx.Response(
            400, json={"error": "Invalid request: width: is too small; seed: is missing", "validation_errors": problems}
        )

    with client_of(refused) as client, pytest.raises(ApiError) as caught:
        client.call("generate")
    assert str(caught.value) == "Invalid request:\n  width: is too small\n  seed: is missing"
