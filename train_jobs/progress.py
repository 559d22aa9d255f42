"""How far a training is. No torch here: whoever shows it imports this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """After `step` of `total_steps` updates. `eta_s` is None before the speed is known.

    `best_step` has the lowest validation loss so far. The GPU's memory is that of `gpu_memory.GpuMemory`.
    """

    step: int
    total_steps: int
    loss: float
    smoothed_loss: float
    learning_rate: float
    steps_per_s: float
    eta_s: float | None
    validation_loss: float | None = None
    best_step: int | None = None
    gpu_memory_peak_bytes: int | None = None
    gpu_memory_total_bytes: int | None = None


ABSENT_WHERE_NONE = frozenset({"validation_loss", "best_step", "gpu_memory_peak_bytes", "gpu_memory_total_bytes"})
"""In reports: what a training without a validation, or without a GPU, does not have."""
