"""Checks requests: plain and synchronous, for a worker thread. Reports every problem of a request at once."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serve_app.collaborators import GenerationPlan, TrainingPlan
from serve_app.errors import InvalidRequest, ModelNotServed
from serve_app.settings import TRAINING_WORKERS_MAX
from serve_app.validation.payloads import GeneratePayload
from train_jobs.aitoolkit import parse_generate_yaml, parse_train_yaml
from train_jobs.config_check import check_train_yaml, describe_run, not_accepted, tracking_problem
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.field_problems import problems_of
from train_jobs.generate_spec import GenerateSpec
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json

FOUND_OUT_LATER = ("network.pretrained",)
IN_YAML = {"wandb": "config.process[0].logging.use_wandb", "workers": "config.process[0].workers"}
IN_JSON = {"wandb": "spec.wandb", "workers": "spec.workers.max"}
MIB = 1024 * 1024
CONFIG_BYTES_MAX = 10 * MIB
SEED_LIMIT = 2**32
UNKNOWN_NAMED_MAX = 50
BESIDE_CONFIG = frozenset({"type", "wait", "config", "yaml_config"})
OF_PICTURES = ("init_image", "mask", "strength")
# Fields of the prompt form that are fields of GenerateSpec by the same name.
SPEC_FIELDS = (
    "negative_prompt",
    "model",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
    "scheduler",
    "first_block_cache",
    "output_format",
)

P = TypeVar("P", bound=BaseModel)


class Validator:
    """`models`: the aliases that this installation serves. `has_wandb_key`: whether it can log in at W&B.
    `workers_max`: how many workers a training may ask for."""

    def __init__(
        self,
        models: Collection[str],
        default_model: str,
        random_seed: Callable[[], int] = lambda: secrets.randbelow(SEED_LIMIT),
        *,
        has_wandb_key: bool = False,
        workers_max: int = TRAINING_WORKERS_MAX,
    ) -> None:
        self._workers_max = workers_max
        self._has_wandb_key = has_wandb_key
        self._models = frozenset(models)
        self._default_model = default_model
        self._random_seed = random_seed

    def training(self, config: str | dict[str, Any]) -> TrainingPlan:
        """Raises ConfigInvalid, ModelNotServed, InvalidRequest (size)."""
        _check_config_size(config)
        parsed = parse_train_yaml(config)
        self._check_model(parsed.spec.model)
        self._check_bounds(parsed.spec, IN_YAML)
        return TrainingPlan(
            spec=parsed.spec.model_dump(mode="json"),
            ignored=tuple(item.path for item in parsed.ignored),
            warnings=tuple(f"{warning.path}: {warning.message}" for warning in parsed.warnings),
            places={name: parsed.origin[name] for name in FOUND_OUT_LATER if name in parsed.origin},
        )

    def training_check(self, config: str | dict[str, Any]) -> dict[str, Any]:
        """What each key would do; a model that is not served here is an invalid key. Raises InvalidRequest (size)."""
        _check_config_size(config)
        report = check_train_yaml(config).as_json()
        for need in report["needs"]:
            if "model" in need and need["model"] not in self._models:
                served = ", ".join(sorted(self._models))
                note = f"'{need['model']}' is not served here; served: {served}"
                report = not_accepted(report, need["path"], "refused", note)
        for problem in self._beyond_bounds(report["run"] or {}, IN_YAML):
            report = not_accepted(report, problem.path, "refused", problem.message)
        return report

    def training_spec(self, spec: dict[str, Any]) -> TrainingPlan:
        """A TrainSpec as JSON, without anything of the server's own disk. Raises ConfigInvalid, by the paths of a body
        whose `spec` it is, ModelNotServed."""
        try:
            checked = spec_from_json(TrainSpec, spec)
        except ConfigInvalid as invalid:
            raise ConfigInvalid(replace(p, path=f"spec.{p.path}".rstrip(".")) for p in invalid.problems) from None
        self._check_model(checked.model)
        self._check_bounds(checked, IN_JSON)
        places = {name: f"spec.{name}" for name in FOUND_OUT_LATER}
        return TrainingPlan(spec=checked.model_dump(mode="json"), ignored=(), warnings=(), places=places)

    def generation(self, payload: dict[str, Any]) -> GenerationPlan:
        """Raises ConfigInvalid, InvalidRequest, ModelNotServed. A seed left open is chosen here: it is known then."""
        given = [payload[name] for name in ("config", "yaml_config") if payload.get(name) is not None]
        if len(given) > 1:
            raise InvalidRequest([Problem("yaml_config", "is the same as config: give one of them", "invalid_value")])
        if not given:
            plan = self._from_prompt(payload)
        else:
            config = given[0]
            _refuse_given(payload, OF_PICTURES, "goes with a prompt, not with a config")
            plan = self._from_config(config)
            plan = replace(plan, warnings=(*_without_effect(payload), *plan.warnings))
        spec = dict(plan.spec)
        spec["model"] = spec["model"] or self._default_model
        spec["seed"] = self._random_seed() if spec["seed"] is None else spec["seed"]
        self._check_model(spec["model"])
        return replace(plan, spec=spec)

    def _from_config(self, config: Any) -> GenerationPlan:
        _check_config_size(config)
        parsed = parse_generate_yaml(config)
        warnings = tuple(f"{warning.path}: {warning.message}" for warning in parsed.warnings)
        return GenerationPlan(parsed.spec.model_dump(mode="json"), (), warnings, from_config=True)

    def _from_prompt(self, payload: dict[str, Any]) -> GenerationPlan:
        request = _prompt_form(payload)
        if request.init_image is None:
            _refuse_given(request.model_dump(include=set(OF_PICTURES)), OF_PICTURES, "needs an init_image")
        values = {name: getattr(request, name) for name in SPEC_FIELDS if getattr(request, name) is not None}
        if values.get("seed") == -1:
            del values["seed"]
        if values.get("output_format") == "jpeg":
            values["output_format"] = "jpg"
        choices = request.choices()
        values["loras"] = [choice.model_dump(exclude={"path"}) for choice in choices if choice.id is not None]
        spec = _generate_spec({**values, "prompts": [request.prompt]})
        return GenerationPlan(
            spec=spec.model_dump(mode="json"),
            lora_paths=tuple((choice.path, choice.scale) for choice in choices if choice.path is not None),
            warnings=unknown_fields(request),
            from_config=False,
            strength=request.strength,
        )

    def _check_bounds(self, spec: TrainSpec, places: Mapping[str, str]) -> None:
        problems = self._beyond_bounds(describe_run(spec), places)
        if problems:
            raise ConfigInvalid(problems)

    def _beyond_bounds(self, run: Mapping[str, Any], places: Mapping[str, str]) -> list[Problem]:
        """What a training asks for and cannot have on this installation. `run` is as `describe_run` tells it, `places`
        where a request asks for W&B and for workers."""
        problems: list[Problem] = []
        if "workers" in run and run["workers"]["max"] > self._workers_max:
            message = f"must be at most {self._workers_max} here"
            problems.append(Problem(places["workers"], message, "too_many_workers"))
        if "wandb" in run:
            missing = tracking_problem(has_key=self._has_wandb_key, path=places["wandb"])
            problems += [missing] if missing is not None else []
        return problems

    def _check_model(self, model: str) -> None:
        if model not in self._models:
            raise ModelNotServed(model, self._models)


def parse_payload(kind: type[P], payload: dict[str, Any]) -> P:
    """`payload` as `kind`. Raises InvalidRequest with every problem; offending values are not repeated."""
    try:
        return kind.model_validate(payload)
    except ValidationError as invalid:
        raise InvalidRequest(problems_of(invalid, kind)) from None


def unknown_fields(request: BaseModel) -> tuple[str, ...]:
    """A warning for each field that the schema does not know, also in the items of its lists."""
    names = sorted(request.model_extra or {})
    for field, value in request:
        if field in type(request).model_fields and isinstance(value, list):
            extras = [sorted(item.model_extra or {}) if isinstance(item, BaseModel) else [] for item in value]
            names += [f"{field}[{index}].{name}" for index, found in enumerate(extras) for name in found]
    return _ignored(names)


def _ignored(names: Sequence[str]) -> tuple[str, ...]:
    """These are kept with the record, so a body of nothing else must not make them many."""
    told = [f"Unknown field '{name[:100]}' was ignored" for name in names[:UNKNOWN_NAMED_MAX]]
    more = len(names) - len(told)
    return (*told, f"{more} more unknown fields were ignored") if more else tuple(told)


def _without_effect(payload: Mapping[str, Any]) -> tuple[str, ...]:
    """Warnings of the fields beside the config of a generation."""
    beside = [name for name, value in sorted(payload.items()) if name not in BESIDE_CONFIG and value is not None]
    known = [name for name in beside if name in GeneratePayload.model_fields]
    warnings = [f"'{name}' was ignored: it does not go with a config" for name in known]
    return (*warnings, *_ignored([name for name in beside if name not in known]))


def _refuse_given(fields: Mapping[str, Any], names: Sequence[str], reason: str) -> None:
    """Raises InvalidRequest naming those of `names` that have a value."""
    given = [Problem(name, reason, "not_allowed") for name in names if fields.get(name) is not None]
    if given:
        raise InvalidRequest(given)


def _prompt_form(payload: dict[str, Any]) -> GeneratePayload:
    """Raises InvalidRequest, also with what the fields that can be read hold beyond their bounds."""
    try:
        return parse_payload(GeneratePayload, payload)
    except InvalidRequest as invalid:
        wrong = {problem.path.partition("[")[0].partition(".")[0] for problem in invalid.problems}
        readable = {name: payload[name] for name in SPEC_FIELDS if payload.get(name) is not None and name not in wrong}
        try:
            # Any prompt: the one that was given is judged above.
            _generate_spec({**readable, "prompts": ["-"]})
        except InvalidRequest as beyond:
            raise InvalidRequest([*invalid.problems, *beyond.problems]) from None
        raise


def _generate_spec(values: dict[str, Any]) -> GenerateSpec:
    """Problems are reported by the names of the prompt form."""
    try:
        return spec_from_json(GenerateSpec, values)
    except ConfigInvalid as invalid:
        raise InvalidRequest(
            # A rule about all prompts has no path of its own.
            Problem("prompt" if not p.path or p.path.startswith("prompts") else p.path, p.message, p.code)
            for p in invalid.problems
        ) from None


def _check_config_size(config: Any) -> None:
    if not isinstance(config, str | dict):
        raise InvalidRequest([Problem("config", "must be YAML text or a mapping", "invalid_value")])
    text = config if isinstance(config, str) else json.dumps(config)
    if len(text.encode("utf-8", "surrogatepass")) > CONFIG_BYTES_MAX:
        raise InvalidRequest([Problem("config", f"is over {CONFIG_BYTES_MAX // MIB} MB", "too_large")])
