"""For tests of what several workers do together, without processes."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadPeers:
    """Workers as threads of one process, in step. `together(n)` makes those of one training."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    @classmethod
    def together(cls, count: int, *, timeout_s: float = 60.0) -> list[ThreadPeers]:
        slots: list[Any] = [None] * count
        barrier = threading.Barrier(count, timeout=timeout_s)
        return [cls(rank, slots, barrier) for rank in range(count)]

    def gather(self, value: T) -> list[T]:
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def sum_(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))
