"""DoRA, LoHa, LoKr, convolutions and file formats: each alone equals a reference, and all of them share a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import StableDiffusion1
from diffusion.lora import read_lora
from tests.diffusion.engine.lora_pictures import PLAIN, TOLERANCE, difference, pixels, stock_pixels, with_loras

CONVOLUTIONS = (
    "conv_in", "conv_out", "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv",
    "up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.attentions.0.proj_in", "time_embedding.linear_1",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
)  # fmt: skip
WriteLora = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("each_kind_of_slot")


def random(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv_lora(path: Path, family: StableDiffusion1, *, rank: int = 3, seed: int = 0) -> Path:
    state: dict[str, Tensor] = {}
    for i, name in enumerate(CONVOLUTIONS):
        weight: Any = family.unet.get_submodule(name).weight
        state[f"unet.{name}.lora_A.weight"] = random(rank, *weight.shape[1:], seed=seed + i)
        ones = [1] * (weight.ndim - 2)
        state[f"unet.{name}.lora_B.weight"] = random(weight.shape[0], rank, *ones, seed=seed + 50 + i)
    save_file(state, path)
    return path


def as_dora(source: Path, path: Path, family: StableDiffusion1) -> Path:
    """The LoRA in ``source`` with a magnitude for every layer, as peft and diffusers write it."""
    state: dict[str, Tensor] = dict(read_lora(source).state)
    for i, name in enumerate(read_lora(source).layers()):
        component, _, layer = name.partition(".")
        weight: Any = family.lora_components[component].get_submodule(layer).weight
        norm = weight.detach().flatten(1).norm(dim=1)
        magnitude = norm * (1 + random(len(norm), seed=i))
        state[f"{name}.lora_magnitude_vector"] = (
            magnitude.reshape(-1) if weight.ndim == 2 else magnitude.reshape(1, -1, 1, 1)
        )
    save_file(state, path)
    return path


def loha(path: Path, family: StableDiffusion1, layers: tuple[str, ...], *, rank: int = 2) -> dict[str, Tensor]:
    """Writes a LoHa under kohya's names; returns the change of each layer's weight by LyCORIS' definition."""
    state, changes = {}, dict[str, Tensor]()
    for i, name in enumerate(layers):
        weight: Any = family.unet.get_submodule(name).weight
        inner = weight[0].numel()
        w1_a, w1_b = random(len(weight), rank, seed=i), random(rank, inner, seed=i + 20)
        w2_a, w2_b = random(len(weight), rank, seed=i + 40), random(rank, inner, seed=i + 60)
        prefix = "lora_unet_" + name.replace(".", "_")
        state |= {f"{prefix}.hada_w1_a": w1_a, f"{prefix}.hada_w1_b": w1_b, f"{prefix}.hada_w2_a": w2_a,
                  f"{prefix}.hada_w2_b": w2_b, f"{prefix}.alpha": torch.tensor(1.5)}  # fmt: skip
        changes[name] = ((w1_a @ w1_b) * (w2_a @ w2_b) * 1.5 / rank).reshape(weight.shape)
    save_file(state, path)
    return changes


