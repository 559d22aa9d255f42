"""What a user reads: no stack trace for a mistake, and nothing cut that the next command needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli.main import app


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
