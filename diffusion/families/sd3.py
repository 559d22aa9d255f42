"""SD 3.x: two CLIP encoders and an optional T5, a joint transformer, 16-channel VAE, flow matching.

Follows ``StableDiffusion3Pipeline`` and ``train_dreambooth_lora_sd3.py`` of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion.errors import SizeNotSupported
from diffusion.families.base import LoraTargets, TextEmbeds
from diffusion.families.flow import FlowMatching
from diffusion.families.flow_family import ATTENTION, FEED_FORWARD, FlowFamily
from diffusion.families.kl_family import KlFamily
from diffusion.families.parts import (
    KlLatents,
    frozen,
    load_part,
    load_scheduler,
    load_weights,
    text_beyond,
    tokenize_fixed,
)
from diffusion.families.sd1 import TEXT_TARGETS

T5_TOKENS = 256
CLIP_TOKENS = 77


class StableDiffusion3(KlFamily, FlowFamily):
    """A folder without ``text_encoder_3`` runs with zeros in its place, as the stock pipeline does."""

    name = "sd3"
    architecture = "stable-diffusion-v3"
    weights = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
    block_lists = ("transformer_blocks",)

    def __init__(
        self, *, tokenizers: Sequence[Any], text_encoder: Any, text_encoder_2: Any, text_encoder_3: Any | None,
        transformer: Any, vae: Any, scheduler: Any, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizers = tuple(tokenizers)
        self.text_encoder, self.text_encoder_2, self.transformer, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, text_encoder_2, transformer, vae)
        )
        self.text_encoder_3 = None if text_encoder_3 is None else frozen(text_encoder_3, self.device, dtype)
        self.flow = FlowMatching(scheduler)
        self.patch = int(transformer.config.patch_size)
        self.latents = KlLatents(self.vae, patch=self.patch)
        self.size_multiple = self.latents.size_multiple
        self.native_size_px = int(transformer.config.sample_size) * self.latents.factor

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        with_t5 = (folder / "text_encoder_3").is_dir()
        tokenizers = [load_part(folder, part, CLIPTokenizer) for part in ("tokenizer", "tokenizer_2")]
        if with_t5:
            tokenizers.append(load_part(folder, "tokenizer_3", T5TokenizerFast))
        return cls(
            tokenizers=tokenizers,
            text_encoder=load_weights(folder, "text_encoder", CLIPTextModelWithProjection, dtype),
            text_encoder_2=load_weights(folder, "text_encoder_2", CLIPTextModelWithProjection, dtype),
            text_encoder_3=load_weights(folder, "text_encoder_3", T5EncoderModel, dtype) if with_t5 else None,
            transformer=load_weights(folder, "transformer", SD3Transformer2DModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKL, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {
            "transformer": self.transformer, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2,
        }  # fmt: skip

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        if component != "transformer":
            return list(TEXT_TARGETS[kind])
        feed_forward = [] if kind == "attention" else [*FEED_FORWARD]
        modulations = ["norm1.linear", "norm1_context.linear"] if kind == "ai_toolkit" else []
        return [*ATTENTION, *feed_forward, *modulations]

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """CLIP's states side by side, padded to T5's width, then T5's; both pooled vectors side by side."""
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, (self.text_encoder, self.text_encoder_2), strict=False):
            output = encoder(tokenize_fixed(tokenizer, prompts, self.device, CLIP_TOKENS), output_hidden_states=True)
            pooled.append(output[0])
            hidden.append(output.hidden_states[-2])
        clip_BLD, t5_BLD = torch.cat(hidden, dim=-1), self._encode_t5(prompts)
        clip_BLD = nn.functional.pad(clip_BLD, (0, t5_BLD.shape[-1] - clip_BLD.shape[-1]))
        return TextEmbeds(torch.cat([clip_BLD, t5_BLD], dim=1), torch.cat(pooled, dim=-1)).to(dtype=self.dtype)

    def _encode_t5(self, prompts: Sequence[str]) -> Tensor:
        if self.text_encoder_3 is None:
            width = self.transformer.config.joint_attention_dim
            return torch.zeros(len(prompts), T5_TOKENS, width, device=self.device, dtype=self.dtype)
        states_BLD: Tensor = self.text_encoder_3(tokenize_fixed(self.tokenizers[2], prompts, self.device, T5_TOKENS))[0]
        return states_BLD

    def truncated_text(self, prompt: str) -> str:
        if self.text_encoder_3 is not None:
            return text_beyond(self.tokenizers[2], prompt, T5_TOKENS, special=1)
        return text_beyond(self.tokenizers[0], prompt, CLIP_TOKENS, special=2)

    # -- pictures and latents

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        side_max_px = self.transformer.config.pos_embed_max_size * self.patch * self.latents.factor
        if max(width, height) > side_max_px:
            raise SizeNotSupported(width, height, self.size_multiple, side_max_px)
        return super().latent_shape(width, height)

    # -- denoising

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.transformer(
            hidden_states=latents_BCHW.to(self.dtype),
            timestep=timesteps_B.to(self.device),
            encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            pooled_projections=None if text.pooled_BD is None else text.pooled_BD.to(self.dtype),
            return_dict=False,
        )[0]
        return output
