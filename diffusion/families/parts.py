"""Loading the parts of a diffusers folder, and what several families share: the KL autoencoder and CLIP's tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors import SafetensorError
from torch import Tensor

from diffusion.errors import ModelNotFound, SizeNotSupported, UnsupportedModel
from diffusion.quantized import Quantization

_QUANTIZATION: ContextVar[Quantization | None] = ContextVar("quantization", default=None)


@contextmanager
def quantized(quantization: Quantization | None) -> Iterator[None]:
    """Inside, parts are rounded as they are read, before they go to a device that could not hold them whole."""
    token = _QUANTIZATION.set(quantization)
    try:
        yield
    finally:
        _QUANTIZATION.reset(token)


def load_part(folder: Path, part: str, cls: Any, **options: Any) -> Any:
    """``cls.from_pretrained`` on one subfolder, offline. Raises ModelNotFound, UnsupportedModel, without paths."""
    if not (folder / part).is_dir():
        raise ModelNotFound(part)
    try:
        return cls.from_pretrained(folder / part, local_files_only=True, **options)
    except OSError as exc:
        raise ModelNotFound(part) from exc
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as exc:
        raise UnsupportedModel(f"its {part} cannot be read as {cls.__name__}") from exc


def load_weights(folder: Path, part: str, cls: Any, dtype: torch.dtype) -> Any:
    """A part with weights, from safetensors only. Raises what ``load_part`` and ``quantized`` raise."""
    loaded = load_part(folder, part, cls, dtype=dtype, use_safetensors=True)
    quantization = _QUANTIZATION.get()
    if quantization is not None:
        quantization.apply(part, loaded)
    return loaded


def load_scheduler(folder: Path) -> Any:
    """The scheduler of the class that the folder names. Raises ModelNotFound, UnsupportedModel."""
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError) as exc:
        raise ModelNotFound("scheduler") from exc
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise UnsupportedModel(f"scheduler class {name!r}")
    return load_part(folder, "scheduler", cls)


def frozen(part: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On the device, in the dtype, in eval mode and without gradients."""
    # diffusers warns about any cast by ``to``, also one to the dtype that the weights already have.
    part = part.to(device) if part.dtype == dtype else part.to(device, dtype)
    return part.eval().requires_grad_(False)


def check_size(width: int, height: int, multiple: int) -> None:
    """Raises SizeNotSupported unless both sides are positive multiples of ``multiple`` pixels."""
    if min(width, height) <= 0 or width % multiple or height % multiple:
        raise SizeNotSupported(width, height, multiple)


class KlLatents:
    """``AutoencoderKL`` seen from the denoiser: latents are ``(raw - shift) * scaling``.

    ``patch``: how many latent rows and columns the denoiser takes at once. ``as_sdxl``: as the stock SDXL pipelines do,
    and no others, latents are brought to the mean and deviation that the VAE's configuration may name, and the VAE is
    asked in float32 where it says ``force_upcast``: for encoding, and for decoding from float16, which overflows.
    """

    def __init__(self, vae: Any, *, patch: int = 1, as_sdxl: bool = False) -> None:
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.size_multiple = math.lcm(8, self.factor) if patch == 1 else self.factor * patch
        self.channels = int(vae.config.latent_channels)
        self._upcasts = as_sdxl and bool(vae.config.get("force_upcast"))
        mean, std = (vae.config.get(name) if as_sdxl else None for name in ("latents_mean", "latents_std"))
        self._mean_std = None if mean is None or std is None else (_by_channel(mean), _by_channel(std))

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """``(C, H, W)`` of a picture's latents. Raises SizeNotSupported."""
        check_size(width, height, self.size_multiple)
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures in -1..1."""
        with self._in_float32(self._upcasts):
            posterior = self.vae.encode(images_BCHW.to(self.vae.device, self.vae.dtype)).latent_dist
        center, scale = self._center_and_scale(posterior.mean)
        return (posterior.mean - center) * scale, posterior.std * scale

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures in 0..1, float32."""
        with self._in_float32(self._upcasts and self.vae.dtype == torch.float16):
            center, scale = self._center_and_scale(latents_BCHW)
            raw = latents_BCHW.to(self.vae.dtype) / scale + center
            images: Tensor = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    def _center_and_scale(self, latents_BCHW: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Of the VAE's own latents; ``[1, C, 1, 1]`` in float32 where channels differ."""
        scale: float = self.vae.config.scaling_factor
        if self._mean_std is None:
            return self.vae.config.get("shift_factor") or 0.0, scale
        mean, std = (tensor.to(latents_BCHW.device) for tensor in self._mean_std)
        return mean, scale / std

    @contextmanager
    def _in_float32(self, upcasts: bool) -> Iterator[None]:
        dtype = self.vae.dtype
        if not upcasts or dtype == torch.float32:
            yield
            return
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(dtype)


def _by_channel(values: Sequence[float]) -> Tensor:
    """``[1, C, 1, 1]``."""
    return torch.tensor(values).view(1, -1, 1, 1)


def tokenize_fixed(tokenizer: Any, prompts: Sequence[str], device: torch.device, length: int | None = None) -> Tensor:
    """``[B, L]`` token ids, padded and cut to ``length`` (default: the tokenizer's own)."""
    ids_BL: Tensor = tokenizer(
        list(prompts), padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)  # fmt: skip
    return ids_BL


def text_beyond(tokenizer: Any, prompt: str, length: int, special: int) -> str:
    """What ``tokenize_fixed`` cuts off; ``special`` tokens of the length are not the prompt's."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    kept_max = length - special
    return str(tokenizer.decode(ids[kept_max:])).strip() if len(ids) > kept_max else ""
