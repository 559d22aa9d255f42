"""SDXL's layers under the names of the original UNet, which is the one that sd-scripts trains."""

from __future__ import annotations

import re

import diffusers
import torch
from torch import nn

from diffusion.sgm_names import sgm_names

SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
"""stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""


def resnet(*, shortcut: bool) -> list[str]:
    return ["in_layers.2", "emb_layers.1", "out_layers.3", *(["skip_connection"] if shortcut else [])]


def transformer(depth: int) -> list[str]:
    attention = [f"attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out.0")]
    block = [*attention, "ff.net.0.proj", "ff.net.2"]
    return ["proj_in", "proj_out", *(f"transformer_blocks.{i}.{layer}" for i in range(depth) for layer in block)]


def original_unet() -> set[str]:
    """The linear layers and convolutions of ``SdxlUNet2DConditionModel``, by what its lists' entries are made of."""
    lists: dict[str, list[list[list[str]]]] = {
        "input_blocks": [
            [[""]], [resnet(shortcut=False)], [resnet(shortcut=False)], [["op"]],
            [resnet(shortcut=True), transformer(2)], [resnet(shortcut=False), transformer(2)], [["op"]],
            [resnet(shortcut=True), transformer(10)], [resnet(shortcut=False), transformer(10)],
        ],
        "output_blocks": [
            [resnet(shortcut=True), transformer(10)], [resnet(shortcut=True), transformer(10)],
            [resnet(shortcut=True), transformer(10), ["conv"]],
            [resnet(shortcut=True), transformer(2)], [resnet(shortcut=True), transformer(2)],
            [resnet(shortcut=True), transformer(2), ["conv"]],
            [resnet(shortcut=True)], [resnet(shortcut=True)], [resnet(shortcut=True)],
        ],
    }  # fmt: skip
    names = {"time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.2"}
    for name, entries in lists.items():
        for i, modules in enumerate(entries):
            names |= {f"{name}.{i}.{j}.{layer}".rstrip(".") for j, layers in enumerate(modules) for layer in layers}
    middle = [resnet(shortcut=False), transformer(10), resnet(shortcut=False)]
    return names | {f"middle_block.{j}.{layer}" for j, layers in enumerate(middle) for layer in layers}


def layers_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return {name: tuple(module.weight.shape) for name, module in found.items()}


def test_every_layer_of_full_sdxl_has_the_name_of_one_layer_of_the_original() -> None:
    with torch.device("meta"):
        shapes = layers_of(diffusers.UNet2DConditionModel(**SDXL))
    names = sgm_names(shapes)
    assert names.keys() == shapes.keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == {name.replace(".", "_") for name in original_unet()}
    attention = [path for path in shapes if re.search(r"attn[12]\.to_(q|k|v|out\.0)$", path)]
    assert len(attention) == 70 * 8


def test_widths_change_where_the_original_has_them_change() -> None:
    with torch.device("meta"):
        shapes = layers_of(diffusers.UNet2DConditionModel(**SDXL))
    of = {name: shapes[path] for path, name in sgm_names(shapes).items()}
    assert of["input_blocks_0_0"][:2] == (320, 4)
    assert of["input_blocks_3_0_op"][:2] == (320, 320)
    assert of["input_blocks_4_0_in_layers_2"][:2] == (640, 320)
    assert of["input_blocks_4_1_transformer_blocks_0_attn1_to_q"] == (640, 640)
    assert of["input_blocks_7_0_skip_connection"][:2] == (1280, 640)
    assert of["middle_block_1_transformer_blocks_9_attn2_to_k"] == (1280, 2048)
    assert [of[f"output_blocks_{i}_0_in_layers_2"][1] for i in range(9)] == [
        2560, 2560, 1920, 1920, 1280, 960, 960, 640, 640
    ]  # fmt: skip
    assert of["output_blocks_2_2_conv"][:2] == (1280, 1280)
    assert of["output_blocks_5_2_conv"][:2] == (640, 640)
    assert of["output_blocks_8_0_out_layers_3"][:2] == (320, 320)
    assert of["out_2"][:2] == (4, 320)


def test_other_models_have_no_such_names() -> None:
    with torch.device("meta"):
        shapes = layers_of(diffusers.QwenImageTransformer2DModel(num_layers=1))
    assert sgm_names(shapes) == {}
