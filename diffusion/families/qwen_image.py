"""Qwen-Image: Qwen2.5-VL text encoder, a double-stream transformer, a 16-channel video VAE, flow matching.

Follows ``QwenImagePipeline`` and ``train_dreambooth_lora_qwen_image.py`` of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from diffusion.families.base import LoraTargets, TextEmbeds
from diffusion.families.flow import FlowMatching, even_sigmas, pack_2x2, unpack_2x2
from diffusion.families.flow_family import ATTENTION, FlowFamily
from diffusion.families.parts import check_size, frozen, load_part, load_scheduler, load_weights, text_beyond

TOKENS_MAX = 512
TEMPLATE_TOKENS = 34
"""Of the system prompt around a prompt; their states are left out, as in ``QwenImagePipeline``."""
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
ENCODER_TOKENS_MAX = 1024 + TEMPLATE_TOKENS


class QwenImage(FlowFamily):
    """Guidance keeps the length that the positive prediction had, token by token."""

    name = "qwen_image"
    architecture = "qwen-image"
    weights = ("text_encoder", "transformer", "vae")
    block_lists = ("transformer_blocks",)

    def __init__(
        self, *, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.transformer, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, transformer, vae)
        )
        self.flow = FlowMatching(scheduler)
        self.factor = 2 ** len(vae.config.temperal_downsample)
        self.size_multiple = 2 * self.factor
        self.native_size_px = 128 * self.factor
        shape = (1, vae.config.z_dim, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=self.device).reshape(shape)
        self._std = torch.tensor(vae.config.latents_std, device=self.device).reshape(shape)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=load_part(folder, "tokenizer", AutoTokenizer),
            text_encoder=load_weights(folder, "text_encoder", Qwen2_5_VLForConditionalGeneration, dtype),
            transformer=load_weights(folder, "transformer", QwenImageTransformer2DModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKLQwenImage, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        feed_forward = [f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in ("net.0.proj", "net.2")]
        modulations = ["img_mod.1", "txt_mod.1"] if kind == "ai_toolkit" else []
        return list(ATTENTION) if kind == "attention" else [*ATTENTION, *feed_forward, *modulations]

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """The last states of a prompt inside the template, without the template's beginning."""
        tokens = self.tokenizer(
            [TEMPLATE.format(prompt) for prompt in prompts], max_length=ENCODER_TOKENS_MAX, padding=True,
            truncation=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        states_BLD = self.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        rows = []
        for states_LD, mask_L in zip(states_BLD, tokens.attention_mask.bool(), strict=True):
            kept_LD = states_LD[mask_L][TEMPLATE_TOKENS:][:TOKENS_MAX]
            rows.append(TextEmbeds(kept_LD[None], mask_BL=kept_LD.new_ones((1, len(kept_LD)), dtype=torch.long)))
        return TextEmbeds.cat(rows).to(dtype=self.dtype)

    def truncated_text(self, prompt: str) -> str:
        return text_beyond(self.tokenizer, prompt, TOKENS_MAX, special=5)  # the template's end

    # -- pictures and latents

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        check_size(width, height, self.size_multiple)
        return int(self.vae.config.z_dim), height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        frames_BC1HW = images_BCHW.to(self.device, self.dtype).unsqueeze(2)
        posterior = self.vae.encode(frames_BC1HW).latent_dist
        return (posterior.mean.squeeze(2) - self._mean) / self._std, posterior.std.squeeze(2) / self._std

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        raw = latents_BCHW.to(self.dtype) * self._std.to(self.dtype) + self._mean.to(self.dtype)
        images: Tensor = self.vae.decode(raw.unsqueeze(2), return_dict=False)[0][:, :, 0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    # -- denoising

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        tokens = self.picture_tokens(latent_shape)
        return self.flow.make_schedule(name, steps, tokens=tokens, sigmas=even_sigmas(steps))

    def combine_guidance(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        rows, columns = positive.shape[-2:]
        mixed_BLD, positive_BLD = pack_2x2(negative + scale * (positive - negative)), pack_2x2(positive)
        length = positive_BLD.norm(dim=-1, keepdim=True) / mixed_BLD.norm(dim=-1, keepdim=True)
        return unpack_2x2(mixed_BLD * length, rows, columns)

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        batch, _, rows, columns = latents_BCHW.shape
        padded = text.mask_BL is not None and min(text.lengths) < text.hidden_BLD.shape[1]
        tokens_BLD = self.transformer(
            hidden_states=pack_2x2(latents_BCHW.to(self.dtype)),
            timestep=timesteps_B.to(self.device, self.dtype) / 1000,
            encoder_hidden_states_mask=text.mask_BL if padded else None,
            encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
            return_dict=False,
        )[0]
        return unpack_2x2(tokens_BLD, rows, columns)
