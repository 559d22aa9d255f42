"""Adapters of layers that are several in diffusers and one in the original models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion.errors import DiffusionError
from diffusion.lora import read_lora
from diffusion.lora_fit import fit_layers
from tests.diffusion.lora_worlds import (
    ALPHA,
    KOHYA,
    PEFT,
    RANK,
    STACKS,
    NameOf,
    World,
    assert_same,
    cut,
    dotted,
    joined_pairs,
    underscored,
)


@pytest.mark.parametrize("family", list(STACKS))
@pytest.mark.parametrize(
    ("name_of", "ends", "alpha"),
    [
        (dotted("diffusion_model."), PEFT, None),
        (dotted("diffusion_model."), KOHYA, ALPHA),
        (dotted("base_model.model."), PEFT, None),
        (dotted("model.diffusion_model."), KOHYA, None),
        (dotted(""), KOHYA, ALPHA),
        (underscored("lora_unet_"), KOHYA, ALPHA),
        (underscored("lycoris_"), KOHYA, ALPHA),
    ],
)
def test_the_original_models_layers_are_cut_into_diffusers(
    family: str, name_of: NameOf, ends: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    world = World(family, tmp_path)
    pairs = joined_pairs(world, family)
    path = world.write_pairs({name_of(name): pair for name, pair in pairs.items()}, ends, alpha=alpha)
    scale = 1.0 if alpha is None else alpha / RANK
    expected = cut(world, family, {name: scale * B @ A for name, (A, B) in pairs.items()})
    assert_same(world.effects(path), expected)


@pytest.mark.parametrize(
    ("family", "names", "name_of", "ends", "alpha"),
    [
        ("flux2_klein", "", dotted("diffusion_model."), PEFT, None),
        ("flux2_dev", "", dotted("diffusion_model."), PEFT, None),
        # Those that stock diffusers takes of FLUX.1 whatever its width.
        ("flux1", "double_blocks", dotted("diffusion_model."), KOHYA, ALPHA),
        ("z_image", "attention", underscored("lora_unet_"), KOHYA, ALPHA),
    ],
)
def test_a_picture_with_the_original_models_names_is_stock_diffusers(
    family: str, names: str, name_of: NameOf, ends: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    world = World(family, tmp_path)
    pairs = {name: pair for name, pair in joined_pairs(world, family).items() if names in name}
    path = world.write_pairs({name_of(name): pair for name, pair in pairs.items()}, ends, alpha=alpha)
    theirs = world.stock(path)
    assert float((world.ours(path) - theirs).abs().max()) <= 5e-5
    assert float((world.stock(None) - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["flux1", "flux2_klein", "sd3", "z_image"])
def test_the_last_layers_modulation_has_its_halves_the_other_way_round(family: str, tmp_path: Path) -> None:
    """Original models have shift before scale, diffusers' scale before shift; Z-Image has scale alone."""
    world = World(family, tmp_path)
    path = "all_final_layer.2-1.adaLN_modulation.1" if family == "z_image" else "norm_out.linear"
    [(name, (A, B))] = world.pairs({"diffusion_model.final_layer.adaLN_modulation.1": world.shape(path)}).items()
    rows = B if family == "z_image" else torch.cat(B.chunk(2)[::-1])
    assert_same(world.effects(world.write_pairs({name: (A, B)}, PEFT)), {path: rows @ A})


def test_a_joined_doras_magnitudes_go_with_their_rows(tmp_path: Path) -> None:
    world = World("sd3", tmp_path)
    name, paths = "joint_blocks.0.x_block.attn.qkv", STACKS["sd3"]["joint_blocks.0.x_block.attn.qkv"]
    pair = joined_pairs(world, "sd3")[name]
    magnitude = torch.rand(len(pair[1]))
    state = dict(zip((f"{name}.{end}" for end in PEFT), pair, strict=True))
    path = world.write(state | {f"{name}.dora_scale": magnitude[:, None]})
    layers = fit_layers(read_lora(path), world.family.lora_components)["transformer"]
    assert torch.equal(torch.cat([layers[path].magnitude for path in paths]), magnitude)


def test_a_stack_of_adapters_gives_each_part_its_own_ranks_and_an_untouched_one_none(tmp_path: Path) -> None:
    world = World("flux1", tmp_path)
    name, paths = "double_blocks.0.img_attn.qkv", STACKS["flux1"]["double_blocks.0.img_attn.qkv"]
    outs, ins = world.shape(paths[0])
    A, B = torch.randn(4, ins), torch.zeros(3 * outs, 4)
    B[:outs, :2], B[2 * outs :, 2:] = torch.randn(outs, 2), torch.randn(outs, 2)
    path = world.write_pairs({f"diffusion_model.{name}": (A, B)}, KOHYA, alpha=ALPHA)
    layers = fit_layers(read_lora(path), world.family.lora_components)["transformer"]
    assert {path: (layer.rank, layer.alpha) for path, layer in layers.items()} == {
        paths[0]: (2, ALPHA / 2), paths[2]: (2, ALPHA / 2)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"double_blocks.0.img_attn.qkv": (47, 32)}, r"'double_blocks.0.img_attn.qkv' is \(96, 32\).*\(47, 32\)"),
        ({"double_blocks.0.img_attn.qkv": (96, 31)}, r"'double_blocks.0.img_attn.qkv'.*\(32, 31\)"),
        ({"double_blocks.0.img_attn.proj": (32, 31)}, r"'double_blocks.0.img_attn.proj' is \(32, 32\).*\(32, 31\)"),
        (
            {"double_blocks.0.img_attn.qkv": (96, 32), "transformer_blocks.0.attn.to_k": (32, 32)},
            "'transformer_blocks.0.attn.to_k' and 'double_blocks.0.img_attn.qkv' in it are for one layer",
        ),
    ],
)
def test_a_joined_layer_of_another_shape_or_beside_its_part_is_refused(
    shapes: dict[str, tuple[int, int]], reason: str, tmp_path: Path
) -> None:
    world = World("flux1", tmp_path)
    with pytest.raises(DiffusionError, match=reason):
        world.effects(world.write_pairs(world.pairs(shapes), PEFT))
