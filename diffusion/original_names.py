"""How the original models of the transformers name and join the layers that diffusers has.

kohya's scripts, ai-toolkit and ComfyUI train and serve those models, so their module names are in files' keys. Names
alone, without torch. Sources: kohya-ss/sd-scripts ``library/{flux_models,sd3_models}.py``, and diffusers'
``scripts/convert_sd3_to_diffusers.py`` and ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blocks:
    """One list of blocks: ``ours`` is its path in the denoiser, ``theirs`` the original's, in a file's form.

    ``whole`` has the name of a layer by its path in the block. ``stacks`` are layers that the original has in one,
    their outputs in this order.
    """

    ours: str
    theirs: str
    whole: Mapping[str, str]
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def stack_of(self, path: str) -> str | None:
        """The stack that the layer at ``path`` in a block is part of."""
        return next((name for name, parts in self.stacks.items() if path in parts), None)

    def names(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The original's name of each layer in a block, and the paths of what it is in diffusers."""
        yield from self.stacks.items()
        for ours, theirs in self.whole.items():
            yield theirs, (ours,)


@dataclass(frozen=True)
class Original:
    """A family's original model: its ``blocks``, and the layers outside of them (``others``, ours to theirs).

    ``mark`` is what the path of a layer ends with that no other family has.
    """

    blocks: tuple[Blocks, ...]
    others: Mapping[str, str]
    mark: str


@dataclass(frozen=True)
class Layers:
    """What a name stands for: a layer, or several whose outputs are one after another in the original's one.

    ``is_swapped``: the first half of its outputs is diffusers' second. Original models have shift before scale.
    """

    paths: tuple[str, ...]
    is_swapped: bool = False


_DOUBLE_STACKS = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_DOUBLE_ATTENTION = {"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj"}

