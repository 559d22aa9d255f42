"""Models and adapters of random weights for the benchmarks: the real component classes at chosen sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion.adapter import attach_lora
from diffusion.families import Family
from diffusion.lora import save_lora

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "model"


@dataclass(frozen=True)
class Size:
    """Of a UNet and of its pictures. ``steps`` and ``requests`` keep a run on two CPU cores within minutes."""

    channels: tuple[int, ...]
    text_width: int
    side_px: int
    sample_size: int
    heads: int
    steps: int
    requests: int


SIZES = {
    "tiny": Size((32, 64, 64), 64, 64, 16, heads=2, steps=8, requests=60),
    "mid": Size((128, 256, 512, 512), 512, 256, 32, heads=8, steps=4, requests=16),
}


def build_pipeline(size: Size, *, seed: int = 0) -> StableDiffusionPipeline:
    """A stock pipeline with the tokenizer of the shipped model. No weight is trained: pictures are noise."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=size.text_width, intermediate_size=4 * size.text_width,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    levels = len(size.channels)
    unet = UNet2DConditionModel(
        sample_size=size.sample_size, in_channels=4, out_channels=4, layers_per_block=2,
        block_out_channels=size.channels, cross_attention_dim=size.text_width, attention_head_dim=size.heads,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    )  # fmt: skip
    factor_levels = (size.side_px // size.sample_size).bit_length()
    vae = AutoencoderKL(
        block_out_channels=(16,) * factor_levels, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * factor_levels, up_block_types=("UpDecoderBlock2D",) * factor_levels,
        sample_size=size.side_px,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_adapters(family: Family, folder: Path, count: int, ranks: tuple[int, ...]) -> list[Path]:
    """``count`` LoRAs on the attention layers, their ranks taken in turn."""
    made: dict[int, tuple[dict[str, torch.Tensor], dict[str, str]]] = {}
    for rank in set(ranks[:count]):
        lora = attach_lora(family, rank=rank, alpha=rank)
        made[rank] = (dict(lora.state_dict()), lora.metadata(title=f"rank{rank}"))
        lora.detach()
    paths = []
    for i in range(count):
        layers, metadata = made[ranks[i % len(ranks)]]
        generator = torch.Generator().manual_seed(i)
        state = {key: 0.02 * torch.randn(value.shape, generator=generator) for key, value in layers.items()}
        paths.append(folder / f"adapter{i:03d}.safetensors")
        save_lora(paths[-1], state, metadata=metadata, dtype=family.dtype)
    return paths
