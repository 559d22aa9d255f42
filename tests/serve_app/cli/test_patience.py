"""A server that is away for a while ends no command that has work under way on it, and starts nothing twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.cli.client import ApiClient, ApiError, NotNow, Unreachable, WrongKey
from serve_app.cli.main import app
from serve_app.cli.patience import PATIENCE_S, Patience

UNAVAILABLE = {"error": "The dispatch service did not answer. Try again.", "error_type": "service_unavailable"}
JOBS_AWAY = {**UNAVAILABLE, "error_type": "jobs_unavailable", "retry_after_s": 1}
TRAINING = "train_0123456789ab"

Step = dict[str, Any] | httpx.Response | Exception


class ScriptedServer:
    """Answers with one step after the other, the last one for ever: a reply, JSON as one, or what the network does."""

    def __init__(self, *steps: Step) -> None:
        self.requests: list[httpx.Request] = []
        self.told: list[str] = []
        self.slept_s: list[float] = []
        self._steps = list(steps)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, Exception):
            raise step
        return httpx.Response(200, json=step) if isinstance(step, dict) else step

    def client(self, *, is_patient: bool = True) -> ApiClient:
        patience = Patience(self.told.append, sleep=self.slept_s.append) if is_patient else None
        return ApiClient("http://testserver", "key", patience=patience, transport=httpx.MockTransport(self))

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.requests]


def of_process(status: str, **fields: Any) -> dict[str, Any]:
    return {"id": "sync-1", "status": "COMPLETED", "output": {"id": TRAINING, "status": status, **fields}}


def failed(output: dict[str, Any]) -> dict[str, Any]:
    return {"id": "sync-1", "status": "FAILED", "error": output["error"], "output": output}


def refused() -> httpx.ConnectError:
    return httpx.ConnectError("refused")


def closed() -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError("closed")


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.Response(503, json=UNAVAILABLE, headers={"Retry-After": "1"}),
        httpx.Response(503, json=UNAVAILABLE),
        httpx.Response(502, text="<html>"),
        httpx.Response(504, json=UNAVAILABLE),
        httpx.Response(429, json={"error": "too fast", "error_type": "rate_limited"}, headers={"Retry-After": "1"}),
        closed(),
        httpx.ReadTimeout("silent"),
        refused(),
        failed(JOBS_AWAY),
        {"id": "sync-1", "status": "IN_PROGRESS"},
    ],
    ids=[
        "503",
        "503 without a time",
        "502",
        "504",
        "429",
        "closed",
        "silent",
        "refused",
        "failed job",
        "unfinished job",
    ],
)
def test_a_training_is_followed_through_what_passes_by_itself(trouble: Step) -> None:
    server = ScriptedServer(of_process("running"), trouble, trouble, of_process("running"), of_process("completed"))
    seen: list[str] = []
    with server.client() as client:
        process = client.follow(TRAINING, lambda process: seen.append(process["status"]), interval_s=0)
    assert process["status"] == "completed"
    assert seen == ["running", "running", "completed"]
    assert len(server.told) == 1
    assert "5 minutes" in server.told[0]


def test_the_server_is_not_asked_before_the_time_it_names() -> None:
    away = httpx.Response(503, json=UNAVAILABLE, headers={"Retry-After": "41"})
    server = ScriptedServer(away, of_process("completed"))
    with server.client() as client:
        client.follow(TRAINING, lambda _: None, interval_s=0)
    assert server.slept_s == [41.0]


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(refused(), Unreachable), (closed(), NotNow), (httpx.Response(503, json=UNAVAILABLE), NotNow)],
    ids=["refused", "closed", "503"],
)
def test_a_server_that_does_not_come_back_is_given_up(trouble: Step, error: type[Exception]) -> None:
    server = ScriptedServer(of_process("running"), trouble)
    with server.client() as client, pytest.raises(error):
        client.follow(TRAINING, lambda _: None, interval_s=0)
    assert PATIENCE_S / 2 < sum(server.slept_s) <= PATIENCE_S
    assert len(server.told) == 1


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (refused(), Unreachable),
        (httpx.Response(401, json={"error": "no"}), WrongKey),
        (httpx.Response(500, json={"error": "The request failed for an internal reason."}), ApiError),
        (of_process("not_found"), ApiError),
        (failed({"error": "no", "error_type": "invalid_request"}), ApiError),
    ],
    ids=["nothing there from the start", "key", "500", "unknown", "failed job"],
)
def test_what_does_not_pass_ends_at_once(trouble: Step, error: type[Exception]) -> None:
    server = ScriptedServer(trouble)
    with server.client() as client, pytest.raises(error):
        client.follow(TRAINING, lambda _: None)
    assert (len(server.requests), server.slept_s, server.told) == (1, [], [])


def test_a_start_is_repeated_under_one_key_until_it_is_heard_and_its_outcome_asked_for() -> None:
    server = ScriptedServer(
        closed(),
        httpx.Response(503, json=UNAVAILABLE),
        {"id": "job-u1", "status": "IN_QUEUE"},
        closed(),
        {"id": "job-u1", "status": "IN_PROGRESS"},
        {"id": "job-u1", "status": "COMPLETED", "output": {"process_id": TRAINING}},
    )
    with server.client() as client:
        assert client.start("train", config={})["process_id"] == TRAINING
    posts = [request for request in server.requests if request.method == "POST"]
    assert [request.url.path for request in posts] == ["/v2/local/run"] * 3
    assert len({request.content for request in posts}) == 1
    assert server.keys[0]
    assert server.keys[:3] == [server.keys[0]] * 3
    assert {request.url.path for request in server.requests[3:]} == {"/v2/local/status-sync/job-u1"}


def test_two_starts_have_two_keys() -> None:
    server = ScriptedServer({"id": "job-u1", "status": "COMPLETED", "output": {"process_id": TRAINING}})
    with server.client() as client:
        client.start("train", config={})
        client.start("train", config={})
    assert len(set(server.keys)) == 2


def test_a_start_that_has_failed_is_not_made_again() -> None:
    server = ScriptedServer({"id": "job-u1", "status": "IN_QUEUE"}, failed(JOBS_AWAY))
    with server.client() as client, pytest.raises(ApiError):
        client.start("train", config={})
    assert [request.method for request in server.requests] == ["POST", "GET"]


def test_a_start_of_which_nothing_is_heard_may_have_begun() -> None:
    server = ScriptedServer(closed())
    with server.client() as client, pytest.raises(NotNow) as caught:
        client.start("train", config={})
    assert "raylora jobs" in caught.value.__notes__[0]


def test_a_training_is_continued_once_however_often_it_is_asked_for() -> None:
    in_flight = {"title": "Conflict", "detail": "in progress", "code": "idempotency_in_flight"}
    server = ScriptedServer(
        closed(),
        httpx.Response(409, json=in_flight, headers={"Retry-After": "1"}),
        httpx.Response(202, json={"training": {"id": TRAINING}}),
    )
    with server.client() as client:
        assert client.continue_training("train_000000000000", 20) == {"id": TRAINING}
    assert server.keys[0]
    assert server.keys == [server.keys[0]] * 3


def test_an_upload_keeps_its_key_while_it_is_unheard_and_takes_another_where_it_has_failed() -> None:
    server = ScriptedServer(
        closed(), failed({"error": "full", "error_type": "x", "retry_after_s": 30}), of_process("x")
    )
    with server.client() as client:
        client.call("upload_training_data", training_name="cats", files=[])
    first, again, other = server.keys
    assert first
    assert (first == again, first == other) == (True, False)
    assert server.slept_s[1] >= 30


def test_a_key_is_made_once() -> None:
    server = ScriptedServer(httpx.Response(503, json=UNAVAILABLE))
    with server.client() as client, pytest.raises(ApiError):
        client.create_key("ci", None)
    assert len(server.requests) == 1


def test_a_client_without_patience_asks_once() -> None:
    server = ScriptedServer(httpx.Response(503, json=UNAVAILABLE, headers={"Retry-After": "1"}))
    with server.client(is_patient=False) as client, pytest.raises(NotNow, match="did not answer"):
        client.call("processes")
    assert len(server.requests) == 1


# --- the commands

ACCEPTED: list[Step] = [
    {"id": "c", "status": "COMPLETED", "output": {"accepted": True, "counts": {}, "keys": [], "run": {}, "needs": []}},
    {"id": "job-u1", "status": "COMPLETED", "output": {"process_id": TRAINING, "status": "starting"}},
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`raylora train` against a scripted server."""
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({"job": "extension", "config": {"name": "n", "process": [{"datasets": []}]}}))
    monkeypatch.setenv("RAYLORA_HOME", str(tmp_path))

    def run(*steps: Step, as_json: bool = True) -> Result:
        server = ScriptedServer(*ACCEPTED, *steps)
        monkeypatch.setattr(main, "connect", lambda settings, is_patient: server.client(is_patient=is_patient))
        return CliRunner().invoke(app, ["train", str(file), *(["--json"] if as_json else [])])

    return run