FLUX1 = (
    Blocks(
        "transformer_blocks", "double_blocks",
        {
            **_DOUBLE_ATTENTION,
            "ff.net.0.proj": "img_mlp_0", "ff.net.2": "img_mlp_2",
            "ff_context.net.0.proj": "txt_mlp_0", "ff_context.net.2": "txt_mlp_2",
            "norm1.linear": "img_mod_lin", "norm1_context.linear": "txt_mod_lin",
        },
        _DOUBLE_STACKS,
    ),
    Blocks(
        "single_transformer_blocks", "single_blocks", {"proj_out": "linear2", "norm.linear": "modulation_lin"},
        {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")},
    ),
)  # fmt: skip
FLUX2 = (
    Blocks(
        "transformer_blocks", "double_blocks",
        {
            **_DOUBLE_ATTENTION,
            "ff.linear_in": "img_mlp_0", "ff.linear_out": "img_mlp_2",
            "ff_context.linear_in": "txt_mlp_0", "ff_context.linear_out": "txt_mlp_2",
        },
        _DOUBLE_STACKS,
    ),
    Blocks(
        "single_transformer_blocks", "single_blocks",
        {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"},
    ),
)  # fmt: skip
SD3 = (
    Blocks(
        "transformer_blocks", "joint_blocks",
        {
            "attn.to_out.0": "x_block_attn_proj", "attn.to_add_out": "context_block_attn_proj",
            "attn2.to_out.0": "x_block_attn2_proj",
            "ff.net.0.proj": "x_block_mlp_fc1", "ff.net.2": "x_block_mlp_fc2",
            "ff_context.net.0.proj": "context_block_mlp_fc1", "ff_context.net.2": "context_block_mlp_fc2",
            "norm1.linear": "x_block_adaLN_modulation_1", "norm1_context.linear": "context_block_adaLN_modulation_1",
        },
        {
            "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        },
    ),
)  # fmt: skip
_Z_ATTENTION = {"attention.to_out.0": "attention_out"}
_Z_STACKS = {"attention_qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
Z_IMAGE = tuple(
    Blocks(blocks, blocks, _Z_ATTENTION, _Z_STACKS) for blocks in ("layers", "noise_refiner", "context_refiner")
)
JOINED: Mapping[str, tuple[Blocks, ...]] = {"flux1": FLUX1, "flux2_klein": FLUX2, "flux2_dev": FLUX2, "sd3": SD3}
"""By family: the denoisers that kohya's scripts train with layers joined."""

_FLUX_OTHERS = {
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "proj_out": "final_layer_linear", "norm_out.linear": "final_layer_adaLN_modulation_1",
}  # fmt: skip
_EMBEDDER = {"linear_1": "in_layer", "linear_2": "out_layer"}
ORIGINALS = (
    Original(
        FLUX1,
        _FLUX_OTHERS
        | {f"time_text_embed.{ours}_embedder.{layer}": f"{theirs}_in_{name}" for layer, name in _EMBEDDER.items()
           for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))},
        mark=".proj_mlp",
    ),
    Original(
        FLUX2,
        _FLUX_OTHERS
        | {f"time_guidance_embed.{ours}_embedder.{layer}": f"{theirs}_in_{name}" for layer, name in _EMBEDDER.items()
           for ours, theirs in (("timestep", "time"), ("guidance", "guidance"))}
        | {f"{name}.linear": f"{name}_lin" for name in
           ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")},
        mark=".to_qkv_mlp_proj",
    ),
    Original(
        SD3,
        {
            "pos_embed.proj": "x_embedder_proj",
            "proj_out": "final_layer_linear", "norm_out.linear": "final_layer_adaLN_modulation_1",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
            "time_text_embed.text_embedder.linear_1": "y_embedder_mlp_0",
            "time_text_embed.text_embedder.linear_2": "y_embedder_mlp_2",
        },
        mark="pos_embed.proj",
    ),
    Original(
        Z_IMAGE,
        {
            "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1.linear": "final_layer_linear",
            "all_final_layer.2-1.adaLN_modulation.1": "final_layer_adaLN_modulation_1",
        },
        mark=".feed_forward.w1",
    ),
)  # fmt: skip
"""Qwen-Image is not among them: its original has diffusers' names."""
_SWAPPED_MODULATIONS = ("norm_out.linear",)
LAST_CONTEXT = "context_block_adaLN_modulation_1"
_BLOCK_PATH = re.compile(r"(?P<list>\w+)\.(?P<index>\d+)\..+")


def joined_names(shapes: Mapping[str, Sequence[int]]) -> dict[str, Layers]:
    """The original's names, with underscores, for a transformer's layers; ``shapes`` of their weights by path.

    Empty for a model that has none of these originals.
    """
    original = next((one for one in ORIGINALS if any(path.endswith(one.mark) for path in shapes)), None)
    if original is None:
        return {}
    found = {theirs: Layers((ours,), ours in _SWAPPED_MODULATIONS) for ours, theirs in original.others.items()}
    indices = {(match["list"], match["index"]) for path in shapes if (match := _BLOCK_PATH.fullmatch(path))}
    for blocks in original.blocks:
        for index in (index for name, index in indices if name == blocks.ours):
            for name, parts in blocks.names():
                paths = tuple(f"{blocks.ours}.{index}.{part}" for part in parts)
                is_swapped = paths[0] in shapes and swaps_halves(name, shapes[paths[0]])
                found[f"{blocks.theirs}_{index}_{name}"] = Layers(paths, is_swapped)
    return {name: layers for name, layers in found.items() if all(path in shapes for path in layers.paths)}


def swaps_halves(name: str, shape: Sequence[int]) -> bool:
    """Whether a layer in a block, of this weight ``[out, in]``, has its outputs the other way round in diffusers.

    SD 3's last block has shift and scale of the context so; it is the only one with these two alone.
    """
    return name == LAST_CONTEXT and len(shape) == 2 and shape[0] == 2 * shape[1]
