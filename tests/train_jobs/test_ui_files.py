"""Files that ai-toolkit's web page makes are taken as they are."""

from __future__ import annotations

import pytest

from tests.train_jobs.ui_files import CHANGES, ui_file
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.config_check import ConfigCheck, check_train_yaml

AT = "config.process[0]"
FAMILIES = {
    "sd15": "sd1",
    "sdxl": "sdxl",
    "flex1": "flux1",
    "flux": "flux1",
    "flux2": "flux2_dev",
    "flux2_klein_4b": "flux2_klein",
    "qwen_image": "qwen_image",
    "qwen_image:2512": "qwen_image",
    "zimage": "z_image",
}


def _verdicts(check: ConfigCheck) -> dict[str, str]:
    return {key.path: key.verdict for key in check.keys}


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_file_with_the_pages_defaults_is_accepted_and_every_key_in_it_is_known(arch: str) -> None:
    check = check_train_yaml(ui_file(arch))
    found = _verdicts(check)
    assert check.is_accepted
    assert set(found.values()) == {"honoured", "ignored"}
    assert found[f"{AT}.save.save_format"] == found[f"{AT}.model.low_vram"] == found[f"{AT}.device"] == "ignored"
    assert all(key.note for key in check.keys if key.verdict == "ignored")


@pytest.mark.parametrize(("arch", "family"), FAMILIES.items())
def test_it_means_what_it_means_there(arch: str, family: str) -> None:
    spec = parse_train_yaml(ui_file(arch)).spec
    assert spec.family == family
    assert (spec.network.rank, spec.network.alpha) == (32, 32)
    assert spec.train.learning_rate == 1e-4
    is_weighted = CHANGES[arch].get("train.timestep_type") == "weighted"
    expected = ("linear", "measured") if is_weighted else ("sigmoid", "none")
    assert (spec.train.timesteps.kind, spec.train.timesteps.weighting) == expected
    assert spec.quantize.is_on == CHANGES[arch].get("model.quantize", False)


def test_the_turbo_models_training_adapter_is_refused_by_name() -> None:
    check = check_train_yaml(ui_file("zimage:turbo"))
    refused = [key for key in check.keys if key.verdict not in ("honoured", "ignored")]
    assert [(key.path, key.verdict) for key in refused] == [(f"{AT}.model.assistant_lora_path", "refused")]


@pytest.mark.parametrize("arch", ["wan21:1b", "qwen_image_edit_plus:2511"])
def test_a_tag_does_not_make_another_model_a_known_one(arch: str) -> None:
    found = _verdicts(check_train_yaml(ui_file("qwen_image", model__arch=arch)))
    assert found[f"{AT}.model.arch"] == "refused"


def test_linear_timesteps_weigh_a_flow_models_loss_too() -> None:
    for kind, weighting in (("sigmoid", "bell"), ("weighted", "measured")):
        spec = parse_train_yaml(ui_file("flux", train__linear_timesteps=True, train__timestep_type=kind)).spec
        assert (spec.train.timesteps.kind, spec.train.timesteps.weighting) == ("linear", weighting)
    parsed = parse_train_yaml(ui_file("sdxl", train__linear_timesteps=True))
    assert {w.path: w.message for w in parsed.warnings}[f"{AT}.train.linear_timesteps"].startswith("has no effect")
