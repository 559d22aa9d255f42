"""How far a training is. No torch here: whoever shows it imports this."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """After `step` of `total_steps` updates. `eta_s` is None before the speed is known."""

    step: int
    total_steps: int
    loss: float
    smoothed_loss: float
    learning_rate: float
    steps_per_s: float
    eta_s: float | None
    validation_loss: float | None = None