def lokr(path: Path, family: StableDiffusion1, layers: tuple[str, ...], *, decomposed: bool) -> dict[str, Tensor]:
    state, changes = {}, dict[str, Tensor]()
    for i, name in enumerate(layers):
        weight: Any = family.unet.get_submodule(name).weight
        outs, ins, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
        w1 = random(2, 4, seed=i)
        prefix = "lora_unet_" + name.replace(".", "_")
        state |= {f"{prefix}.lokr_w1": w1, f"{prefix}.alpha": torch.tensor(2.0)}
        if decomposed:
            w2_a, w2_b = random(outs // 2, 4, seed=i + 20), random(4, ins // 4 * kernel.numel(), seed=i + 40)
            state |= {f"{prefix}.lokr_w2_a": w2_a, f"{prefix}.lokr_w2_b": w2_b}
            w2, scale = w2_a @ w2_b, 2.0 / 4
        else:
            w2, scale = random(outs // 2, ins // 4 * kernel.numel(), seed=i + 20), 1.0
            state |= {f"{prefix}.lokr_w2": w2.reshape(outs // 2, ins // 4, *kernel)}
        kron = torch.kron(w1.reshape(2, 4, *[1] * len(kernel)), w2.reshape(outs // 2, ins // 4, *kernel))
        changes[name] = kron * scale
    save_file(state, path)
    return changes


def merged(stock: Any, changes: dict[str, Tensor], scale: float) -> Any:
    with torch.no_grad():
        for name, change in changes.items():
            stock.unet.get_submodule(name).weight += scale * change
    return stock


LYCORIS_LAYERS = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1",
                  "mid_block.attentions.0.proj_out")  # fmt: skip


def test_convolutions_of_every_kind_equal_the_stock_pipelines(
    family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    path = conv_lora(tmp_path / "conv.safetensors", family)
    stock.load_lora_weights(str(path), adapter_name="one")
    stock.set_adapters(["one"], [0.5])
    base, made = pixels(Engine(family), PLAIN, with_loras(LoraRef(path, 0.5)))
    assert difference(made, stock_pixels(stock)) < TOLERANCE
    assert difference(made, base) > 10 * TOLERANCE


@pytest.mark.parametrize("components", [("unet",), ("unet", "text_encoder")])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_dora_equals_the_stock_pipelines(
    scale: float, components: tuple[str, ...], family: StableDiffusion1, stock: Any, write_lora: WriteLora,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = write_lora("plain", targets="all", components=components)
    path = as_dora(source, tmp_path / "dora.safetensors", family)
    stock.load_lora_weights(str(path), adapter_name="one")
    for name, layer in read_lora(path).layers().items():
        component, _, module = name.partition(".")
        if component == "text_encoder":  # transformers loses these on the way into peft's layers
            peft_layer = stock.text_encoder.get_submodule(module)
            peft_layer.lora_magnitude_vector["one"].weight.data = layer.magnitude
    stock.set_adapters(["one"], [scale])
    made, as_lora = pixels(Engine(family), with_loras(LoraRef(path, scale)), with_loras(LoraRef(source, scale)))
    assert difference(made, stock_pixels(stock)) < TOLERANCE
    assert difference(made, as_lora) > 10 * TOLERANCE


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_before_and_after_a_dora_equal_the_stock_pipelines(
    family: StableDiffusion1, stock: Any, write_lora: WriteLora, tmp_path: Path
) -> None:
    first, last = write_lora("first", seed=1, rank=2), write_lora("last", seed=2, rank=3)
    dora = as_dora(write_lora("plain", seed=3), tmp_path / "dora.safetensors", family)
    for name, path in (("a", first), ("b", dora), ("c", last)):
        stock.load_lora_weights(str(path), adapter_name=name)
    stock.set_adapters(["a", "b", "c"], [0.5, 0.7, -0.4])
    [made] = pixels(Engine(family), with_loras(LoraRef(first, 0.5), LoraRef(dora, 0.7), LoraRef(last, -0.4)))
    assert difference(made, stock_pixels(stock)) < TOLERANCE


def test_loha_equals_the_stock_pipeline_with_the_change_merged(
    family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    changes = loha(tmp_path / "a.safetensors", family, LYCORIS_LAYERS)
    base, made = pixels(Engine(family), PLAIN, with_loras(LoraRef(tmp_path / "a.safetensors", 0.8)))
    assert difference(made, stock_pixels(merged(stock, changes, 0.8))) < TOLERANCE
    assert difference(made, base) > 10 * TOLERANCE


@pytest.mark.parametrize("decomposed", [True, False])
def test_lokr_equals_the_stock_pipeline_with_the_change_merged(
    decomposed: bool, family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    changes = lokr(tmp_path / "a.safetensors", family, LYCORIS_LAYERS, decomposed=decomposed)
    base, made = pixels(Engine(family), PLAIN, with_loras(LoraRef(tmp_path / "a.safetensors", 0.8)))
    assert difference(made, stock_pixels(merged(stock, changes, 0.8))) < TOLERANCE
    assert difference(made, base) > 10 * TOLERANCE


def test_a_kohya_dora_is_the_same_as_diffusers_own(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    path = as_dora(write_lora("plain"), tmp_path / "dora.safetensors", family)
    lora = read_lora(path)
    kohya: dict[str, Tensor] = {}
    for name, layer in lora.layers().items():
        prefix = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        kohya |= {f"{prefix}.lora_down.weight": layer.A, f"{prefix}.lora_up.weight": layer.B}
        kohya |= {f"{prefix}.alpha": torch.tensor(layer.alpha), f"{prefix}.dora_scale": layer.magnitude[:, None]}
    save_file(kohya, tmp_path / "kohya.safetensors")
    ours, theirs = pixels(
        Engine(family), with_loras(LoraRef(path)), with_loras(LoraRef(tmp_path / "kohya.safetensors"))
    )
    assert difference(ours, theirs) < TOLERANCE


def test_a_file_that_peft_saved_for_one_module_is_for_the_denoiser(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    path = write_lora("plain")
    state = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in read_lora(path).state.items()}
    save_file(state, tmp_path / "peft.safetensors")
    ours, theirs = pixels(Engine(family), with_loras(LoraRef(path)), with_loras(LoraRef(tmp_path / "peft.safetensors")))
    assert difference(ours, theirs) < TOLERANCE


def test_all_kinds_share_a_batch_and_each_picture_is_its_solo_picture(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    conv = conv_lora(tmp_path / "conv.safetensors", family)
    plain = write_lora("plain", rank=7, components=("unet", "text_encoder"))
    dora = as_dora(write_lora("source", targets="all"), tmp_path / "dora.safetensors", family)
    loha(tmp_path / "loha.safetensors", family, LYCORIS_LAYERS)
    lokr(tmp_path / "lokr.safetensors", family, LYCORIS_LAYERS, decomposed=True)
    requests = [
        with_loras(LoraRef(conv, 0.5), LoraRef(plain, 0.3)),
        with_loras(LoraRef(dora, 0.9)),
        PLAIN,
        dataclasses.replace(with_loras(LoraRef(tmp_path / "loha.safetensors")), guidance_scale=1.0, steps=4),
        with_loras(LoraRef(tmp_path / "lokr.safetensors"), LoraRef(dora, 0.2)),
    ]
    engine = Engine(family)
    for request, made in zip(requests, pixels(engine, *requests), strict=True):
        assert difference(made, pixels(Engine(family), request)[0]) < TOLERANCE
    assert difference(pixels(engine, PLAIN)[0], pixels(Engine(family), PLAIN)[0]) == 0.0


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_no_graph_is_compiled_for_adapters_once_the_ranks_and_layers_have_been_seen(
    family: StableDiffusion1, write_lora: WriteLora
) -> None:
    from torch._dynamo.utils import counters

    ranks = (1, 8, 3, 5, 8, 2)
    paths = [write_lora(f"{i}", seed=i, rank=rank, alpha=rank) for i, rank in enumerate(ranks)]
    torch._dynamo.reset()
    engine = Engine(family, compiled="eager", batch_max=4)

    def batch(size: int, first: int) -> list[GenerateRequest]:
        return [with_loras(LoraRef(paths[(first + i) % len(paths)], 0.5)) for i in range(size)]

    for size in (4, 2, 1):  # the highest rank, and every size that batches are padded to
        engine.render(batch(size, 0))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for first in range(1, 6):
        engine.render([*batch(4, first), PLAIN])
    assert counters["stats"]["unique_graphs"] == graphs
    for request, made in zip(batch(4, 2), pixels(engine, *batch(4, 2)), strict=True):
        assert difference(made, pixels(engine, request)[0]) < TOLERANCE
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()
