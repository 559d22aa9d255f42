"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """After each update `average = decay * average + (1 - decay) * weights`, with the same decay from the first."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._parameters.items():
            self._average[name].lerp_(parameter, 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in self._average.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state`; without one the average begins at the weights as they are."""
        for name, parameter in self._parameters.items():
            self._average[name] = state.get(name, parameter.detach()).to(parameter.device, parameter.dtype).clone()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the weights are the average; after it they are as they were."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
