"""The layers that are known of each family without a model are those that its models have."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from diffusion.errors import LoraMismatch, ModelNotFound, UnsupportedModel
from diffusion.families import FAMILIES, load_family
from diffusion.family_layers import FAMILY_LAYERS, FAMILY_OF_PIPELINE, has_layer, unnumbered
from diffusion.lora_header import check_fit, judge
from diffusion.model_layers import model_layers
from diffusion.testing import write_tiny_model

NO_TINY_MODEL_HAS = {
    "sd1": {"mid_block_resnets_#_conv_shortcut"},
    "sdxl": {"mid_block_resnets_#_conv_shortcut"},
    "sd3": {f"transformer_blocks_#_attn#_{name}" for name in ("to_q", "to_k", "to_v", "to_out_#")},
    "flux2_klein": {"time_guidance_embed_guidance_embedder_linear_#"},
}


def layers_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(layer.weight.shape)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def without_clip_level(names: set[str]) -> set[str]:
    """transformers 5 dropped a level of CLIP's paths."""
    return {name.removeprefix("text_model_") for name in names}


def test_pipelines_and_families_are_those_that_can_be_loaded() -> None:
    assert {cls.name for cls in FAMILIES.values()} == FAMILY_LAYERS.keys()
    assert {pipeline: cls.name for pipeline, cls in FAMILIES.items()} == FAMILY_OF_PIPELINE


@pytest.mark.parametrize("name", list(FAMILY_LAYERS))
def test_each_familys_layers_are_known(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path)
    components = load_family(folder, device="cpu", dtype=torch.float32).lora_components
    assert list(FAMILY_LAYERS[name]) == list(components)
    from_headers = model_layers(folder)
    for component, module in components.items():
        known = {unnumbered(path) for path in FAMILY_LAYERS[name][component]}
        shapes = layers_of(module)
        there = {unnumbered(path) for path in shapes}
        missing = NO_TINY_MODEL_HAS.get(name, set()) if component == next(iter(components)) else set()
        assert without_clip_level(known) - missing == without_clip_level(there)
        for path, shape in shapes.items():
            assert has_layer(name, component, path)
            assert from_headers[component].shape(path) == shape


def test_sd35s_second_attention_is_known() -> None:
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(num_layers=2, dual_attention_layers=(0,))
    names = {unnumbered(path) for path in layers_of(model)}
    assert NO_TINY_MODEL_HAS["sd3"] <= names
    assert all(has_layer("sd3", "transformer", path) for path in layers_of(model))


def test_a_folder_that_is_no_model_or_lacks_weights_says_which_part(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="model_index"):
        model_layers(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(UnsupportedModel, match="WanPipeline"):
        model_layers(tmp_path)
    folder = write_tiny_model("sd1", tmp_path)
    [weights] = (folder / "text_encoder").glob("*.safetensors")
    weights.write_bytes(b"cut")
    with pytest.raises(ModelNotFound, match="text_encoder"):
        model_layers(folder)
    weights.unlink()
    with pytest.raises(ModelNotFound, match="text_encoder"):
        model_layers(folder)


@pytest.mark.parametrize(
    ("module", "families"),
    [
        ("lora_unet_down_blocks_1_attentions_0_proj_in", {"sd1", "sdxl"}),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", {"sd1", "sdxl"}),
        ("lora_te2_text_model_encoder_layers_31_mlp_fc1", {"sdxl", "sd3"}),
        ("lora_unet_joint_blocks_3_x_block_attn_qkv", {"sd3"}),
        ("diffusion_model.double_blocks.18.img_attn.qkv", {"flux1", "flux2_klein", "flux2_dev"}),
        ("diffusion_model.double_blocks.18.img_mod.lin", {"flux1"}),
        ("diffusion_model.double_stream_modulation_img.lin", {"flux2_klein", "flux2_dev"}),
        ("diffusion_model.transformer_blocks.0.img_mod.1", {"qwen_image"}),
        ("lycoris_single_transformer_blocks_3_attn_to_qkv_mlp_proj", {"flux2_klein", "flux2_dev"}),
        ("diffusion_model.layers.29.attention.qkv", {"z_image"}),
        ("unet.mid_block.attentions.0.proj_in", {"sd1", "sdxl"}),
        ("transformer.x_embedder", {"flux1", "flux2_klein", "flux2_dev", "z_image"}),
    ],
)
def test_a_name_tells_the_families_that_it_can_be_of(module: str, families: set[str]) -> None:
    header = judge({f"{module}.lora_A.weight": (4, 8), f"{module}.lora_B.weight": (8, 4)}, {})
    assert set(header.families) == families


def lokr(**parts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"conv_in.{name}": shape for name, shape in parts.items()}


@pytest.mark.parametrize(
    ("shapes", "fits"),
    [
        ({"conv_in.lora_A.weight": (2, 4, 3, 3), "conv_in.lora_B.weight": (16, 2, 1, 1)}, True),
        ({"conv_in.lora_A.weight": (2, 36), "conv_in.lora_B.weight": (16, 2)}, True),
        ({"conv_in.lora_A.weight": (2, 4, 1, 1), "conv_in.lora_B.weight": (16, 2, 1, 1)}, False),
        (lokr(lokr_w1=(4, 2), lokr_w2=(4, 2, 3, 3)), True),
        (lokr(lokr_w1=(4, 2), lokr_w2_a=(4, 2), lokr_w2_b=(2, 18)), True),
        (lokr(lokr_w1=(4, 2), lokr_w2=(3, 2, 3, 3)), False),
        (lokr(hada_w1_a=(16, 2), hada_w1_b=(2, 36), hada_w2_a=(16, 2), hada_w2_b=(2, 36)), True),
        (lokr(hada_w1_a=(16, 2), hada_w1_b=(2, 35), hada_w2_a=(16, 2), hada_w2_b=(2, 35)), False),
    ],
)
def test_every_kind_is_held_against_the_shapes_of_the_models_layers(
    shapes: dict[str, tuple[int, ...]], fits: bool, tmp_path: Path
) -> None:
    model = model_layers(write_tiny_model("sd1", tmp_path))
    header = judge(shapes, {})
    if fits:
        check_fit(header, model)
    else:
        with pytest.raises(LoraMismatch, match=r"'conv_in' is \(16, 4, 3, 3\)"):
            check_fit(header, model)
