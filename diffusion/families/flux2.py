"""FLUX.2: a double- and single-stream transformer, 32-channel VAE, flow matching. Its text encoder is Qwen3 in klein
and Mistral 3 in dev, which is guidance-distilled.

Follows ``Flux2KleinPipeline``, ``Flux2Pipeline`` and ``train_dreambooth_lora_flux2_klein.py`` of diffusers. Latents
cross the interface as the pipelines hold them: two by two patches as channels, normalised by the VAE's batch
statistics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from transformers import AutoTokenizer, Mistral3ForConditionalGeneration, Qwen3ForCausalLM

from diffusion.families.base import LoraTargets, TextEmbeds
from diffusion.families.flow import FlowMatching, even_sigmas
from diffusion.families.flow_family import ATTENTION, FlowFamily
from diffusion.families.parts import check_size, frozen, load_part, load_scheduler, load_weights, text_beyond

TOKENS_MAX = 512
TRAINING_GUIDANCE = 1.0
"""What dev, which is guidance-distilled, is told while it trains, unless the caller says otherwise; as FLUX.1 is."""


class Flux2Klein(FlowFamily):
    name = "flux2_klein"
    architecture = "flux-2-klein"
    weights = ("text_encoder", "transformer", "vae")
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    patch = 1
    text_encoder_class: ClassVar[Any] = Qwen3ForCausalLM
    states: ClassVar[tuple[int, ...]] = (9, 18, 27)
    """Layers of the text encoder whose states, side by side, are a token's embedding."""

    def __init__(
        self, *, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any, is_distilled: bool,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.transformer, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, transformer, vae)
        )
        self.flow = FlowMatching(scheduler)
        self.is_distilled = is_distilled
        self.factor = 2 ** len(vae.config.block_out_channels)
        """Pixels to a side of one latent of the interface, the two by two patches counted in."""
        self.size_multiple = self.factor
        self.native_size_px = 64 * self.factor
        self._mean = self.vae.bn.running_mean.reshape(1, -1, 1, 1)
        self._std = torch.sqrt(self.vae.bn.running_var.reshape(1, -1, 1, 1) + self.vae.config.batch_norm_eps)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        index = json.loads((folder / "model_index.json").read_text())
        return cls(
            tokenizer=load_part(folder, "tokenizer", AutoTokenizer),
            text_encoder=load_weights(folder, "text_encoder", cls.text_encoder_class, dtype),
            transformer=load_weights(folder, "transformer", Flux2Transformer2DModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKLFlux2, dtype),
            scheduler=load_scheduler(folder),
            is_distilled=bool(index.get("is_distilled", False)),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        """The single-stream blocks have one projection for attention and feed-forward together."""
        outputs = [f"single_transformer_blocks.{i}.attn.to_out" for i in self._singles()]
        attention = [*ATTENTION, "to_qkv_mlp_proj", *outputs]
        if kind == "attention":
            return attention
        return [*attention, "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"]

    def _singles(self) -> range:
        return range(len(self.transformer.single_transformer_blocks))

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """Padded to a fixed length; the denoiser sees the padding's states too, as in the stock pipeline."""
        tokens = self._tokens(prompts).to(self.device)
        states = self.text_encoder(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True,
            use_cache=False,
        ).hidden_states  # fmt: skip
        return TextEmbeds(torch.cat([states[layer] for layer in self.states], dim=-1)).to(dtype=self.dtype)

    def _tokens(self, prompts: Sequence[str]) -> Any:
        """``input_ids`` and ``attention_mask``, ``[B, TOKENS_MAX]``."""
        return self.tokenizer(
            [self._in_chat(prompt) for prompt in prompts], padding="max_length", max_length=TOKENS_MAX,
            truncation=True, return_tensors="pt",
        )  # fmt: skip

    def _in_chat(self, prompt: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return text

    def truncated_text(self, prompt: str) -> str:
        frame = len(self.tokenizer(self._in_chat(""), add_special_tokens=False).input_ids)
        return text_beyond(self.tokenizer, prompt, TOKENS_MAX, special=frame)

    # -- pictures and latents

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        check_size(width, height, self.size_multiple)
        return 4 * int(self.vae.config.latent_channels), height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The example script trains on the posterior's mode, so the deviation is zero."""
        raw = self.vae.encode(images_BCHW.to(self.device, self.dtype)).latent_dist.mode()
        mean = (_patchify(raw) - self._mean) / self._std
        return mean, torch.zeros_like(mean)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        raw = _unpatchify(latents_BCHW.to(self.dtype) * self._std + self._mean)
        images: Tensor = self.vae.decode(raw, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    # -- denoising

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        tokens = self.picture_tokens(latent_shape)
        mu = compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
        return self.flow.make_schedule(name, steps, tokens=tokens, sigmas=even_sigmas(steps), mu=mu)

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 1 and not self.is_distilled

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        _, channels, rows, columns = latents_BCHW.shape
        hidden_BLD = text.hidden_BLD.to(self.dtype)
        tokens_BLD: Tensor = self.transformer(
            hidden_states=latents_BCHW.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=timesteps_B.to(self.device, self.dtype) / 1000,
            guidance=self._guidance(guidance_B, len(latents_BCHW)),
            encoder_hidden_states=hidden_BLD,
            txt_ids=self._places(1, 1, hidden_BLD.shape[1]).expand(len(hidden_BLD), -1, -1),
            img_ids=self._places(rows, columns, 1).expand(len(latents_BCHW), -1, -1),
            return_dict=False,
        )[0]
        return tokens_BLD.transpose(1, 2).reshape(-1, channels, rows, columns)

    def _guidance(self, guidance_B: Tensor | None, rows: int) -> Tensor | None:
        if not self.transformer.config.guidance_embeds:
            return None
        if guidance_B is None:
            return torch.full((rows,), TRAINING_GUIDANCE, device=self.device)
        return guidance_B.to(self.device, torch.float32)

    def _places(self, rows: int, columns: int, length: int) -> Tensor:
        """``[1, rows * columns * length, 4]``: time, row, column and place in the text of each token."""
        # Made where they are used: a copy from the host would wait for the device in each step.
        axes = (torch.arange(count, device=self.device) for count in (1, rows, columns, length))
        return torch.cartesian_prod(*axes)[None]


class Flux2Dev(Flux2Klein):
    """The guidance scale is an input of the distilled model: there is no negative prompt.

    Of the folder's processor only the tokenizer is used: its part for pictures needs torchvision.
    """

    name = "flux2_dev"
    architecture = "flux-2-dev"
    text_encoder_class = Mistral3ForConditionalGeneration
    states = (10, 20, 30)

    def _tokens(self, prompts: Sequence[str]) -> Any:
        return self.tokenizer.apply_chat_template(
            format_input(list(prompts), system_message=SYSTEM_MESSAGE), add_generation_prompt=False, tokenize=True,
            return_dict=True, return_tensors="pt", padding="max_length", truncation=True, max_length=TOKENS_MAX,
        )  # fmt: skip

    def truncated_text(self, prompt: str) -> str:
        chat = self.tokenizer.apply_chat_template(
            format_input([""], system_message=SYSTEM_MESSAGE), add_generation_prompt=False, tokenize=False
        )
        frame = len(self.tokenizer(chat[0], add_special_tokens=False).input_ids)
        return text_beyond(self.tokenizer, prompt, TOKENS_MAX, special=frame)

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return False


def _patchify(latents_BCHW: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, 4 C, H/2, W/2]``."""
    batch, channels, rows, columns = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, channels * 4, rows // 2, columns // 2)


def _unpatchify(latents_BCHW: Tensor) -> Tensor:
    """The inverse of ``_patchify``."""
    batch, channels, rows, columns = latents_BCHW.shape
    patches = latents_BCHW.reshape(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return patches.reshape(batch, channels // 4, rows * 2, columns * 2)
