"""How the original models of FLUX.1, FLUX.2 and SD 3 name and join the layers that diffusers has in its blocks.

Sources: kohya-ss/sd-scripts ``library/{flux_models,sd3_models}.py``, whose module names become a file's keys, and
diffusers' ``scripts/convert_sd3_to_diffusers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
JOINED: Mapping[str, tuple[Blocks, ...]] = {"flux1": FLUX1, "flux2_klein": FLUX2, "flux2_dev": FLUX2, "sd3": SD3}
"""By family: the denoisers that the original has layers joined in."""


def original_order(name: str, A: Tensor, B: Tensor) -> Tensor:
    """``B [out, rank]`` of the layer that the original calls ``name``, from diffusers' order of outputs or to it.

    SD 3's last block has shift and scale of the context the other way round; it is the only one with these two alone.
    """
    is_last = name == "context_block_adaLN_modulation_1" and B.shape[0] == 2 * A.shape[1]
    return torch.cat(B.chunk(2)[::-1]) if is_last else B
