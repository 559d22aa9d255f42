"""FLUX.1 (dev and schnell): CLIP and T5 text encoders, a double- and single-stream transformer, 16-channel VAE.

Follows ``FluxPipeline`` and ``train_dreambooth_lora_flux.py`` of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion.families.base import LoraTargets, TextEmbeds
from diffusion.families.flow import FlowMatching, even_sigmas, pack_2x2, unpack_2x2
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

T5_TOKENS = 512
TRAINING_GUIDANCE = 1.0
"""What a guidance-distilled model is told while it trains, unless the caller says otherwise; as in ai-toolkit."""


class Flux1(KlFamily, FlowFamily):
    """The guidance scale is an input of the distilled model: there is no negative prompt."""

    name = "flux1"
    architecture = "flux-1-dev"
    weights = ("text_encoder", "text_encoder_2", "transformer", "vae")
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    def __init__(
        self, *, tokenizer: Any, tokenizer_2: Any, text_encoder: Any, text_encoder_2: Any, transformer: Any, vae: Any,
        scheduler: Any, device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.text_encoder, self.text_encoder_2, self.transformer, self.vae = (
            frozen(part, self.device, dtype) for part in (text_encoder, text_encoder_2, transformer, vae)
        )
        self.flow = FlowMatching(scheduler)
        self.latents = KlLatents(self.vae, patch=2)
        self.size_multiple = self.latents.size_multiple
        self.native_size_px = 128 * self.latents.factor

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=load_part(folder, "tokenizer", CLIPTokenizer),
            tokenizer_2=load_part(folder, "tokenizer_2", T5TokenizerFast),
            text_encoder=load_weights(folder, "text_encoder", CLIPTextModel, dtype),
            text_encoder_2=load_weights(folder, "text_encoder_2", T5EncoderModel, dtype),
            transformer=load_weights(folder, "transformer", FluxTransformer2DModel, dtype),
            vae=load_weights(folder, "vae", AutoencoderKL, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer, "text_encoder": self.text_encoder}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        """``all`` also takes the modulations and the single-stream blocks' own projections, as ai-toolkit does."""
        if component == "text_encoder":
            return list(TEXT_TARGETS[kind])
        if kind == "attention":
            return [*ATTENTION, *FEED_FORWARD]
        singles = range(len(self.transformer.single_transformer_blocks))
        # By block: the model's last layer is called proj_out too.
        outputs = [f"single_transformer_blocks.{i}.proj_out" for i in singles]
        return [*ATTENTION, *FEED_FORWARD, "proj_mlp", "norm1.linear", "norm1_context.linear", *outputs,
                *(f"single_transformer_blocks.{i}.norm.linear" for i in singles)]  # fmt: skip

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """T5's states; the pooled vector is CLIP's."""
        pooled_BD = self.text_encoder(tokenize_fixed(self.tokenizer, prompts, self.device)).pooler_output
        hidden_BLD = self.text_encoder_2(tokenize_fixed(self.tokenizer_2, prompts, self.device, T5_TOKENS))[0]
        return TextEmbeds(hidden_BLD, pooled_BD).to(dtype=self.dtype)

    def truncated_text(self, prompt: str) -> str:
        return text_beyond(self.tokenizer_2, prompt, T5_TOKENS, special=1)

    # -- denoising

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        tokens = self.picture_tokens(latent_shape)
        return self.flow.make_schedule(name, steps, tokens=tokens, sigmas=even_sigmas(steps))

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return False

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        batch, _, rows, columns = latents_BCHW.shape
        guidance: Tensor | None = None
        if self.transformer.config.guidance_embeds:
            full = torch.full((batch,), TRAINING_GUIDANCE, device=self.device)
            guidance = full if guidance_B is None else guidance_B.to(self.device, torch.float32)
        hidden_BLD = text.hidden_BLD.to(self.dtype)
        with self._without_guidance() if guidance is not None and self._is_bypassed(guidance_B) else nullcontext():
            tokens_BLD = self.transformer(
                hidden_states=pack_2x2(latents_BCHW.to(self.dtype)),
                timestep=timesteps_B.to(self.device, self.dtype) / 1000,
                guidance=guidance,
                pooled_projections=None if text.pooled_BD is None else text.pooled_BD.to(self.dtype),
                encoder_hidden_states=hidden_BLD,
                txt_ids=torch.zeros(hidden_BLD.shape[1], 3, device=self.device, dtype=self.dtype),
                img_ids=self._places(rows // 2, columns // 2),
                return_dict=False,
            )[0]
        return unpack_2x2(tokens_BLD, rows, columns)

    def _is_bypassed(self, guidance_B: Tensor | None) -> bool:
        """Only where no guidance is asked for, which is in training: pictures are drawn with it."""
        return self.bypasses_guidance and guidance_B is None

    @contextmanager
    def _without_guidance(self) -> Iterator[None]:
        """Inside, the guidance adds nothing to the timestep's and the text's embeddings."""
        embedder: nn.Module = self.transformer.time_text_embed.guidance_embedder
        hook = embedder.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
        try:
            yield
        finally:
            hook.remove()

    def _places(self, rows: int, columns: int) -> Tensor:
        """``[rows * columns, 3]``: zero, row and column of each token."""
        # Made where they are used: a copy from the host would wait for the device in each step.
        axes = (torch.arange(rows, device=self.device), torch.arange(columns, device=self.device))
        row, column = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).to(self.dtype)
