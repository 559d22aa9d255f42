"""The learning rate of each update, as a pure function: nothing to keep in a checkpoint."""

from __future__ import annotations

import math

from train_jobs.spec import OptimizeSpec, ScheduleSpec


def learning_rate_at(step: int, spec: OptimizeSpec) -> float:
    """The rate of update `step`, counted from 0. Formulas: torch.optim.lr_scheduler's closed forms."""
    schedule: ScheduleSpec = spec.schedule
    rate, total = spec.learning_rate, schedule.total_steps or spec.steps
    low = schedule.min_learning_rate
    if schedule.type in {"cosine", "cosine_with_restarts"}:
        place = step % total if schedule.type == "cosine_with_restarts" else step
        return low + (rate - low) * (1 + math.cos(math.pi * place / total)) / 2
    if schedule.type == "linear":
        done = min(step, total) / total
        return rate * (schedule.start_factor + (schedule.end_factor - schedule.start_factor) * done)
    if schedule.type == "step":
        return rate * float(schedule.gamma ** (step // schedule.step_size))
    if schedule.type == "constant_with_warmup":
        return rate * min(1.0, step / max(1, schedule.warmup_steps)) if schedule.warmup_steps else rate
    return rate * schedule.factor if step < total else rate
