"""Stable Diffusion 1.x: CLIP text encoder, cross-attention UNet, 4-channel VAE, discrete noise schedule.

Follows ``StableDiffusionPipeline`` of diffusers; any folder with these five parts loads, whatever its sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.errors import ModelNotFound, SizeNotSupported, UnsupportedModel
from diffusion.families.base import Family, LoraTargets, TextEmbeds
from diffusion.families.discrete import SCHEDULERS, DiscreteNoise

UNET_TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "all": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
}
TEXT_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


class StableDiffusion1(Family):
    name = "sd1"
    architecture = "stable-diffusion-v1"

    def __init__(
        self, *, tokenizer: Any, text_encoder: Any, unet: Any, vae: Any, scheduler: Any,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = tokenizer
        self.text_encoder, self.unet, self.vae = (
            _frozen(part, self.device, dtype) for part in (text_encoder, unet, vae)
        )
        self.noise = DiscreteNoise(scheduler)
        self._vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        # The UNet handles odd latent sizes; 8 pixels is what the stock pipeline asks for.
        self.size_multiple = math.lcm(8, self._vae_factor)
        sample_size = unet.config.sample_size
        self.native_size = self._vae_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        return cls(
            tokenizer=_load_part(folder, "tokenizer", CLIPTokenizer),
            text_encoder=_load_part(folder, "text_encoder", CLIPTextModel, dtype=dtype, use_safetensors=True),
            unet=_load_part(folder, "unet", UNet2DConditionModel, dtype=dtype, use_safetensors=True),
            vae=_load_part(folder, "vae", AutoencoderKL, dtype=dtype, use_safetensors=True),
            scheduler=_load_part(folder, "scheduler", _scheduler_class(folder)),
            device=device,
            dtype=dtype,
        )

    # -- parts

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.unet
        return unet

    @property
    def lora_components(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        return list({"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}[component][kind])

    # -- text

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        ids_BL = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)  # fmt: skip
        return TextEmbeds(self.text_encoder(ids_BL)[0].to(self.dtype))

    def truncated_text(self, prompt: str) -> str:
        kept_max = self.tokenizer.model_max_length - 2  # start and end tokens
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[kept_max:])).strip() if len(ids) > kept_max else ""

    # -- pictures and latents

    @property
    def native_size_px(self) -> int:
        size_px: int = self.unet.config.sample_size * self._vae_factor
        return size_px

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        if min(width, height) <= 0 or width % self.size_multiple or height % self.size_multiple:
            raise SizeNotSupported(width, height, self.size_multiple)
        return self.unet.config.in_channels, height // self._vae_factor, width // self._vae_factor

    @torch.no_grad()
    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images_BCHW.to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        scaled = latents_BCHW.to(self.dtype) / self.vae.config.scaling_factor
        images: Tensor = self.vae.decode(scaled, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    # -- denoising

    @property
    def schedulers(self) -> tuple[str, ...]:
        return tuple(SCHEDULERS)

    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        return self.noise.make_schedule(name, steps)

    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        return guidance_scale > 1

    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        output: Tensor = self.unet(
            latents_BCHW.to(self.dtype), timesteps_B, encoder_hidden_states=text.hidden_BLD.to(self.dtype),
            return_dict=False,
        )[0]  # fmt: skip
        return output

    # -- training

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        return self.noise.sample_timesteps(batch_size, generator).to(self.device)

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.add_noise(latents_BCHW, noise_BCHW, timesteps_B)

    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        return self.noise.prediction_target(latents_BCHW, noise_BCHW, timesteps_B)

    def loss_weight(self, timesteps_B: Tensor, snr_gamma: float | None = None) -> Tensor:
        return self.noise.loss_weight(timesteps_B, snr_gamma)


def _frozen(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    # diffusers warns about any cast by ``to``, also one to the dtype that the weights already have.
    part = part.to(device) if part.dtype == dtype else part.to(device, dtype)
    return part.eval().requires_grad_(False)


def _load_part(folder: Path, part: str, cls: Any, **options: Any) -> Any:
    """``cls.from_pretrained`` on one subfolder, offline; loader errors become ours, without their paths."""
    if not (folder / part).is_dir():
        raise ModelNotFound(part)
    try:
        return cls.from_pretrained(folder / part, local_files_only=True, **options)
    except OSError as exc:
        raise ModelNotFound(part) from exc
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as exc:
        raise UnsupportedModel(f"its {part} cannot be read as {cls.__name__}") from exc


def _scheduler_class(folder: Path) -> Any:
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelNotFound("scheduler") from exc
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UnsupportedModel(f"scheduler class {name!r}")
    return cls
