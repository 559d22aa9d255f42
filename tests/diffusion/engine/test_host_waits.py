"""What a denoiser call asks of the host: on a GPU each such question or copy waits for all that is queued there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.engine import Engine, GenerateRequest
from diffusion.families import load_family
from diffusion.testing import MAKERS, write_tiny_model

# `tensor.item()` and `bool(tensor)`; `torch.tensor(values)`; how many elements a mask picks.
HOST = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"}


class _Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in HOST or by_mask:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


# The UNets' schedulers are diffusers' own, and are asked on the host between the calls.
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "sd1"])
def test_a_call_for_an_unchanged_batch_waits_for_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(write_tiny_model(name, tmp_path), device="cpu", dtype=torch.float32)
    noted, outside = _Noted(), family.denoiser.forward

    def forward(*args: Any, **options: Any) -> Any:
        before = list(noted.calls)
        answer = outside(*args, **options)
        noted.calls[:] = before  # what diffusers' model does itself
        return answer

    monkeypatch.setattr(family.denoiser, "forward", forward)
    engine = Engine(family)
    predict, calls_of_steps = engine._denoiser.predict, list[list[str]]()

    def watched(*args: Any, **options: Any) -> list[Tensor | Any]:
        noted.calls.clear()
        with noted:
            answers = predict(*args, **options)
        calls_of_steps.append(list(noted.calls))
        return answers

    monkeypatch.setattr(engine._denoiser, "predict", watched)
    # Prompts of two lengths, one of them with a negative prompt: rows and masks that differ.
    plain = {"width": 64, "height": 32, "steps": 3, "seed": 1}
    engine.render(
        [
            GenerateRequest(prompt="a", guidance_scale=4.0, **plain),
            GenerateRequest(prompt="much longer", guidance_scale=1.0, **plain),
        ]
    )
    assert len(calls_of_steps) == 3
    assert calls_of_steps[1:] == [[], []]
