"""How much of its GPU a training has needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GpuMemory:
    """`peak_bytes` is the most that torch held for tensors at once since the process began; `total_bytes` is the GPU's
    own."""

    peak_bytes: int
    total_bytes: int


def gpu_memory(device: torch.device) -> GpuMemory | None:
    """None on a CPU."""
    if device.type != "cuda":
        return None
    total_bytes: int = torch.cuda.get_device_properties(device).total_memory
    return GpuMemory(torch.cuda.max_memory_allocated(device), total_bytes)
