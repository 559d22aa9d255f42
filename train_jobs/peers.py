"""The workers that train one adapter together, as the training sees them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")

HOST_TIMEOUT = timedelta(hours=6)
"""How long one worker waits for another that still loads a model. One that is gone is noticed by its connection."""


class Peers(Protocol):
    """The workers that train one adapter together. Every worker calls each method equally often."""

    rank: int
    world_size: int

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all workers, in place."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in the order of ranks. Values are pickled."""
        ...


class Alone:
    """One worker."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, value: T) -> list[T]:
        """Its own."""
        return [value]


class TorchPeers:
    """The other workers, over the process group that Ray Train set up, and one of gloo for what lies in host memory.

    Made by all workers at the same place, after the process group.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._host = torch.distributed.new_group(backend="gloo", timeout=HOST_TIMEOUT)

    def sum_(self, tensor: Tensor) -> None:
        group = self._host if tensor.device.type == "cpu" else None
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM, group=group)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, value, group=self._host)
        return found
