"""What the OpenAPI document shows as an example is taken, and every job type is described."""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from serve_app.job_types import HANDLERS
from serve_app.testing import LocalServer

# What names something that is not there; everything else about such an example was found right.
OF_ABSENT = frozenset(
    {"lora_not_usable", "process_not_found", "process_not_cancellable", "upload_not_found", "object_not_found"}
)


async def described(server: LocalServer) -> dict[str, Any]:
    async with server.client(key=None) as http:
        document: dict[str, Any] = (await http.get("/openapi.json")).json()
    return document


def posted(document: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """The paths whose bodies have examples, with these."""
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        if body is not None and "{training_id}" not in path:
            name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
            yield path, document["components"]["schemas"][name]["examples"]


def variants(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas of `input`."""
    schemas = document["components"]["schemas"]
    choices = schemas["RunpodRun"]["properties"]["input"]["anyOf"]
    return [schemas[choice["$ref"].rsplit("/", 1)[-1]] for choice in choices]


async def test_each_example_that_can_be_posted_is_taken(server: LocalServer) -> None:
    document = await described(server)
    found = list(posted(document))
    # The data set is there before the training that reads it.
    found.sort(key=lambda one: one[0] != "/v1/datasets")
    assert len(found) >= 8
    async with server.client(timeout=30) as http:
        for path, examples in found:
            for example in examples:
                # These have the bodies of others, and wait for pictures that nobody draws here.
                if path.endswith("/runsync") or path.startswith(("/v1/images/", "/v1/hf/")):
                    continue
                reply = await http.post(path.replace("{endpoint_id}", "ep"), json=example)
                code = reply.json().get("code")
                assert reply.status_code < 300 or code in OF_ABSENT, (path, reply.text)
                if path.endswith("/run"):
                    status = (await http.get(f"/v2/ep/status/{reply.json()['id']}")).json()
                    error = (status.get("output") or {}).get("error_type")
                    assert status["status"] != "FAILED" or error in OF_ABSENT, (example, status)


async def test_every_job_type_is_described_with_its_fields_and_an_example(server: LocalServer) -> None:
    document = await described(server)
    named = [name for schema in variants(document) for name in schema["properties"]["type"]["enum"]]
    assert set(named) == HANDLERS.keys()
    for schema in variants(document):
        validator = Draft202012Validator({**schema, "components": document["components"]})
        for example in schema["examples"]:
            validator.validate(example)
            validator.validate({**example, "a_field_of_the_clients_own": 1})
            assert example.keys() <= schema["properties"].keys()


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        ({"prompt": "a star"}, True),
        ({"prompt": "a star", "loras": ["train_0123456789ab", {"id": "x", "scale": 0.5}], "seed": -1}, True),
        ({"type": "generate", "prompt": "a star", "output_format": "jpeg"}, True),
        ({"type": "generate", "prompt": "a star", "width": 5}, False),
        ({"type": "generate"}, False),
        ({"type": "train"}, False),
        ({"type": "train_with_yaml", "yaml_config": "job: extension"}, True),
        ({"type": "delete_results", "result_type": "all"}, False),
        ({"type": "bulk_download", "process_ids": []}, False),
        ({"type": "nonsense"}, False),
        ({}, False),
    ],
)
async def test_the_description_of_an_input_tells_what_is_taken(
    server: LocalServer, given: dict[str, Any], fits: bool
) -> None:
    document = await described(server)
    schema = document["components"]["schemas"]["RunpodRun"]["properties"]["input"]
    validator = Draft202012Validator({**schema, "components": document["components"]})
    assert validator.is_valid(given) is fits
