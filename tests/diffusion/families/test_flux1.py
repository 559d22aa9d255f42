"""FLUX.1's guidance, which a training may leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.families import Family, load_family
from diffusion.testing import write_tiny_model


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return load_family(write_tiny_model("flux1", tmp_path / "model"), device="cpu", dtype=torch.float32)


@torch.no_grad()
def _predicted(family: Family, guidance_B: Tensor | None = None) -> Tensor:
    latents = torch.randn(1, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))
    return family.predict(latents, torch.tensor([400.0]), family.encode_prompts(["a"]), guidance_B=guidance_B)


def test_bypassed_guidance_adds_nothing_and_only_where_none_is_asked_for(family: Family) -> None:
    told, asked = _predicted(family), _predicted(family, torch.tensor([3.5]))
    family.bypasses_guidance = True
    bypassed = _predicted(family)
    assert torch.equal(_predicted(family, torch.tensor([3.5])), asked)
    denoiser: Any = family.denoiser
    last = denoiser.time_text_embed.guidance_embedder.linear_2
    last.weight.data.zero_()
    last.bias.data.zero_()
    family.bypasses_guidance = False
    assert torch.allclose(bypassed, _predicted(family), atol=1e-6)
    assert not torch.allclose(bypassed, told, atol=1e-4)