@pytest.mark.parametrize(("trouble", "status"), [(refused(), 3), (closed(), 1)], ids=["refused", "closed"])
def test_a_lost_server_leaves_the_id_and_the_way_to_look_again(
    command: Callable[..., Result], trouble: Step, status: int
) -> None:
    result = command(of_process("running"), trouble)
    assert result.exit_code == status, result.output
    said = json.loads(result.stdout)
    assert said["process_id"] == TRAINING
    assert f"{TRAINING} may go on. `raylora jobs` shows it" in said["error"]
    plain = command(of_process("running"), trouble, as_json=False)
    assert plain.exit_code == status
    assert f"{TRAINING} may go on. `raylora jobs` shows it" in " ".join(plain.stderr.split())


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_a_training_that_comes_to_nothing_is_one_object_with_its_reason(
    command: Callable[..., Result], outcome: str
) -> None:
    result = command(of_process(outcome, error="The loss became NaN."))
    assert result.exit_code == 1, result.output
    said = json.loads(result.stdout)
    assert (said["id"], said["status"], said["code"]) == (TRAINING, outcome, "job_failed")
    assert "The loss became NaN." in said["error"]


def test_an_interrupted_command_says_what_goes_on(command: Callable[..., Result]) -> None:
    class Interrupting(httpx.Response):
        def json(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    result = command(Interrupting(200))
    assert result.exit_code == 130, result.output
    assert json.loads(result.stdout)["process_id"] == TRAINING
