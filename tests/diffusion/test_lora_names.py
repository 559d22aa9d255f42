"""Adapters under the names that ai-toolkit, ComfyUI and kohya's scripts write.

Where stock diffusers reads a file its picture is the reference, otherwise the arithmetic of what was written.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.lora import read_lora
from tests.diffusion.lora_worlds import (
    ALPHA,
    ATTENTION,
    KOHYA,
    PEFT,
    RANK,
    NameOf,
    World,
    assert_same,
    dotted,
    underscored,
)


@pytest.mark.parametrize(
    ("family", "name_of", "ends", "alpha"),
    [
        ("qwen_image", dotted("diffusion_model."), PEFT, None),
        ("qwen_image", dotted("diffusion_model."), KOHYA, ALPHA),
        ("qwen_image", dotted(""), KOHYA, ALPHA),
        ("z_image", dotted("diffusion_model."), PEFT, None),
        ("z_image", dotted("diffusion_model."), KOHYA, ALPHA),
        ("z_image", dotted(""), KOHYA, ALPHA),
        ("flux2_klein", dotted("diffusion_model."), PEFT, None),
        ("flux1", underscored("lora_transformer_"), KOHYA, ALPHA),
    ],
)
def test_a_picture_is_stock_diffusers_with_the_same_file(
    family: str, name_of: NameOf, ends: tuple[str, str], alpha: float | None, tmp_path: Path
) -> None:
    world = World(family, tmp_path)
    pairs = world.pairs({path: world.shape(path) for path in ATTENTION[family]})
    path = world.write_pairs({name_of(path): pair for path, pair in pairs.items()}, ends, alpha=alpha)
    scale = 1.0 if alpha is None else alpha / RANK
    assert_same(world.effects(path), {path: scale * B @ A for path, (A, B) in pairs.items()})
    theirs = world.stock(path)
    assert float((world.ours(path) - theirs).abs().max()) <= 5e-5
    assert float((world.stock(None) - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("flux1", "lora_unet_double_blocks_0_img_unknown", "no layer"),
        ("flux1", "lora_unet_double_blocks_7_img_attn_qkv", "no layer"),
        ("flux1", "lora_unet_double_stream_modulation_img_lin", "no layer"),
        ("flux1", "diffusion_model.double_blocks.0.img_attn.norm.query_norm", "no layer"),
        ("flux1", "lora_te2_text_model_encoder_layers_0_mlp_fc1", "adapts 'text_encoder_2'"),
        ("flux1", "lora_te1_text_model_encoder_layers_9_mlp_fc1", "no layer"),
        ("flux1", "unet.mid_block.attentions.0.proj_in", "adapts 'unet'"),
        ("flux1", "strange.transformer_blocks.0.attn.to_q", "no layer"),
        ("flux1", "lora_transformer_transformer_blocks_0_attn", "no layer"),
        ("flux2_klein", "diffusion_model.double_blocks.0.img_mod.lin", "no layer"),
        ("sd3", "lora_unet_joint_blocks_0_x_block_ln_q", "no layer"),
        ("sdxl", "lora_unet_input_blocks_9_0_in_layers_2", "no layer"),
        ("sdxl", "unet.conv_norm_out", "cannot carry"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_refused_by_the_files_own_name(
    family: str, name: str, reason: str, tmp_path: Path
) -> None:
    world = World(family, tmp_path)
    path = world.write_pairs(world.pairs({name: (8, 8)}), KOHYA, alpha=ALPHA)
    with pytest.raises(LoraMismatch, match=f"{reason}.*{name}|{name}.*{reason}"):
        world.effects(path)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize(
    "name",
    [
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ],
)
def test_a_file_with_layers_of_t5_is_refused_and_says_so(name: str, alpha: float | None, tmp_path: Path) -> None:
    world = World("flux1", tmp_path)
    known = "lora_unet_double_blocks_0_img_attn_proj"
    shapes = {known: world.shape("transformer_blocks.0.attn.to_out.0"), name: (8, 8)}
    path = world.write_pairs(world.pairs(shapes), KOHYA, alpha=alpha)
    with pytest.raises(LoraInvalid, match=f"T5.*{name}"):
        read_lora(path)


def test_endless_names_are_cut_in_messages(tmp_path: Path) -> None:
    world = World("flux1", tmp_path)
    name = "x" * 5000
    with pytest.raises(LoraMismatch) as caught:
        world.effects(world.write_pairs(world.pairs({name: (8, 8)}), PEFT))
    assert len(str(caught.value)) < 300
