"""What a user reads: no stack trace for a mistake, and nothing cut that the next command needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.cli.client import ApiClient
from serve_app.cli.console import Failure
from serve_app.cli.main import app
from serve_app.stack.instance import Instance, InstanceState


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (None, "", "RAYLORA_MODELS is not valid JSON"),
        ("c.toml", 'port = "x\n', "c.toml is not valid TOML"),
        ("c.yaml", "a: [\n", "c.yaml is not valid YAML"),
        ("c.toml", "prot = 1\n", "RAYLORA_PROT"),
    ],
)
def test_a_broken_setting_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, text: str, said: str
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    if name is None:
        monkeypatch.setenv("RAYLORA_MODELS", '{"secret')
    else:
        (tmp_path / name).write_text(text)
        monkeypatch.setenv("RAYLORA_CONFIG", str(tmp_path / name))
    result = CliRunner().invoke(app, ["jobs"])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert "secret" not in result.output


@pytest.mark.parametrize("command", [["up"], ["doctor"]])
def test_an_s3_server_named_in_part_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAYLORA_S3_BUCKET", "mine")
    monkeypatch.setenv("RAYLORA_S3_SECRET_ACCESS_KEY", "a-secret")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "needs RAYLORA_S3_ACCESS_KEY_ID; the embedded" in said
    assert "RAYLORA_:" not in said
    assert "a-secret" not in result.output
    assert not (tmp_path / "home").exists()


def test_a_demo_whose_results_could_not_be_put_anywhere_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.cli.main.run_demo", lambda *_: pytest.fail("it was started"))
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "file" / "x")])
    assert result.exit_code == 2, result.output
    assert "cannot be made. Name another folder with -o." in " ".join(result.stderr.split())


def test_a_picture_that_could_not_be_put_anywhere_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    monkeypatch.setenv("RAYLORA_API_KEY", "rl_test")
    # Nothing listens there: had the server been asked, the status would be 3.
    monkeypatch.setenv("RAYLORA_PORT", "1")
    result = CliRunner().invoke(app, ["generate", "a cat", "-o", str(tmp_path / "none" / "x.png")])
    assert result.exit_code == 2, result.output
    assert "There is no folder" in result.stderr


def shown(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["download", "train_0123456789ab", "-o", "{}/none"], "There is no folder"),
        (["demo", "-o", "{}/file/x"], "Name another folder with -o"),
        (["demo", "-o", "{}/file"], "Name another folder with -o"),
    ],
    ids=["download", "demo", "demo into a file"],
)
def test_a_result_that_could_not_be_put_anywhere_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], said: str
) -> None:
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    monkeypatch.setenv("RAYLORA_API_KEY", "rl_test")
    monkeypatch.setenv("RAYLORA_PORT", "1")
    monkeypatch.setattr(main, "run_demo", None)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, [part.format(tmp_path) for part in command])
    assert result.exit_code == 2, result.output
    assert said in shown(result.stderr)


@pytest.mark.parametrize("host", ["http://example.com", "example.com:8000", "[::1]"])
def test_a_host_that_is_none_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("RAYLORA_HOST", host)
    result = CliRunner().invoke(app, ["jobs", "--json"])
    assert result.exit_code == 2, result.output
    assert "RAYLORA_HOST: must be a host's name or an IP address" in json.loads(result.stdout)["error"]


def test_a_home_that_cannot_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["jobs"])
    assert result.exit_code == 2, result.output
    assert "Set RAYLORA_HOME" in shown(result.stderr)


def answering(monkeypatch: pytest.MonkeyPatch, body: Any, status: int = 200) -> None:
    """Every command is answered like that."""
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=body))
    monkeypatch.setattr(main, "connect", lambda *_, **__: ApiClient("http://test", "k", transport=transport))


def test_a_path_is_said_as_it_is_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / ("x" * 100) / "a [red] cat.png"
    picture.parent.mkdir()
    image = {"url": "http://test/x", "seed": 7}
    answering(monkeypatch, {"id": "g-u1", "status": "COMPLETED", "output": {"images": [image]}})
    monkeypatch.setattr(ApiClient, "fetch", lambda *_: 1)
    result = CliRunner().invoke(app, ["generate", "a cat", "-o", str(picture)])
    assert result.stdout == f"{picture} (seed 7)\n", result.output


def test_an_error_that_is_no_object_is_none_of_this_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, ["nothing here"], 404)
    result = CliRunner().invoke(app, ["jobs", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "bad_reply")


@pytest.mark.parametrize("command", [["train", "{}/train.yaml"], ["continue", "train_000000000000"]])
def test_a_training_that_nobody_waits_for_has_its_id_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    new = "train_0123456789ab"
    monkeypatch.setattr(main, "prepare_training", lambda *_, **__: {})
    (tmp_path / "train.yaml").write_text("")
    both = {"id": "j-u1", "status": "COMPLETED", "output": {"process_id": new}, "training": {"id": new}}
    answering(monkeypatch, both)
    command = [part.format(tmp_path) for part in command]
    plain = CliRunner().invoke(app, [*command, "-d"])
    assert plain.stdout.startswith(new), plain.output
    result = CliRunner().invoke(app, [*command, "-d", "--json"])
    assert json.loads(result.stdout)["process_id"] == new


def test_a_configuration_that_is_refused_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.yaml").write_text("config: [1, 2\n")
    answering(monkeypatch, {})
    result = CliRunner().invoke(app, ["train", str(tmp_path / "train.yaml"), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "config_invalid")


def test_an_instance_that_ends_by_itself_adds_nothing_to_the_object_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(instance: Instance) -> None:
        raise Failure("stopped", f"The instance ended by itself. The log is {instance.log_file}.", 1)

    state = InstanceState(
        pid=os.getpid(), pid_created_at=0, phase="ready", stage="ready", http_url="http://h", dashboard_url="http://d"
    )
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    monkeypatch.setattr(main.control, "start", lambda *_, **__: state)
    monkeypatch.setattr(main, "_hold", ended)
    result = CliRunner().invoke(app, ["up", "--json"])
    assert result.exit_code == 1, result.output
    started = json.loads(result.stdout)
    assert (started["http_url"], Path(started["api_key_file"]).exists()) == ("http://h", True)
    assert "ended by itself" in shown(result.stderr)


def test_a_second_start_leaves_the_key_of_the_instance_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api-key").write_text("rl_first\n")
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))
    monkeypatch.setenv("RAYLORA_API_KEY", "rl_second_key_of_24_chars")
    monkeypatch.setattr(Instance, "supervisor", lambda _: psutil.Process())
    result = CliRunner().invoke(app, ["up", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["code"]) == (1, "already_running")
    assert (tmp_path / "api-key").read_text() == "rl_first\n"
