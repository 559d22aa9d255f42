"""LoKr, LoHa and convolution files under LyCORIS' names, ai-toolkit's and those of the original models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lokr.layer import factorization
from safetensors.torch import save_file
from torch import Tensor

from diffusion.adapter import ConvLora, attach_lora
from diffusion.errors import LoraInvalid
from diffusion.kohya import to_kohya_factors
from diffusion.lora import read_factors, read_lora
from diffusion.lora_fit import fit_factors, fit_layers, fit_products
from diffusion.lycoris_layers import Lycoris
from tests.diffusion.lora_worlds import (
    ALPHA,
    ATTENTION,
    RANK,
    STACKS,
    NameOf,
    World,
    assert_same,
    cut,
    dotted,
    underscored,
)


@pytest.mark.parametrize("family", list(ATTENTION))
@pytest.mark.parametrize(
    "name_of", [underscored("lycoris_"), underscored("lora_unet_"), dotted("diffusion_model."), dotted("transformer.")]
)
@pytest.mark.parametrize("kind", ["lokr", "loha", "lora"])
def test_lycoris_files_are_read_for_every_transformer(kind: str, name_of: NameOf, family: str, tmp_path: Path) -> None:
    world = World(family, tmp_path)
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    state: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for path in ATTENTION[family]:
        outs, ins = world.shape(path)
        if kind == "lokr":
            (o1, o2), (i1, i2) = factorization(outs, 4), factorization(ins, 4)
            parts = {"lokr_w1": draw(o1, i1), "lokr_w2_a": draw(o2, RANK), "lokr_w2_b": draw(RANK, i2)}
            expected[path] = ALPHA / RANK * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        elif kind == "loha":
            parts = {f"hada_w{i}_{x}": draw(*((outs, RANK) if x == "a" else (RANK, ins))) for i in (1, 2) for x in "ab"}
            first, second = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
            expected[path] = ALPHA / RANK * first * second
        else:
            parts = {"lora_down.weight": draw(RANK, ins), "lora_up.weight": draw(outs, RANK)}
            expected[path] = ALPHA / RANK * parts["lora_up.weight"] @ parts["lora_down.weight"]
        state |= {f"{name_of(path)}.{end}": tensor for end, tensor in (parts | {"alpha": torch.tensor(ALPHA)}).items()}
    assert_same(world.effects(world.write(state)), expected)


@pytest.mark.parametrize(
    ("family", "name_of", "names"),
    [
        ("z_image", dotted("diffusion_model."), ATTENTION["z_image"]),
        ("flux2_klein", underscored("lycoris_"), ATTENTION["flux2_klein"]),
        ("flux2_klein", dotted("diffusion_model."), list(STACKS["flux2_klein"])),
        ("flux2_klein", dotted(""), ATTENTION["flux2_klein"]),
    ],
)
def test_a_picture_with_a_lokr_is_stock_diffusers(
    family: str, name_of: NameOf, names: list[str], tmp_path: Path
) -> None:
    world = World(family, tmp_path)
    generator = torch.Generator().manual_seed(7)
    state: dict[str, Tensor] = {}
    for name in names:
        shapes = [world.shape(path) for path in STACKS[family].get(name, [name])]
        outs, ins = sum(outs for outs, _ in shapes), shapes[0][1]
        w1, w2 = (
            0.3 * torch.randn(*shape, generator=generator)
            for shape in zip(factorization(outs, -1), factorization(ins, -1), strict=True)
        )
        state |= {f"{name_of(name)}.lokr_w1": w1, f"{name_of(name)}.lokr_w2": w2}
        state[f"{name_of(name)}.alpha"] = torch.tensor(ALPHA)
    path = world.write(state)
    theirs = world.stock(path)
    assert float((world.ours(path) - theirs).abs().max()) <= 5e-5
    assert float((world.stock(None) - theirs).abs().max()) > 1e-3


def test_a_lokr_that_stays_a_product_is_cut_between_whole_rows_of_its_first_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World("flux1", tmp_path)
    monkeypatch.setattr("diffusion.lycoris.CHEAP_RANK_MAX", 1)
    name, paths = "double_blocks.0.img_attn.qkv", STACKS["flux1"]["double_blocks.0.img_attn.qkv"]
    outs, ins = world.shape(paths[0])
    w1, w2 = torch.randn(6, 4), torch.randn(3 * outs // 6, ins // 4)
    path = world.write({f"diffusion_model.{name}.lokr_w1": w1, f"diffusion_model.{name}.lokr_w2": w2})
    assert fit_products(read_lora(path), world.family.lora_components)["transformer"].keys() == set(paths)
    assert_same(world.effects(path), cut(world, "flux1", {name: torch.kron(w1, w2)}))
    # Four blocks of rows are not three layers: here as a pair, and where that is too wide not at all.
    w1, w2 = torch.randn(4, 4), torch.randn(3 * outs // 4, ins // 4)
    path = world.write({f"diffusion_model.{name}.lokr_w1": w1, f"diffusion_model.{name}.lokr_w2": w2})
    assert_same(world.effects(path), cut(world, "flux1", {name: torch.kron(w1, w2)}))
    monkeypatch.setattr("diffusion.lycoris.RANK_MAX", 2)
    with pytest.raises(LoraInvalid, match=r"LoKr of 'diffusion_model.double_blocks.0.img_attn.qkv'.*cannot be cut"):
        world.effects(path)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
@pytest.mark.parametrize("kind", ["lokr", "loha", "lora", "dora"])
def test_sdxls_layers_and_convolutions_are_read_under_the_original_unets_names(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    world = World("sdxl", tmp_path)
    block = "transformer_blocks"
    names = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_3_0_emb_layers_1": "down_blocks.1.resnets.0.time_emb_proj",
        f"input_blocks_3_1_{block}_1_attn1_to_q": f"down_blocks.1.attentions.0.{block}.1.attn1.to_q",
        f"middle_block_1_{block}_0_ff_net_0_proj": f"mid_block.attentions.0.{block}.0.ff.net.0.proj",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_1_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_2_0_skip_connection": "up_blocks.1.resnets.0.conv_shortcut",
        "out_2": "conv_out",
    }
    generator = torch.Generator().manual_seed(8)
    state, expected = {}, {}
    for name, path in names.items():
        weight = world.family.denoiser.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        outs, ins, *kernel = weight.shape
        flat, key = ins * weight[0, 0].numel(), f"{prefix}{name}"
        if kind == "lokr":
            w1, w2 = torch.randn(2, 2, generator=generator), torch.randn(outs // 2, ins // 2, *kernel)
            state |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}
            expected[path] = torch.kron(w1, w2.flatten(1)) if not kernel else torch.kron(w1[:, :, None, None], w2)
        elif kind == "loha":
            a, b = torch.randn(2, outs, RANK, generator=generator), torch.randn(2, RANK, flat, generator=generator)
            for i in (0, 1):
                state |= {f"{key}.hada_w{i + 1}_a": a[i], f"{key}.hada_w{i + 1}_b": b[i]}
            expected[path] = (a[0] @ b[0]) * (a[1] @ b[1])
        else:
            A = torch.randn(RANK, ins, *kernel, generator=generator)
            B = torch.randn(outs, RANK, *(1 for _ in kernel), generator=generator)
            state |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
            expected[path] = B.flatten(1) @ A.flatten(1)
            if kind == "dora":
                state[f"{key}.dora_scale"] = torch.rand(outs, 1, *(1 for _ in kernel), generator=generator)
    path = world.write(state)
    assert_same(world.effects(path), {path: change.flatten(1) for path, change in expected.items()})
    if kind == "dora":
        layers = fit_layers(read_lora(path), world.family.lora_components)["unet"]
        for name, layer in names.items():
            assert torch.equal(layers[layer].magnitude, state[f"{prefix}{name}.dora_scale"].flatten())


def test_sdxls_lokr_is_exported_under_the_original_unets_names_and_begun_from_again(tmp_path: Path) -> None:
    family = World("sdxl", tmp_path).family
    lora = attach_lora(family, rank=2, alpha=2, targets="all", lycoris=Lycoris("lokr"), conv=ConvLora(2, 2.0))
    own = lora.state_dict()
    named = to_kohya_factors(own, family)
    assert any(key.startswith("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.lokr") for key in named)
    assert not any("down_blocks" in key or "up_blocks" in key or "mid_block" in key for key in named)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, tmp_path / "kohya.safetensors")
    found = fit_factors(read_factors(tmp_path / "kohya.safetensors"), family.lora_components)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)
    lora.detach()
