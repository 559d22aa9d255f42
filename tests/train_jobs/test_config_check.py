from __future__ import annotations

from typing import Any

import pytest

from train_jobs.config_check import check_train_yaml

CONFIG = """
job: extension
config:
  name: fox
  process:
    - type: sd_trainer
      device: cuda:0
      network: {type: lora, linear: 8, linear_alpha: 8, typ: x}
      save: {save_every: 40, max_step_saves_to_keep: 2}
      datasets: [{folder_path: /data/fox, resolution: [64, 96], num_workers: 4}]
      train: {batch_size: 2, gradient_accumulation: 3, steps: 100, lr: 1e-3, optimizer: adamw}
      model: {name_or_path: tiny}
      sample: {sample_every: 50, prompts: [a, b]}
"""
AT = "config.process[0]"


def _verdicts(text: str) -> dict[str, str]:
    return {key.path: key.verdict for key in check_train_yaml(text).keys}


def test_each_key_is_called_honoured_ignored_or_unknown() -> None:
    found = _verdicts(CONFIG)
    assert found[f"{AT}.train.lr"] == found[f"{AT}.network.linear"] == "honoured"
    assert found[f"{AT}.device"] == found[f"{AT}.datasets[0].num_workers"] == "ignored"
    assert found[f"{AT}.network.typ"] == "unknown"
    assert f"{AT}.network" not in found


def test_the_run_is_described_in_numbers() -> None:
    run = check_train_yaml(CONFIG).run
    assert run is not None
    assert (run["steps"], run["pictures_per_step"], run["pictures_total"]) == (100, 6, 600)
    assert (run["checkpoints_written"], run["checkpoints_kept"]) == (3, 2)
    assert run["preview_pictures"] == 2 * 3
    assert run["datasets"][0]["name"] == "fox"


@pytest.mark.parametrize(
    ("change", "path", "verdict"),
    [
        (("batch_size: 2", "batch_size: -2"), f"{AT}.train.batch_size", "invalid"),
        (("lr: 1e-3", "lr: 1e-3, do_cfg: true"), f"{AT}.train.do_cfg", "refused"),
        (("type: lora", "type: lorm"), f"{AT}.network.type", "refused"),
        (("job: extension", "job: &a extension"), "", "invalid"),
    ],
)
def test_a_file_that_would_be_refused_is_reported_and_not_raised(
    change: tuple[str, str], path: str, verdict: str
) -> None:
    found = check_train_yaml(CONFIG.replace(*change))
    assert not found.is_accepted
    assert {key.path: key.verdict for key in found.keys}[path] == verdict
    report: dict[str, Any] = found.as_json()
    assert report["run"] is None
    assert report["counts"][verdict] == 1


@pytest.mark.parametrize(("written", "pictures"), [({"min": 1, "max": 4}, 4), (2, 2)])
def test_workers_are_asked_for_in_the_process_of_a_config(written: Any, pictures: int) -> None:
    process = {
        "type": "sd_trainer", "network": {"type": "lora", "linear": 4}, "model": {"name_or_path": "tiny"},
        "datasets": [{"folder_path": "cats"}], "train": {"lr": 1e-4, "steps": 10, "strategy": "fsdp"},
        "workers": written,
    }  # fmt: skip
    check = check_train_yaml({"job": "extension", "config": {"name": "a", "process": [process]}})
    assert check.run is not None
    assert check.run["workers"]["max"] == check.run["pictures_per_step"] == pictures
    assert check.run["strategy"] == "fsdp"
    process["workers"] = {"min": 0, "max": 1}
    refused = check_train_yaml({"job": "extension", "config": {"name": "a", "process": [process]}})
    assert [key.path for key in refused.keys if key.verdict == "invalid"] == ["config.process[0].workers.min"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("job: x\nconfig:\n\tname: y\n", "indented by a tab"),
        ('job: x\nconfig: {folder_path: "C:\\Users\\anna"}\n', "in single quotes"),
        ("job: x\nconfig: [\n", "the YAML is broken: "),
    ],
)
def test_the_mistakes_that_are_made_most_are_named(text: str, said: str) -> None:
    [found] = check_train_yaml(text).keys
    assert said in found.note
    assert "(line 3, column 1)" in found.note or "(line 2, column " in found.note
