"""`raylora keys` against a server that remembers what it was asked."""

import io
import json
from datetime import datetime
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from serve_app.cli import main, operating
from serve_app.cli.client import ApiClient
from serve_app.cli.keys import print_keys

KEY = {"id": "key_1", "tenant": "ada", "name": "studio", "created_at": "2026-01-02T03:04:05Z", "revoked_at": None}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, Any]]:
    asked: list[tuple[str, str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path, json.loads(request.content or b"null")))
        if request.method == "GET":
            return httpx.Response(200, json={"items": [KEY]})
        if request.url.path.endswith("missing"):
            problem = {"title": "Not Found", "detail": "There is no such key.", "code": "key_not_found"}
            return httpx.Response(404, json=problem)
        return httpx.Response(200, json=KEY | ({"key": "rl_secret"} if request.method == "POST" else {}))

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(operating, "connect", lambda settings: ApiClient("http://test", "k", transport=transport))
    return asked


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main.app, ["keys", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_a_made_key_is_printed_whole(asked: list[tuple[str, str, Any]]) -> None:
    assert "rl_secret" in run("create", "studio", "--tenant", "ada")
    assert asked == [("POST", "/v1/keys", {"name": "studio", "tenant": "ada"})]


def test_without_a_tenant_the_servers_own_is_meant(asked: list[tuple[str, str, Any]]) -> None:
    assert json.loads(run("create", "studio", "--json"))["key"] == "rl_secret"
    assert asked == [("POST", "/v1/keys", {"name": "studio"})]


@pytest.mark.usefixtures("asked")
def test_keys_are_listed() -> None:
    assert json.loads(run("list", "--json")) == {"keys": [KEY]}
    assert "key_1" in run("list")


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120, 200])
def test_ids_and_times_are_whole_in_any_terminal(width: int) -> None:
    times = ("2026-01-02T03:04:05Z", "2026-02-03T04:05:06.789Z", "2026-03-04T05:06:07Z")
    listed = [
        {
            "id": f"key_{number:016x}", "tenant": "t" * 64, "name": "a key with a long name " * 4,
            "created_at": times[0], "last_used_at": times[1], "revoked_at": times[2] if number else None,
        }
        for number in range(2)
    ]  # fmt: skip
    console = Console(width=width, file=io.StringIO(), record=True)
    print_keys(console, listed)
    text = console.export_text()
    assert "…" not in text
    assert all(key["id"] in text for key in listed)
    shown = [datetime.fromisoformat(time).astimezone() for time in times]
    for at, count in zip(shown, (2, 2, 1), strict=True):
        assert text.count(at.strftime("%Y-%m-%d")) == text.count(at.strftime("%H:%M:%S")) == count
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_no_keys_are_an_empty_table(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_keys(console, [])
    assert "tenant" in console.export_text()


def test_a_key_is_revoked_by_its_id(asked: list[tuple[str, str, Any]]) -> None:
    assert json.loads(run("revoke", "key_1", "--json"))["id"] == "key_1"
    assert asked == [("DELETE", "/v1/keys/key_1", None)]


@pytest.mark.usefixtures("asked")
def test_a_key_that_is_not_there_is_a_failure_with_its_code() -> None:
    reply = json.loads(run("revoke", "missing", "--json", status=1))
    assert reply == {"error": "There is no such key.", "code": "key_not_found"}
