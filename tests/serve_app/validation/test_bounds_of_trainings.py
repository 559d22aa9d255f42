from typing import Any

import pytest

from serve_app.validation.validator import Validator
from train_jobs.errors import ConfigInvalid


def config(**process: Any) -> dict[str, Any]:
    asked = {
        "type": "sd_trainer", "network": {"type": "lora"}, "datasets": [{"folder_path": "cats"}],
        "model": {"name_or_path": "tiny"}, **process,
    }  # fmt: skip
    return {"job": "extension", "config": {"name": "my_lora", "process": [asked]}}


def spec(**fields: Any) -> dict[str, Any]:
    return {"name": "my_lora", "model": "tiny", "datasets": [{"dataset": "cats"}], **fields}


@pytest.mark.parametrize(
    ("process", "fields", "at", "code"),
    [
        ({"workers": 5}, {"workers": {"min": 1, "max": 5}}, ("workers", "workers.max"), "too_many_workers"),
        ({"logging": {"use_wandb": True}}, {"wandb": {}}, ("logging.use_wandb", "wandb"), "wandb_key_missing"),
    ],
)
def test_more_than_this_installation_gives_is_refused_where_it_is_asked_for(
    process: dict[str, Any], fields: dict[str, Any], at: tuple[str, str], code: str
) -> None:
    validator = Validator(["tiny"], "tiny", workers_max=4)
    in_yaml, in_json = f"config.process[0].{at[0]}", f"spec.{at[1]}"
    with pytest.raises(ConfigInvalid) as refused:
        validator.training(config(**process))
    assert [(p.path, p.code) for p in refused.value.problems] == [(in_yaml, code)]
    with pytest.raises(ConfigInvalid) as refused:
        validator.training_spec(spec(**fields))
    assert [(p.path, p.code) for p in refused.value.problems] == [(in_json, code)]
    report = validator.training_check(config(**process))
    assert not report["accepted"]
    assert [key["verdict"] for key in report["keys"] if key["path"] == in_yaml] == ["refused"]


def test_what_it_gives_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_jobs.config_check.find_spec", lambda name: object())
    validator = Validator(["tiny"], "tiny", has_wandb_key=True, workers_max=4)
    asked = config(workers=4, logging={"use_wandb": True, "project_name": "cats"})
    assert validator.training(asked).spec["wandb"] == {"project": "cats", "run": None}
    assert validator.training_check(asked)["accepted"]
    assert validator.training_spec(spec(workers={"max": 4}, wandb={})).spec["workers"] == {"min": 1, "max": 4}
