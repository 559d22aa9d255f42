"""A denoiser whose frozen weights are split over several workers, because one of them could not hold it."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusion.families.base import Family


def shard_denoiser(family: Family, device: torch.device, *, whole: Collection[nn.Parameter]) -> None:
    """``family``, loaded on the CPU, works on ``device`` from now on, where the denoiser never lies as a whole: each
    worker of the default process group holds its share of every block, and a block's weights are gathered while it
    runs (``torch.distributed.fsdp.fully_shard``, the blocks being those that diffusers names as repeated or not to be
    split).

    From now on every worker must call the denoiser equally often. The ``whole`` parameters, an adapter's, are not
    split, and their gradients not summed.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored = set(whole)
    for parameter in ignored:
        parameter.data = parameter.data.to(device)
    denoiser = family.denoiser
    names = {
        *(getattr(denoiser, "_repeated_blocks", None) or ()),
        *(getattr(denoiser, "_no_split_modules", None) or ()),
    }
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names and module is not denoiser]
    for block in reversed(blocks):  # inner ones before those around them
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(denoiser, mesh=mesh, ignored_params=ignored)
    for name, value in vars(family).items():
        if isinstance(value, nn.Module) and value is not denoiser:
            value.to(device)
        elif isinstance(value, Tensor):
            setattr(family, name, value.to(device))
    family.device = device
