from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from train_jobs.errors import ConfigInvalid
from train_jobs.generate_spec import GenerateSpec
from train_jobs.spec import TrainSpec, check_model_name
from train_jobs.spec_json import spec_from_json

SMALLEST: dict[str, Any] = {"name": "a", "model": "tiny", "datasets": [{"dataset": "cats"}]}


def _problems(value: dict[str, Any], kind: type[Any] = TrainSpec, **options: bool) -> dict[str, str]:
    with pytest.raises(ConfigInvalid) as caught:
        spec_from_json(kind, value, **options)
    return {problem.path: problem.code for problem in caught.value.problems}


def test_a_train_spec_survives_json() -> None:
    spec = spec_from_json(TrainSpec, SMALLEST | {"sample": {"previews": [{"prompt": "a cat"}]}})
    assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec_from_json(TrainSpec, spec.model_dump(mode="json")) == spec


def test_a_generate_spec_survives_json() -> None:
    spec = spec_from_json(GenerateSpec, {"prompts": ["a"], "loras": [{"id": "train_0123456789ab", "scale": 0.5}]})
    assert GenerateSpec.model_validate_json(spec.model_dump_json()) == spec


def test_all_problems_are_reported_at_once_with_their_paths() -> None:
    value = SMALLEST | {"train": {"steps": 0, "learning_rate": -1, "warmup": 3}, "datasets": [{"dataset": "a/b"}]}
    assert _problems(value) == {
        "datasets[0].dataset": "invalid_value",
        "train.steps": "invalid_value",
        "train.learning_rate": "invalid_value",
        "train.warmup": "unknown_key",
    }


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_must_be_finite(number: float) -> None:
    assert "train.learning_rate" in _problems(SMALLEST | {"train": {"learning_rate": number}})


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_networks_without_dropout_are_asked_for_none(kind: str) -> None:
    assert _problems(SMALLEST | {"network": {"type": kind, "dropout": 0.1}}) == {"network": "invalid_value"}


def test_values_are_not_repeated_in_messages() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        spec_from_json(TrainSpec, SMALLEST | {"subject_id": "/secret path"})
    assert "secret" not in caught.value.public_message


@pytest.mark.parametrize("model", ["tiny", "sd-1.5", "runwayml/stable-diffusion-v1-5"])
def test_a_model_is_named_by_alias_or_hub_id(model: str) -> None:
    assert check_model_name(model, paths_allowed=False) is None


@pytest.mark.parametrize("model", ["/models/a", "../a", "a/../b", "a/b/c", "https://x/y", "~/m", "./m", "a\0b", ""])
def test_a_path_is_no_model_name_over_http(model: str) -> None:
    assert check_model_name(model, paths_allowed=False) is not None


def test_paths_are_for_the_command_line_only() -> None:
    value = SMALLEST | {"model": "/models/a", "datasets": [{"local_path": "/pictures/cats"}]}
    assert _problems(value) == {"model": "invalid_value", "datasets[0].local_path": "not_allowed"}
    spec = spec_from_json(TrainSpec, value, paths_allowed=True)
    assert spec.datasets[0].label == "cats"


def test_a_dataset_has_exactly_one_source() -> None:
    assert _problems(SMALLEST | {"datasets": [{}]}) == {"datasets[0]": "invalid_value"}
    assert _problems(SMALLEST | {"datasets": [{"dataset": "a", "local_path": "/a"}]}) == {
        "datasets[0]": "invalid_value"
    }


def test_pictures_of_one_request_are_bounded() -> None:
    assert _problems({"prompts": ["a"] * 9, "num_images": 8}, GenerateSpec) == {"": "invalid_value"}
    assert _problems({"prompts": [" "]}, GenerateSpec) == {"": "invalid_value"}
    assert _problems({"prompts": ["a"], "model": "/etc"}, GenerateSpec) == {"model": "invalid_value"}


def test_alpha_defaults_to_the_rank() -> None:
    spec = spec_from_json(TrainSpec, SMALLEST | {"network": {"rank": 8}})
    assert spec.network.alpha_effective == 8.0


def test_the_modules_of_the_http_side_do_not_import_torch() -> None:
    code = (
        "import sys, train_jobs.spec, train_jobs.aitoolkit, train_jobs.errors, train_jobs.launcher, storage.datasets;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "change",
    [
        {"quantize": {"denoiser": "int8"}},
        {"network": {"type": "dora"}},
        {"train": {"strategy": "fsdp", "compile": True}},
    ],
)
def test_what_a_split_model_cannot_be_is_refused_by_name(change: dict[str, Any]) -> None:
    plain = {"name": "a", "model": "tiny", "datasets": [{"dataset": "cats"}], "train": {"strategy": "fsdp"}}
    assert spec_from_json(TrainSpec, plain).train.strategy == "fsdp"
    with pytest.raises(ConfigInvalid, match="fsdp"):
        spec_from_json(TrainSpec, plain | change)


def test_a_range_of_workers_has_its_ends_in_order() -> None:
    plain = {"name": "a", "model": "tiny", "datasets": [{"dataset": "cats"}]}
    with pytest.raises(ConfigInvalid, match=r"workers.*min must not be above max"):
        spec_from_json(TrainSpec, plain | {"workers": {"min": 3, "max": 2}})
