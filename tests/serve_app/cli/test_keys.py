"""`raylora keys` against a server that remembers what it was asked."""

import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.cli import main, operating
from serve_app.cli.client import ApiClient

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


def test_a_key_is_revoked_by_its_id(asked: list[tuple[str, str, Any]]) -> None:
    assert json.loads(run("revoke", "key_1", "--json"))["id"] == "key_1"
    assert asked == [("DELETE", "/v1/keys/key_1", None)]


@pytest.mark.usefixtures("asked")
def test_a_key_that_is_not_there_is_a_failure_with_its_code() -> None:
    reply = json.loads(run("revoke", "missing", "--json", status=1))
    assert reply == {"error": "There is no such key.", "code": "key_not_found"}
