"""The workers that train one adapter together, as the training sees them."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed
from torch import Tensor


class Peers(Protocol):
    """The workers that train one adapter together."""

    rank: int
    world_size: int

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all workers, in place. Every worker calls it equally often."""
        ...


class Alone:
    """One worker."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""


class TorchPeers:
    """The other workers, over the process group that Ray Train set up."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def sum_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
