"""Specs from plain JSON, with everything that is wrong with it said at once."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.generate_spec import GenerateSpec
from train_jobs.spec import TrainSpec, check_model_name

S = TypeVar("S", TrainSpec, GenerateSpec)


def spec_from_json(kind: type[S], value: Mapping[str, Any], *, paths_allowed: bool = False) -> S:
    """Validate a plain JSON spec. Raises ConfigInvalid with every problem in it.

    `paths_allowed` is for the command line only: local dataset folders and a model's directory.
    """
    try:
        spec = kind.model_validate(dict(value))
    except ValidationError as invalid:
        raise ConfigInvalid(problems_of(invalid)) from None
    if isinstance(spec, TrainSpec) and not paths_allowed:
        models = {"model": spec.model} | ({"captioning.model": spec.captioning.model} if spec.captioning else {})
        reasons = {path: check_model_name(model, paths_allowed=False) for path, model in models.items()}
        problems = [Problem(path, reason, "invalid_value") for path, reason in reasons.items() if reason is not None]
        problems += [
            Problem(f"datasets[{i}].local_path", "is not accepted here; upload a dataset first", "not_allowed")
            for i, d in enumerate(spec.all_datasets)
            if d.local_path is not None
        ]
        if problems:
            raise ConfigInvalid(problems)
    return spec


def problems_of(invalid: ValidationError) -> list[Problem]:
    """pydantic's findings as problems; the offending values are not repeated.

    A collection counts as too short when one of its items is wrong; only the item is reported.
    """
    found = invalid.errors(include_url=False, include_context=False, include_input=False)
    places = [error["loc"] for error in found]
    return [
        Problem(format_path(tuple(error["loc"])), _sentence(error["msg"]), _code(error["type"]))
        for error in found
        if error["type"] != "too_short" or not any(_is_inside(place, error["loc"]) for place in places)
    ]


def _is_inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def format_path(loc: tuple[int | str, ...]) -> str:
    """`("datasets", 0, "repeats")` as `datasets[0].repeats`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _sentence(message: str) -> str:
    return message.removeprefix("Value error, ")


def _code(pydantic_type: str) -> str:
    return {"missing": "missing", "extra_forbidden": "unknown_key"}.get(pydantic_type, "invalid_value")
