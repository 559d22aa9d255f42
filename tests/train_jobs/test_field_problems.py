"""Findings of the parser as sentences that say what to change."""

from typing import Any

import pytest
from pydantic import ValidationError

from train_jobs.errors import Problem
from train_jobs.field_problems import problems_in, problems_of
from train_jobs.generate_spec import GenerateSpec
from train_jobs.spec import TrainSpec

VALID = {"name": "n", "model": "tiny", "datasets": [{"dataset": "cats"}]}


def found(**fields: Any) -> list[Problem]:
    with pytest.raises(ValidationError) as invalid:
        TrainSpec.model_validate(VALID | fields)
    return problems_of(invalid.value, TrainSpec)


@pytest.mark.parametrize(
    ("fields", "path", "message"),
    [
        ({"train": {"batch_size": "many"}}, "train.batch_size", "must be a whole number between 1 and 256"),
        ({"train": {"batch_size": 0}}, "train.batch_size", "must be a whole number between 1 and 256"),
        ({"train": {"batch_size": 1.5}}, "train.batch_size", "must be a whole number between 1 and 256"),
        ({"train": {"seed": -1}}, "train.seed", f"must be a whole number between 0 and {2**63 - 1}"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate", "must be a number above 0 and at most 10"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "must be a number above 0 and at most 10"),
        ({"network": {"dropout": 1}}, "network.dropout", "must be a number of at least 0 and below 1"),
        ({"train": {"dtype": "fp8"}}, "train.dtype", "must be one of bf16, fp32"),
        ({"sample": {"at_start": "maybe"}}, "sample.at_start", "must be true or false"),
        ({"network": 5}, "network", "must be a mapping"),
        ({"datasets": []}, "datasets", "must be a list of 1 to 32 items"),
        ({"datasets": 5}, "datasets", "must be a list of 1 to 32 items"),
        ({"trigger_word": "x" * 101}, "trigger_word", "must be text of at most 100 characters"),
        ({"trigger_word": 5}, "trigger_word", "must be text of at most 100 characters"),
        (
            {"datasets": [{"dataset": "/"}]},
            "datasets[0].dataset",
            "must be 1 to 150 characters: letters, digits, . _ -, and not . or ..",
        ),
        ({"family": "SD"}, "family", "must be 1 to 40 characters: lower-case letters, digits, _"),
        ({"network": {"pretrained": "x"}}, "network.pretrained", "must end in .safetensors"),
        ({"network": {"lokr_factor": 0}}, "network.lokr_factor", "must be -1 or at least 1"),
        ({"workers": {"min": 3, "max": 2}}, "workers", "min must not be above max"),
    ],
)
def test_a_message_says_what_the_field_must_be(fields: dict[str, Any], path: str, message: str):
    assert found(**fields) == [Problem(path, message, "invalid_value")]


def test_missing_and_unknown_fields_have_codes_of_their_own():
    assert found(datasets=[{"dataset": "cats"}], train={"stepz": 5}, sample={"previews": [{}]}) == [
        Problem("train.stepz", "is not a field known here; did you mean 'steps'?", "unknown_key"),
        Problem("sample.previews[0].prompt", "is missing", "missing"),
    ]
    assert found(zzzzzzzz=1) == [Problem("zzzzzzzz", "is not a field known here", "unknown_key")]
    assert [problem.path for problem in found(**{"z" * 500: 1})] == ["z" * 100]


def test_a_wrong_item_does_not_make_its_list_too_short():
    assert [problem.path for problem in found(datasets=[{"dataset": "/"}])] == ["datasets[0].dataset"]


def test_no_message_repeats_what_was_sent():
    secret = "hunter2-hunter2"
    wrong = {
        "name": f"/{secret}",
        "model": [secret],
        "datasets": [{"dataset": f"/{secret}", "repeats": secret, "flip_x": secret}],
        "train": secret,
        "save": {"dtype": secret},
    }
    problems = found(**wrong)
    assert len(problems) == 7
    assert not [problem for problem in problems if secret in problem.message]


def test_a_kind_that_is_not_known_has_words_of_ours():
    raw = {"type": "url_parsing", "loc": ("address",), "msg": "Input should be a valid URL, /secret", "ctx": {}}
    [problem] = problems_in([raw], {})
    assert problem == Problem("address", "has a value that is not accepted here", "invalid_value")


def test_the_rule_of_a_whole_is_passed_on():
    with pytest.raises(ValidationError) as invalid:
        GenerateSpec.model_validate({"prompts": ["a"] * 2, "num_images": 64})
    assert problems_of(invalid.value, GenerateSpec) == [
        Problem("", "prompts times num_images may be at most 64", "invalid_value")
    ]
