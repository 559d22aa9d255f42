"""Prompts that differ in length: what is compiled for them, and that the padding is out of sight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diffusion.engine import Engine, GenerateRequest
from diffusion.families import Family, load_family
from diffusion.testing import write_tiny_model

TOLERANCE = 1e-4
PLAIN = GenerateRequest(prompt="", width=64, height=32, steps=2, guidance_scale=1.0, seed=3)
# Guidance of 0 is none for Z-Image.
NO_GUIDANCE = {"qwen_image": 1.0, "z_image": 0.0}


@pytest.fixture(params=list(NO_GUIDANCE))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return load_family(write_tiny_model(request.param, tmp_path), device="cpu", dtype=torch.float32)


def prompts(family: Family, *lengths: int, guided: bool = False) -> list[GenerateRequest]:
    scale = 4.0 if guided else NO_GUIDANCE[family.name]
    plain = dataclasses.replace(PLAIN, guidance_scale=scale, negative_prompt="bad" if guided else "")
    return [dataclasses.replace(plain, prompt="x" * length) for length in lengths]


def pixels(engine: Engine, *requests: GenerateRequest) -> list[Tensor]:
    return [rendered.pixels_CHW for rendered in engine.render(requests)]


@pytest.mark.parametrize("guided", [False, True])
def test_a_compiled_models_pictures_are_those_of_the_prompts_own_lengths(family: Family, guided: bool) -> None:
    requests = prompts(family, 3, 40, 90, 200, guided=guided)
    plain = pixels(Engine(family), *requests)
    torch._dynamo.reset()
    compiled = Engine(family, compiled="eager")
    for request, expected in zip(requests, plain, strict=True):
        [made] = pixels(compiled, request)
        assert float((made - expected).abs().max()) < TOLERANCE
    torch._dynamo.reset()


def test_prompts_within_the_same_few_lengths_share_their_graphs(family: Family) -> None:
    torch._dynamo.reset()
    engine = Engine(family, compiled="eager")
    frame = family.encode_prompts([""]).lengths[0]
    # Z-Image's own lengths are multiples of 32.
    engine.render(prompts(family, 128 - frame))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for length in (127, 120, 111, 97):
        engine.render(prompts(family, length - frame))
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_the_lengths_that_qwen_image_is_compiled_for_are_few(tmp_path: Path) -> None:
    family = load_family(write_tiny_model("qwen_image", tmp_path), device="cpu", dtype=torch.float32)
    lengths = set[int]()
    predict = family.predict

    def noted(latents: Tensor, timesteps: Tensor, text: Any, **options: Any) -> Tensor:
        lengths.add(text.hidden_BLD.shape[1])
        return predict(latents, timesteps, text, **options)

    family.predict = noted  # type: ignore[method-assign]
    torch._dynamo.reset()
    engine = Engine(family, compiled="eager")
    for length in range(1, 600, 37):
        engine.render([*prompts(family, length)])
    # The tiny tokenizer spells the template out: no prompt is shorter than 128 tokens.
    assert lengths == {256, 512}
    torch._dynamo.reset()
