"""What clients read about a wrong request: our words, on every surface."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.ingress.native.bodies import REGISTERED
from serve_app.ingress.openai_images import SIZE
from serve_app.job_types.bulk import BulkDownload, DeleteResults
from serve_app.testing import LocalServer
from serve_app.validation.payloads import CreateUploadPayload, GeneratePayload, UploadPayload
from train_jobs.field_problems import pattern_words

PARSERS_WORDS = re.compile(
    r"[Ii]nput should|Extra inputs|Field required|should (have|match)|Value error|unable to parse"
)


LORA_ID = "must be 1 to 200 characters: letters, digits, . _ - (the first: letters, digits)"


def runpod(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v2/ep/runsync", {"input": fields}


@pytest.mark.parametrize(
    ("call", "path", "message"),
    [
        (runpod(prompt="x", width="wide"), "width", "must be a whole number between 16 and 4096"),
        (runpod(prompt="x", width=1), "width", "must be a whole number between 16 and 4096"),
        (runpod(prompt="x", wait="soon"), "wait", "must be true or false"),
        (runpod(type="train", config=5), "config", "must be text or a mapping"),
        (runpod(type="processes", limit="all"), "limit", "must be a whole number between 1 and 200"),
        (runpod(type="process_status"), "process_id", "is missing"),
        (
            runpod(type="upload_training_data", training_name="cats", files=[]),
            "files",
            "must be a list of 1 to 100 items",
        ),
        (("/v2/ep/run", {"input": 5}), "input", "must be a mapping"),
        (
            ("/v2/ep/run", {"input": {}, "policy": {"ttl": 1}}),
            "policy.ttl",
            "must be a whole number between 5000 and 604800000",
        ),
        (("/v1/generations", {"prompt": "x", "n": 2}), "n", "is not a field known here"),
        (("/v1/generations", {"prompt": " "}), "prompt", "must not be blank"),
        (runpod(prompt="x", lora="no id!"), "lora.id", LORA_ID),
        (runpod(prompt="x", loras=[{"path": "a"}, {"id": "no id!"}]), "loras[1].id", LORA_ID),
        (("/v1/trainings", {"config": 5}), "config", "must be text or a mapping"),
        (("/v1/generations?wait=61", {"prompt": "x"}), "wait", "must be a number between 0 and 60"),
        (("/v1/generations?wait=soon", {"prompt": "x"}), "wait", "must be a number between 0 and 60"),
    ],
)
async def test_a_wrong_request_is_told_in_plain_words(
    server: LocalServer, call: tuple[str, dict[str, Any]], path: str, message: str
) -> None:
    url, body = call
    async with server.client() as http:
        reply = await http.post(url, json=body)
    told = reply.json()
    problems = told.get("output", told)["validation_errors"]
    assert (problems[0]["path"], problems[0]["message"]) == (path, message)
    assert len(problems) == 1
    assert not PARSERS_WORDS.search(reply.text)


async def test_an_image_size_of_openais_schema_is_told_by_an_example(server: LocalServer) -> None:
    async with server.client() as http:
        reply = await http.post("/v1/images/generations", json={"prompt": "x", "size": "large"})
    assert "size: must be like 1024x1024 or auto" in reply.text


@pytest.mark.parametrize("query", ["limit=0", "limit=many", "limit=201"])
async def test_a_parameter_of_the_query_is_told_with_its_bounds(server: LocalServer, query: str) -> None:
    async with server.client() as http:
        reply = await http.get(f"/v1/trainings?{query}&state=DONE")
    assert [(p["path"], p["message"], p["code"]) for p in reply.json()["validation_errors"]] == [
        (
            "state",
            "must be one of QUEUED, STARTING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMED_OUT",
            "invalid_value",
        ),
        ("limit", "must be a whole number between 1 and 200", "invalid_value"),
    ]


@pytest.mark.parametrize("path", ["/v1/trainings", "/v1/generations", "/v1/loras"])
async def test_a_parameter_that_a_route_does_not_have_is_told_and_not_ignored(server: LocalServer, path: str) -> None:
    async with server.client() as http:
        reply = await http.get(f"{path}?limt=5&limit=5&limt=6&{'x' * 500}=1")
    assert reply.status_code == 400
    [misspelt, foreign] = reply.json()["validation_errors"]
    assert misspelt == {
        "path": "limt",
        "message": "is not a field known here; did you mean 'limit'?",
        "code": "unknown_key",
    }
    assert len(foreign["path"]) < 500


def _patterns(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        for value in schema.values():
            yield from _patterns(value)
    if isinstance(schema, list):
        for item in schema:
            yield from _patterns(item)


def test_every_pattern_that_a_body_is_checked_with_has_words(server: LocalServer) -> None:
    kinds = [*REGISTERED, GeneratePayload, UploadPayload, CreateUploadPayload, BulkDownload, DeleteResults]
    patterns = {pattern for kind in kinds for pattern in _patterns(kind.model_json_schema())}
    assert len(patterns) > 15
    # Endings of files are only told in the document: the files are checked elsewhere. A size is told by its examples.
    told = [pattern for pattern in patterns if not pattern.startswith(r"\.(") and pattern != SIZE]
    assert [pattern for pattern in told if "the pattern" in pattern_words(pattern)] == []
