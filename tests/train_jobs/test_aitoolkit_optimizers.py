"""What an optimizer is set to where a file says nothing: as ai-toolkit and the packages behind it would have it."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from tests.train_jobs.aitoolkit_files import with_value
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.optimizers import make_optimizer
from train_jobs.spec import OptimizerSpec

EPS = 1e-6
"""ai-toolkit passes it to all but Adafactor and Lion."""
PACKAGES = {
    "adam": ("torch.optim", "Adam", True),
    "adam8bit": ("torch.optim", "Adam", True),
    "adamw": ("torch.optim", "AdamW", True),
    "adamw8bit": ("torch.optim", "AdamW", True),
    "adafactor": ("transformers.optimization", "Adafactor", False),
    "prodigy": ("prodigyopt", "Prodigy", True),
    "lion": ("lion_pytorch", "Lion", False),
    "lion8bit": ("lion_pytorch", "Lion", False),
}


def _read(name: str, **params: Any) -> OptimizerSpec:
    document = with_value("train", "optimizer", name)
    document["config"]["process"][0]["train"]["optimizer_params"] = params
    return parse_train_yaml(document).spec.train.optimizer


@pytest.mark.parametrize("name", PACKAGES)
def test_what_a_file_leaves_out_is_the_packages_default(name: str) -> None:
    module, kind, has_eps = PACKAGES[name]
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    made = make_optimizer(_read(name), {"unet.a": parameter}, 1.0, lambda _: 1.0)
    cls = getattr(importlib.import_module(module), kind)
    assert type(made) is cls
    defaults = {key: value.default for key, value in inspect.signature(cls.__init__).parameters.items()}
    expected = {key: defaults[key] for key in ("betas", "weight_decay", "eps", "d_coef") if key in defaults}
    if has_eps:
        expected["eps"] = EPS
    assert {key: made.param_groups[0][key] for key in expected} == expected


@pytest.mark.parametrize("name", PACKAGES)
def test_what_a_file_says_is_taken(name: str) -> None:
    read = _read(name, weight_decay=0.3, betas=[0.8, 0.95])
    assert (read.weight_decay, read.beta1, read.beta2) == (0.3, 0.8, 0.95)


def test_prodigy_without_a_rate_has_1() -> None:
    document = with_value("train", "optimizer", "prodigy")
    del document["config"]["process"][0]["train"]["lr"]
    assert parse_train_yaml(document).spec.train.learning_rate == 1


@pytest.mark.parametrize("key", ["unet_lr", "text_encoder_lr"])
def test_a_rate_that_ai_toolkit_takes_no_notice_of_is_told(key: str) -> None:
    document = with_value("train", key, 5e-5)
    document["config"]["process"][0]["train"]["train_text_encoder"] = True
    parsed = parse_train_yaml(document)
    assert f"config.process[0].train.{key}" in {warning.path for warning in parsed.warnings}
    rate = parsed.spec.train.learning_rate if key == "unet_lr" else parsed.spec.train.text_encoder_learning_rate
    assert rate == 5e-5
