"""Every layer of each family's model that can carry an adapter, by name alone: numbers of blocks stand as 0.

Without torch, so that a LoRA file's header can be judged where no model is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from diffusion.layer_names import LayerNames

_TO = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(path: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


_CLIP = _under(
    "text_model.encoder.layers.0",
    (*_under("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2"),
)
_PROJECTED_CLIP = (*_CLIP, "text_projection")
_ATTENDED = (
    "proj_in", "proj_out",
    *(f"transformer_blocks.0.{attention}.{name}" for attention in ("attn1", "attn2") for name in (*_TO, "to_out.0")),
    "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2",
)  # fmt: skip
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
_UNET = (
    "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    *_under("down_blocks.0.resnets.0", _RESNET), *_under("down_blocks.0.attentions.0", _ATTENDED),
    "down_blocks.0.downsamplers.0.conv",
    *_under("mid_block.resnets.0", _RESNET), *_under("mid_block.attentions.0", _ATTENDED),
    *_under("up_blocks.0.resnets.0", _RESNET), *_under("up_blocks.0.attentions.0", _ATTENDED),
    "up_blocks.0.upsamplers.0.conv",
)  # fmt: skip
_JOINT_ATTENTION = _under("attn", (*_TO, *_ADDED, "to_out.0", "to_add_out"))
_FEED_FORWARDS = tuple(f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2"))
_MODULATIONS = ("norm1.linear", "norm1_context.linear")
_STEP = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
_GUIDANCE = ("guidance_embedder.linear_1", "guidance_embedder.linear_2")
_TEXT = ("text_embedder.linear_1", "text_embedder.linear_2")
_ENDS = ("norm_out.linear", "proj_out")
_FLUX2 = {
    "transformer": (
        *_ENDS, "x_embedder", "context_embedder", *_under("time_guidance_embed", (*_STEP, *_GUIDANCE)),
        "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear",
        *_under("transformer_blocks.0", _JOINT_ATTENTION),
        *(f"transformer_blocks.0.{ff}.linear_{end}" for ff in ("ff", "ff_context") for end in ("in", "out")),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out",
    ),
}  # fmt: skip
_Z_LAYERS = (*_under("attention", (*_TO, "to_out.0")), *_under("feed_forward", ("w1", "w2", "w3")))
_Z_MODULATION = "adaLN_modulation.0"

FAMILY_LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd1": {"unet": _UNET, "text_encoder": _CLIP},
    "sdxl": {
        "unet": (*_UNET, "add_embedding.linear_1", "add_embedding.linear_2"),
        "text_encoder": _CLIP, "text_encoder_2": _PROJECTED_CLIP,
    },
    "sd3": {
        "transformer": (
            *_ENDS, "context_embedder", "pos_embed.proj", *_under("time_text_embed", (*_STEP, *_TEXT)),
            *_under("transformer_blocks.0", (*_JOINT_ATTENTION, *_FEED_FORWARDS, *_MODULATIONS)),
            *_under("transformer_blocks.0.attn2", (*_TO, "to_out.0")),
        ),
        "text_encoder": _PROJECTED_CLIP, "text_encoder_2": _PROJECTED_CLIP,
    },
    "flux1": {
        "transformer": (
            *_ENDS, "x_embedder", "context_embedder", *_under("time_text_embed", (*_STEP, *_TEXT, *_GUIDANCE)),
            *_under("transformer_blocks.0", (*_JOINT_ATTENTION, *_FEED_FORWARDS, *_MODULATIONS)),
            *_under("single_transformer_blocks.0", (*_under("attn", _TO), "proj_mlp", "proj_out", "norm.linear")),
        ),
        "text_encoder": _CLIP,
    },
    "flux2_klein": _FLUX2,
    "flux2_dev": _FLUX2,
    "qwen_image": {
        "transformer": (
            *_ENDS, "img_in", "txt_in", *_under("time_text_embed", _STEP),
            *_under("transformer_blocks.0", _JOINT_ATTENTION),
            *(f"transformer_blocks.0.{stream}_{layer}" for stream in ("img", "txt")
              for layer in ("mlp.net.0.proj", "mlp.net.2", "mod.1")),
        ),
    },
    "z_image": {
        "transformer": (
            "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1",
            "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2",
            *_under("layers.0", (*_Z_LAYERS, _Z_MODULATION)), *_under("noise_refiner.0", (*_Z_LAYERS, _Z_MODULATION)),
            *_under("context_refiner.0", _Z_LAYERS),
        ),
    },
}  # fmt: skip
"""By family and component, the denoiser first."""
FAMILY_OF_PIPELINE = {
    "StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux1", "Flux2KleinPipeline": "flux2_klein", "Flux2Pipeline": "flux2_dev",
    "QwenImagePipeline": "qwen_image", "ZImagePipeline": "z_image",
}  # fmt: skip
"""By ``_class_name`` in ``model_index.json``."""
_NUMBER = re.compile(r"\d+")


def has_layer(family: str, component: str, path: str) -> bool:
    """Whether a model of this family may have the layer that a file calls ``path``, however many blocks it has."""
    return unnumbered(path) in _known(family, component)


def unnumbered(path: str) -> str:
    """With underscores for dots and one mark for every number."""
    return _NUMBER.sub("#", path.replace(".", "_"))


@cache
def _known(family: str, component: str) -> frozenset[str]:
    # Of shapes that no layer has: names do not depend on them.
    names = LayerNames(dict.fromkeys(FAMILY_LAYERS[family][component], (1, 1)))
    return frozenset(map(unnumbered, names))
