"""A model whose parts take turns on the accelerator: what does not fit as a whole runs, slower, part by part."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from torch import Tensor, nn

from diffusion.families.base import Family


class _Turns(ModelHook):  # type: ignore[misc]
    """Before a part runs, the others leave the device. diffusers calls this for a VAE's ``encode`` and ``decode``."""

    def __init__(self, parts: list[nn.Module], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self._resident: nn.Module | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.bring(module)
        return args, kwargs

    def bring(self, part: nn.Module) -> None:
        if part is self._resident:
            return
        for other in self._parts:
            if other is not part:
                other.to("cpu")
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        part.to(self._device)
        self._resident = part


def offload(family: Family, device: torch.device) -> None:
    """``family``, loaded on the CPU, works on ``device`` from now on, with one part there at a time.

    LoRA slots and latents stay on the device. Not for compiled models: their weights must not move.
    """
    parts = [value for value in vars(family).values() if isinstance(value, nn.Module)]
    turns = _Turns(parts, device)
    for part in parts:
        add_hook_to_module(part, turns)
    for name, value in vars(family).items():
        if isinstance(value, Tensor):
            setattr(family, name, value.to(device))
    family.device = device
    encode = family.encode_image_moments

    def encode_on_device(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        # Families send pictures to where the VAE is, so it must be in place before they look.
        turns.bring(family.vae)
        return encode(images_BCHW)

    family.encode_image_moments = encode_on_device  # type: ignore[method-assign]
