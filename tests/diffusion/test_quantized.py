"""Base models with rounded weights: near the whole model, smaller, and trainable through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.lora import save_lora
from diffusion.lycoris_layers import Lycoris
from diffusion.quantized import Quantization, Weights, quantize
from diffusion.testing import write_tiny_model

MISSING = "quantised base models need raylora[quantized]"


def load(folder: Path, quantization: Quantization | None = None, dtype: torch.dtype = torch.float32) -> Family:
    return load_family(folder, device="cpu", dtype=dtype, quantization=quantization)


def predict(family: Family) -> Tensor:
    channels, height, width = family.latent_shape(64, 64)
    latents = torch.linspace(-1, 1, channels * height * width).reshape(1, channels, height, width)
    text = family.encode_prompts(["a ring"])
    return family.predict(latents, torch.tensor([500.0]), text, guidance_B=torch.tensor([3.5])).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("flux1", tmp_path_factory.mktemp("flux"), width=32)


@pytest.mark.parametrize(("weights", "error_max"), [("float8", 0.06), ("int8", 0.03), ("int4", 0.4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rounded_model_predicts_nearly_the_same_and_trains_the_adapter(
    weights: Weights, error_max: float, dtype: torch.dtype, folder: Path
) -> None:
    pytest.importorskip("torchao", reason=MISSING)
    whole = predict(load(folder, dtype=dtype))
    family = load(folder, Quantization(weights, weights), dtype)
    assert family.dtype == dtype
    rounded = predict(family)
    error = float((rounded - whole).abs().max() / whole.abs().max())
    assert 0 < error < error_max
    for options in ({}, {"lycoris": Lycoris("lokr", 4)}):
        lora = attach_lora(family, rank=2, alpha=2, targets="all", **options)
        assert torch.equal(predict(family), rounded)
        optimizer = torch.optim.SGD(lora.parameters(), lr=100.0)
        torch.autograd.backward(predict(family).square().mean())
        assert {p.dtype for p in lora.parameters()} == {torch.float32}
        assert all(not p.requires_grad for n, p in family.denoiser.named_parameters() if "base_layer" in n)
        optimizer.step()
        assert (predict(family) - rounded).abs().max() > 1e-4
        lora.detach()


def test_the_engine_makes_the_picture_of_the_adapter_on_a_rounded_model(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=MISSING)
    family = load(folder, Quantization("int8", None))
    engine = Engine(family)
    request = GenerateRequest(prompt="a ring", width=64, height=64, steps=2, seed=3)
    lora = attach_lora(family, rank=2, alpha=2, targets="all")
    generator = torch.Generator().manual_seed(5)
    lora.load_state_dict({k: 0.3 * torch.randn(t.shape, generator=generator) for k, t in lora.state_dict().items()})
    save_lora(tmp_path / "a.safetensors", lora.file_state(), metadata=lora.metadata(title="a"))
    expected = predict(family)
    plain, adapted = engine.generate([request, GenerateRequest(
        prompt="a ring", width=64, height=64, steps=2, seed=3, loras=(LoraRef(tmp_path / "a.safetensors"),)
    )])  # fmt: skip
    assert plain.image.tobytes() != adapted.image.tobytes()
    assert torch.equal(predict(family), expected)


def test_only_what_was_asked_for_is_rounded(folder: Path) -> None:
    pytest.importorskip("torchao", reason=MISSING)
    family: Any = load(folder, Quantization("int8", None, ("*single*", "proj_out")))

    def rounded(module: nn.Module) -> set[str]:
        kept = (nn.Parameter, torch.Tensor)
        return {n for n, m in module.named_modules() if isinstance(m, nn.Linear) and type(m.weight) not in kept}

    assert rounded(family.text_encoder) == rounded(family.latents.vae) == set()
    names = rounded(family.denoiser)
    assert any(name.startswith("transformer_blocks") for name in names)
    assert not any("single" in name or name == "proj_out" for name in names)


def test_a_part_without_a_layer_to_round_is_refused() -> None:
    pytest.importorskip("torchao", reason=MISSING)
    with pytest.raises(SettingNotSupported, match="no layer that can be rounded to int4"):
        quantize(nn.Linear(30, 8), "int4")


def test_without_torchao_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.quantized.find_spec", lambda name: None)
    with pytest.raises(SettingNotSupported, match=r"install raylora\[quantized\].*set it to false"):
        load(folder, Quantization("float8", None))
