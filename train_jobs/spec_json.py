"""Specs from plain JSON, with everything that is wrong with it said at once."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.field_problems import problems_of
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
        raise ConfigInvalid(problems_of(invalid, kind)) from None
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
