"""LoRAs over a base model with rounded weights: each picture is the one of those weights, alone and in any batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.lora import read_lora, save_lora
from diffusion.quantized import Quantization, Weights, dense_weight, weight_shape
from diffusion.testing import write_tiny_model

TOLERANCE = 1e-4
PLAIN = GenerateRequest(prompt="a red ring", width=64, height=32, steps=2, guidance_scale=4.0, seed=3)
KINDS = [("int8", "torchao"), ("float8", "torchao"), ("nf4", "bitsandbytes")]
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="nf4 needs a CUDA device")]
KINDS_HERE = [pytest.param(*kind, marks=NEEDS_GPU if kind[0] == "nf4" else []) for kind in KINDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny_model(name, tmp_path_factory.mktemp(name), width=32) for name in ("sd1", "flux1")}


def write_lora(family: Family, path: Path, *, rank: int, dora: bool = False) -> Path:
    """On every layer that a LoRA may have, of all components; with ``dora``, magnitudes near the weights' own."""
    lora = attach_lora(family, rank=rank, alpha=rank, targets="all", components=list(family.lora_components))
    generator = torch.Generator().manual_seed(rank)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in lora.state_dict().items()}
    save_lora(path, state, metadata=lora.metadata(title=path.stem))
    lora.detach()
    if dora:
        written = dict(read_lora(path).state)
        for name in read_lora(path).layers():
            component, _, layer = name.partition(".")
            norm = dense_weight(family.lora_components[component].get_submodule(layer)).norm(dim=1)
            written[f"{name}.lora_magnitude_vector"] = norm * (1 + 0.1 * torch.randn(norm.shape, generator=generator))
        save_file(written, path)
    return path


def load(folder: Path, weights: Weights) -> Family:
    device = "cuda" if weights == "nf4" else "cpu"
    return load_family(folder, device=device, dtype=torch.float32, quantization=Quantization(weights, weights))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def stock_with_the_same_weights(family: Any, folder: Path) -> Any:
    """The stock pipeline, its linear layers holding what the rounded ones multiply with."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    parts = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    rounded = 0
    for part in parts:
        for name, layer in getattr(family, part).named_modules():
            if isinstance(layer, nn.Linear):
                own = getattr(pipeline, part).get_submodule(name).weight
                rounded += not torch.equal(own, dense_weight(layer))
                own.data.copy_(dense_weight(layer))
    assert rounded > 10
    return pipeline


def stock_pixels(pipeline: Any, request: GenerateRequest) -> Tensor:
    pipeline.unload_lora_weights()
    for lora in request.loras:
        pipeline.load_lora_weights(str(lora.path), adapter_name="one")
        pipeline.set_adapters(["one"], [lora.scale])
    pixels: Tensor = pipeline(
        request.prompt, width=request.width, height=request.height, num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale, generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="pt",
    ).images[0]  # fmt: skip
    return pixels


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("weights", "package"), KINDS_HERE)
@pytest.mark.parametrize("name", ["sd1", "flux1"])
def test_different_loras_share_a_batch_over_rounded_weights_and_equal_the_stock_pipelines(
    name: str, weights: Weights, package: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip(package)
    family = load(folders[name], weights)
    low = write_lora(family, tmp_path / "low.safetensors", rank=2)
    high = write_lora(family, tmp_path / "high.safetensors", rank=6)
    dora = write_lora(family, tmp_path / "dora.safetensors", rank=3, dora=True)
    requests = [
        dataclasses.replace(PLAIN, loras=(LoraRef(low),)),
        PLAIN,
        dataclasses.replace(PLAIN, loras=(LoraRef(high, 0.5),), steps=3),
        dataclasses.replace(PLAIN, loras=(LoraRef(dora, 0.7),)),
        dataclasses.replace(PLAIN, loras=(LoraRef(high, -0.3), LoraRef(dora, 0.4)), guidance_scale=1.0),
    ]
    engine = Engine(family)
    together = [rendered.pixels_CHW for rendered in engine.render(requests)]
    for request, made in zip(requests, together, strict=True):
        assert difference(made, engine.render([request])[0].pixels_CHW) < TOLERANCE
    stock = stock_with_the_same_weights(family, folders[name])
    for index in (0, 1, 2):
        assert difference(together[index], stock_pixels(stock, requests[index])) < TOLERANCE
    for index in (0, 2, 3):
        assert difference(together[index], together[1]) > 10 * TOLERANCE
    engine.clear_loras()
    assert difference(engine.render([PLAIN])[0].pixels_CHW, together[1]) < TOLERANCE


@pytest.mark.parametrize(("weights", "package"), KINDS_HERE)
def test_a_rounded_layer_gives_the_weights_that_it_multiplies_with(
    weights: Weights, package: str, folders: dict[str, Path]
) -> None:
    pytest.importorskip(package)
    whole: Any = load_family(folders["flux1"], device="cpu", dtype=torch.float32)
    family: Any = load(folders["flux1"], weights)
    path = "transformer_blocks.0.attn.to_q"
    layer, own = family.transformer.get_submodule(path), whole.transformer.get_submodule(path)
    assert weight_shape(layer) == tuple(own.weight.shape)
    assert dense_weight(layer).shape == own.weight.shape
    assert torch.equal(dense_weight(own), own.weight)
    x = torch.randn(5, own.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = layer(x.to(family.device)).cpu()
        assert difference(made, nn.functional.linear(x, dense_weight(layer), layer.bias.cpu())) < 1e-5
    assert 0 < difference(dense_weight(layer), own.weight) < 0.2


def test_float8_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    quantization = Quantization("float8", None, setting="quantize")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(SettingNotSupported, match=r"quantize: this GPU \(compute capability 8.6\).*use int8"):
        quantization.check(torch.device("cuda"))
    quantization.check(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    quantization.check(torch.device("cuda"))


def test_nf4_is_refused_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.quantized.find_spec", lambda name: name)
    with pytest.raises(SettingNotSupported, match="quantize: nf4 needs a GPU; use int8"):
        Quantization("nf4", None, setting="quantize").check(torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.quantized.find_spec", lambda name: None)
    for weights, package in KINDS:
        with pytest.raises(SettingNotSupported, match=rf"quantize: the node lacks {package}; install raylora"):
            Quantization(None, weights, setting="quantize").check(torch.device("cpu"))  # type: ignore[arg-type]
