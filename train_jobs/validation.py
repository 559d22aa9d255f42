"""The loss on pictures that are not trained on, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train_jobs.cache import TrainingCache
from train_jobs.peers import Peers
from train_jobs.samples import Sampler
from train_jobs.spec import ValidationSpec


class Validation:
    """Keeps `losses`, `(step, loss)` in the order of steps. Every worker computes a part of each and knows all.

    Noise and timesteps are the same each time, so the losses of two steps can be compared.
    """

    def __init__(self, spec: ValidationSpec, cache: TrainingCache, *, batch_size: int) -> None:
        self._spec = spec
        self._batches = _batches(cache, batch_size)
        self.losses: list[tuple[int, float]] = []

    def is_due(self, step: int, total_steps: int) -> bool:
        return bool(self._batches) and (step % self._spec.every_steps == 0 or step == total_steps)

    def run(self, sampler: Sampler, peers: Peers, step: int) -> float:
        """The mean loss over all pictures and places, noted for `step`."""
        total = torch.zeros(2, dtype=torch.float64)
        work = [(batch, place) for batch in self._batches for place in self._spec.places]
        for turn in range(-(-len(work) // peers.world_size)):
            # A worker without work computes the last once more: split models need all workers in every turn.
            index = turn * peers.world_size + peers.rank
            batch, place = work[min(index, len(work) - 1)]
            losses_B = sampler.validation_losses(batch, place)
            if index < len(work):
                total += torch.tensor([float(losses_B.sum()), len(losses_B)], dtype=torch.float64)
        peers.sum_(total)
        loss = float(total[0] / total[1])
        self.losses = [(at, value) for at, value in self.losses if at < step] + [(step, loss)]
        return loss

    @property
    def latest(self) -> float | None:
        return self.losses[-1][1] if self.losses else None

    @property
    def best_step(self) -> int | None:
        """The first step with the lowest loss; None before the first."""
        return min(self.losses, key=lambda found: found[1])[0] if self.losses else None

    @property
    def is_stalled(self) -> bool:
        """Whether `patience` losses in a row were above the lowest."""
        if self._spec.patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step, _ in self.losses) >= self._spec.patience


def _batches(cache: TrainingCache, batch_size: int) -> list[Sequence[int]]:
    """The validation's entries in batches of one bucket."""
    buckets = cache.buckets()
    by_bucket: dict[tuple[int, ...], list[int]] = {}
    for entry in cache.choose(lambda use: use.is_validation):
        by_bucket.setdefault(buckets[entry], []).append(entry)
    return [
        entries[start : start + batch_size]
        for entries in by_bucket.values()
        for start in range(0, len(entries), batch_size)
    ]
