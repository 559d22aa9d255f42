"""What a model family is: everything the engine and the training loop need to know about a model, and no more.

Shape legend: B pictures, C latent channels, H W latent (or pixel) rows and columns, L tokens, D features.

Latents cross this interface unpacked, ``[B, C, H, W]``; a family that packs them into tokens (FLUX, Qwen-Image) does
so inside ``predict``. Timesteps cross it in the scheduler's own unit (0..1000, whole or not); a family that wants
0..1 divides inside ``predict``. Schedulers are the diffusers classes, one instance per picture, so a flow-matching
family differs only in ``make_schedule`` and in the training arithmetic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from diffusion.families.flow_weights import LossWeighting

LoraTargets = Literal["attention", "all", "ai_toolkit"]
"""``attention`` are the attention's layers, ``all`` also those of the feed-forward networks and FLUX.1's modulations.
``ai_toolkit`` are those of ai-toolkit: every linear layer of a transformer's blocks, or of a whole UNet, whose 1x1
convolutions count as such."""


@dataclass(frozen=True)
class NoiseLevels:
    """Which noise levels a training draws; the names and meanings are ai-toolkit's.

    ``kind`` is for flow models: ``sigmoid`` (logit-normal), ``linear`` (uniform), or ``shift`` (uniform, moved towards
    noise for larger pictures as when sampling). ``bias``: ``content`` prefers noisy, ``style`` clean latents.
    ``first`` and ``last`` of 0..999 bound the part of the way from noise (0) to picture (999) that is trained.
    """

    kind: Literal["sigmoid", "linear", "shift"] = "sigmoid"
    bias: Literal["balanced", "content", "style"] = "balanced"
    first: int = 0
    last: int = 999

    def places(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        """``[B]`` places in 0..1 on the way from noise to picture, on the CPU. Each takes one random number."""
        place_B = torch.rand((batch_size,), generator=generator)
        if self.bias == "content":
            place_B = place_B**3
        elif self.bias == "style":
            place_B = 1 - place_B**3
        return (self.first + place_B * (self.last + 1 - self.first)) / 1000


ALL_LEVELS = NoiseLevels()


@dataclass(frozen=True)
class TextEmbeds:
    """Encoded prompts, one row each.

    ``hidden_BLD`` per-token states; ``pooled_BD`` one vector per prompt (SDXL, SD3, FLUX); ``mask_BL`` 1 for real
    tokens, which come first, for families whose prompts differ in length (Qwen-Image, Z-Image).
    """

    hidden_BLD: Tensor
    pooled_BD: Tensor | None = None
    mask_BL: Tensor | None = None

    def __len__(self) -> int:
        return self.hidden_BLD.shape[0]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The real tokens of each row. Read once: asking a mask on a GPU waits for all that the GPU has to do."""
        if self.mask_BL is None:
            return (self.hidden_BLD.shape[1],) * len(self)
        return tuple(int(length) for length in self.mask_BL.sum(dim=1).tolist())

    def rows(self, index: slice | Sequence[int] | Tensor) -> TextEmbeds:
        """The chosen rows, still batched."""
        picked = index if isinstance(index, slice | Tensor) else list(index)
        return TextEmbeds(**{name: tensor[picked] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEmbeds:
        """Moved, and floating-point parts cast."""
        return TextEmbeds(
            **{
                name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                for name, tensor in self.tensors().items()
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by field name: ``TextEmbeds(**embeds.tensors())`` gives it back (for caches)."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def padded_to(self, length: int) -> TextEmbeds:
        """Lengthened with zeros, which the mask marks as padding. Raises ValueError where there is no mask."""
        missing = length - self.hidden_BLD.shape[1]
        if missing <= 0:
            return self
        if self.mask_BL is None:
            raise ValueError("prompts of different lengths need a mask")
        hidden_BLD = nn.functional.pad(self.hidden_BLD, (0, 0, 0, missing))
        return TextEmbeds(hidden_BLD, self.pooled_BD, nn.functional.pad(self.mask_BL, (0, missing)))

    @staticmethod
    def cat(parts: Sequence[TextEmbeds]) -> TextEmbeds:
        """Stacked along B. Shorter prompts are padded to the longest. Raises ValueError where one has no mask."""
        longest = max(part.hidden_BLD.shape[1] for part in parts)
        columns: dict[str, list[Tensor]] = {}
        for part in parts:
            for name, tensor in part.padded_to(longest).tensors().items():
                columns.setdefault(name, []).append(tensor)
        return TextEmbeds(**{name: torch.cat(tensors) for name, tensors in columns.items()})


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host to ``device``, without a wait for what that has to do before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Family(ABC):
    """One loaded model. Weights are frozen and in eval mode; nothing here is safe to call from two threads at once.

    The methods under *training* keep gradients; callers that want none wrap them in ``torch.no_grad()``.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    """``modelspec.architecture`` of the base model, without ``/lora``."""
    weights: ClassVar[tuple[str, ...]]
    """The parts of a model folder of which ``load`` reads weights, where they are there."""
    block_lists: ClassVar[tuple[str, ...]] = ()
    """The denoiser's lists of blocks, in the order in which they run one after another; none for UNets."""
    last_layer: ClassVar[str] = "norm_out"
    """The denoiser's layer after the last block."""
    device: torch.device
    dtype: torch.dtype
    size_multiple: int
    """Both picture sides must be multiples of this many pixels."""
    vae: Any
    """diffusers' autoencoder of the model, for its tiling."""
    bypasses_guidance: bool = False
    """Whether a guidance-distilled FLUX.1 is trained without its guidance's embedding; other families ignore it."""
    native_size_px: int
    """Width and height of the pictures that the model was made for."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Self:
        """From a diffusers folder. Raises ModelNotFound, UnsupportedModel."""

    # -- parts

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The module that ``predict`` calls, for compiling, sharding and gradient checkpointing."""

    @property
    @abstractmethod
    def lora_components(self) -> Mapping[str, nn.Module]:
        """Modules that can carry a LoRA, by the first part of their key names in a LoRA file."""

    @abstractmethod
    def lora_target_modules(self, component: str, kind: LoraTargets = "attention") -> list[str]:
        """Names (suffixes) of the layers to adapt in ``component``."""

    # -- text

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        """One row per prompt, on the family's device. Longer prompts are cut; see ``truncated_text``."""

    @abstractmethod
    def truncated_text(self, prompt: str) -> str:
        """The part of ``prompt`` that ``encode_prompts`` leaves out; empty when nothing is lost."""

    # -- pictures and latents

    @abstractmethod
    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """``(C, H, W)`` of one picture's latents. Raises SizeNotSupported."""

    @abstractmethod
    def encode_image_moments(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures in -1..1, without gradients.

        Both are in the scaled space the denoiser works in (the VAE's shift and scaling factor are applied), so
        ``mean + std * noise`` is a sample ready for ``add_noise``, and both can be cached.
        """

    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One sample of the scaled latents of pictures in -1..1. ``generator`` is a CPU generator."""
        mean, std = self.encode_image_moments(images_BCHW)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
        return mean + std * noise.to(mean.device)

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures ``[B, 3, H, W]``, float32 in 0..1, of scaled latents."""

    def initial_noise(self, latent_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """``[1, C, H, W]`` standard normal, drawn on the CPU so that a seed means the same on every device."""
        noise = torch.randn((1, *latent_shape), generator=generator, dtype=self.dtype)
        return moved(noise, self.device)

    # -- denoising

    @property
    @abstractmethod
    def schedulers(self) -> Mapping[str, str]:
        """Names that ``make_schedule`` takes, each with the diffusers class that it means."""

    def scheduler_name(self, schedule: Any) -> str:
        """The name of a schedule's kind: the first that ``make_schedule`` takes, or its class where it takes none."""
        made = type(schedule).__name__
        return next((name for name, cls in self.schedulers.items() if cls == made), made)

    @abstractmethod
    def make_schedule(self, name: str | None, steps: int, latent_shape: tuple[int, ...]) -> Any:
        """A fresh diffusers scheduler with its timesteps set, on the CPU; None means the model's own.

        Raises SettingNotSupported. ``latent_shape`` is for families whose timesteps depend on the picture's size.
        """

    @abstractmethod
    def uses_negative_prompt(self, guidance_scale: float) -> bool:
        """Whether this guidance needs a second denoiser row with the negative prompt."""

    def combine_guidance(self, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), in the form diffusers uses."""
        return negative + scale * (positive - negative)

    @abstractmethod
    def predict(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, text: TextEmbeds, *, guidance_B: Tensor | None = None
    ) -> Tensor:
        """The denoiser's raw output ``[B, C, H, W]``, in its own dtype (the inputs are cast to it); float32 for a
        family whose scheduler is given that.

        ``guidance_B`` is for guidance-distilled models; others ignore it.
        """

    def picture_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Tokens that the denoiser makes of a picture's latents ``(C, H, W)``; for families with ``block_lists``."""
        raise NotImplementedError

    # -- training

    @abstractmethod
    def sample_timesteps(
        self, batch_size: int, generator: torch.Generator | None = None, levels: NoiseLevels = ALL_LEVELS,
        latent_shape: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """``[B]`` random training timesteps. ``generator`` is a CPU generator; the result is on the device.

        ``latent_shape`` is for ``levels.kind`` of ``shift``.
        """

    def conv_target_modules(self, component: str, kind: LoraTargets = "all") -> list[str]:
        """Names (suffixes) of the convolutions that a LoRA may adapt in ``component``, with a rank of their own.

        None for transformers.
        """
        return []

    @abstractmethod
    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The noisy latents that ``predict`` is trained on."""

    @abstractmethod
    def prediction_target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """What ``predict`` should have said: noise, velocity, sample or flow."""

    @abstractmethod
    def loss_weight(
        self, timesteps_B: Tensor, snr_gamma: float | None = None, weighting: LossWeighting = "none"
    ) -> Tensor:
        """``[B]`` weights of the per-picture mean squared error; ones, or min-SNR-gamma where it applies.

        ``weighting`` is for flow models.
        """
