"""Models of random weights for `bench_train`: the component classes of each family at about half of its width.

Every part is made smaller alike, so that the share of a step that goes to the picture encoder, the text encoders and
the denoiser is about that of the model at full size. A benchmark with a full-size picture encoder before a small
denoiser would flatter whoever encodes only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusion.testing import t5_tokenizer, write_clip_tokenizer

SEED = 7


@dataclass(frozen=True)
class Shape:
    """`script` is the peer's, below diffusers' `examples`; each of `variants` is a set of its flags to measure."""

    script: str
    build: Callable[[Path], Any]
    variants: tuple[tuple[str, ...], ...]


def write_model(shape: str, folder: Path) -> tuple[Path, int]:
    """The model's folder, and the number of the denoiser's parameters."""
    torch.manual_seed(SEED)
    pipeline = SHAPES[shape].build(folder)
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    return folder / "model", sum(parameter.numel() for parameter in denoiser.parameters())


def _sd(folder: Path) -> Any:
    """Half of SD 1.x: its UNet begins with 320 channels, its VAE with 128, its text encoder has 768."""
    tokenizer = write_clip_tokenizer(folder / "words")
    return diffusers.StableDiffusionPipeline(
        vae=_vae((64, 128, 256, 256), channels=4), text_encoder=_clip(tokenizer, 384, layers=12), tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(160, 320, 640, 640), cross_attention_dim=384, attention_head_dim=8,
            layers_per_block=2,
        ),
        scheduler=_ddpm(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path) -> Any:
    """SDXL's UNet at 0.4 of its width with half of the deepest transformers' layers, its other parts at half."""
    tokenizer = write_clip_tokenizer(folder / "words")
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae((64, 128, 256, 256), channels=4),
        text_encoder=_clip(tokenizer, 384, layers=12), tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, 640, layers=32, projected=True),
        tokenizer_2=write_clip_tokenizer(folder / "words_2"),
        unet=diffusers.UNet2DConditionModel(
            sample_size=128, block_out_channels=(128, 256, 512), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 5), attention_head_dim=(2, 4, 8), cross_attention_dim=384 + 640,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=256 * 6 + 640,
        ),
        scheduler=_ddpm(),
    )  # fmt: skip


def _flux(folder: Path) -> Any:
    """FLUX.1 at a quarter of its width with 6 + 10 of its 19 + 38 blocks, and its text encoder in proportion."""
    tokenizer = write_clip_tokenizer(folder / "words")
    words = t5_tokenizer()
    return diffusers.FluxPipeline(
        vae=_vae((32, 64, 128, 128), channels=16, shift=0.1),
        text_encoder=_clip(tokenizer, 384, layers=12), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(words), d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_2=words,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=6, num_single_layers=10, attention_head_dim=128, num_attention_heads=6,
            joint_attention_dim=768, pooled_projection_dim=384, guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def _vae(widths: tuple[int, ...], *, channels: int, shift: float | None = None) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=channels, sample_size=512, shift_factor=shift,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
    )  # fmt: skip


def _clip(tokenizer: Any, width: int, *, layers: int, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def _ddpm() -> Any:
    return diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
    )


SHAPES = {
    "sd": Shape("text_to_image/train_text_to_image_lora.py", _sd, ((),)),
    "sdxl": Shape("dreambooth/train_dreambooth_lora_sdxl.py", _sdxl, ((),)),
    "flux": Shape("dreambooth/train_dreambooth_lora_flux.py", _flux, ((), ("--cache_latents",))),
}
