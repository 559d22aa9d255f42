"""Z-Image: Qwen3 text encoder, a single-stream transformer, 16-channel VAE, flow matching.

Follows ``ZImagePipeline`` and ``train_dreambooth_lora_z_image.py`` of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from diffusion.families.base import LoraTargets, TextEmbeds, moved
from diffusion.families.flow import FlowMatching, even_sigmas
from diffusion.families.flow_family import FlowFamily
from diffusion.families.kl_family import KlFamily
from diffusion.families.parts import KlLatents, frozen, load_part, load_scheduler, load_weights, text_beyond

TOKENS_MAX = 512


class ZImage(KlFamily, FlowFamily):
    """The model's timestep runs from noise (0) to picture (1), and it predicts ``picture - noise``."""

    name = "z_image"
    architecture = "z-image"
    weights = ("text_encoder", "transformer", "vae")
    block_lists = ("layers",)
    last_layer = "all_final_layer"

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
        self.latents = KlLatents(self.vae, patch=2)
        self.size_multiple = self.latents.size_multiple
        self.native_size_px = 128 * self.latents.factor

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=load_part(folder, "tokenizer", AutoTokenizer),
            text_encoder=load_weights(folder, "text_encoder", AutoModel, dtype),
            transformer=load_weights(folder, "transformer", _Transformer, dtype),
            vae=load_weights(folder, "vae", AutoencoderKL, dtype),
            scheduler=load_scheduler(folder),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        """``ai_toolkit`` leaves the refiners out, which ``all`` takes."""
        attention = ["to_q", "to_k", "to_v", "to_out.0"]
        if kind == "ai_toolkit":
            parts = [f"attention.{part}" for part in attention]
            parts += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0"]
            return [f"layers.{i}.{part}" for i in range(len(self.transformer.layers)) for part in parts]
        return attention if kind == "attention" else [*attention, "w1", "w2", "w3"]

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """The last state but one of each real token; shorter prompts are padded and masked."""
        tokens = self.tokenizer(
            [self._in_chat(prompt) for prompt in prompts], padding="max_length", max_length=TOKENS_MAX,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        mask_BL = tokens.attention_mask.to(self.device).bool()
        states_BLD = self.text_encoder(
            input_ids=tokens.input_ids.to(self.device), attention_mask=mask_BL, output_hidden_states=True
        ).hidden_states[-2]
        # Real tokens first, whatever side the tokenizer pads.
        rows = [TextEmbeds(s[m][None], mask_BL=m[m][None].long()) for s, m in zip(states_BLD, mask_BL, strict=True)]
        return TextEmbeds.cat(rows).to(dtype=self.dtype)

    def _in_chat(self, prompt: str) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text

    def truncated_text(self, prompt: str) -> str:
        frame = len(self.tokenizer(self._in_chat(""), add_special_tokens=False).input_ids)
        return text_beyond(self.tokenizer, prompt, TOKENS_MAX, special=frame)

    # -- pictures and latents

    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The example script trains on the posterior's mode, so the deviation is zero."""
        mean, std = super().encode_image_moments(images_BCHW)
        return mean, torch.zeros_like(std)

    def initial_noise(self, latent_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """float32 in every dtype, as in the stock pipeline."""
        return moved(torch.randn((1, *latent_shape), generator=generator), self.device)

    # -- denoising

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        tokens = self.picture_tokens(latent_shape)
        return self.flow.make_schedule(name, steps, tokens=tokens, sigmas=even_sigmas(steps))

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 0

    def combine_guidance(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Counted from the positive side: a scale of 0 is no guidance."""
        return positive + scale * (positive - negative)

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        if text.mask_BL is None:
            raise ValueError("Z-Image needs to know which tokens are real")
        states = [s[:length].to(self.dtype) for s, length in zip(text.hidden_BLD, text.lengths, strict=True)]
        latents_C1HW = list(latents_BCHW.to(self.dtype).unsqueeze(2).unbind(0))
        with _apart(self.transformer.cap_embedder, [len(state) for state in states]):
            outputs = self.transformer(
                latents_C1HW, (1000 - timesteps_B.to(self.device)) / 1000, states, return_dict=False
            )[0]
        # float32, as the stock pipeline's scheduler is given it: its latents never are of the model's dtype.
        return -torch.stack([output.float() for output in outputs]).squeeze(2)


class _Transformer(ZImageTransformer2DModel):  # type: ignore[misc]
    """Prompts are padded to multiples of ``SEQ_MULTI_OF`` tokens and to no fewer, rounder lengths: the model was
    trained to see that padding, and places the picture after it."""

    def _prepare_sequence(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        feats_BLD, freqs_BLD, *others = super()._prepare_sequence(*args, **options)
        # diffusers cuts these off longer ones. A prompt of another length, padded to the same, would have another
        # stride and a compiled block of its own; ``contiguous`` does not see that in a single row.
        return feats_BLD, freqs_BLD.clone(memory_format=torch.contiguous_format), *others


@contextmanager
def _apart(embedder: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Prompts reach the layers of ``embedder`` as rows, padded, where diffusers joins their tokens to one row: a
    layer that treats each row of a batch in its own way has to know them."""
    lengths = [-(-length // SEQ_MULTI_OF) * SEQ_MULTI_OF for length in lengths]  # what diffusers pads each to

    def split(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(torch.split(inputs[0], lengths)), batch_first=True)

    def join(_: nn.Module, __: tuple[Tensor, ...], rows_BLD: Tensor) -> Tensor:
        return torch.cat([row_LD[:length] for row_LD, length in zip(rows_BLD, lengths, strict=True)])

    hooks = [embedder.register_forward_pre_hook(split), embedder.register_forward_hook(join)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
