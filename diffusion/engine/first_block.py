"""Steps that reuse an earlier one: where a transformer's first block says almost the same, the others are left out.

As diffusers' ``FirstBlockCache`` defines it, after ParaAttention: what the first block adds to the picture's tokens is
compared with what it added in the last step that ran whole, as the mean of the absolute differences over the mean of
the absolute values. Up to the threshold, the sum of what the other blocks added then is added again. Here every
picture decides for itself, over its rows together, whatever is beside it in the batch. The picture changes: an option
for speed.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from diffusion.families.base import Family


class BlockCache:
    """One picture's. ``first`` and ``rest`` are ``[rows, tokens, D]``: what the first block and all others added."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.first: Tensor | None = None
        self.rest: Tensor | None = None
        self.steps_reused = 0

    def remember(self, first_BLD: Tensor, rest_BLD: Tensor) -> None:
        """Of a step that ran whole."""
        # Copies: a view would keep the whole batch's tensor.
        self.first, self.rest = first_BLD.clone(), rest_BLD.clone()

    def change(self, first_BLD: Tensor) -> Tensor:
        """A scalar, on the device: how far this is from what the first block added in the last whole step. Up to the
        threshold, that step's rest will do."""
        if self.first is None:
            raise RuntimeError("no step has run whole")
        return (first_BLD - self.first).abs().mean() / self.first.abs().mean()


class ShortFamily:
    """A family whose denoiser is its first block only: ``predict`` adds ``rest_BLD`` where the others would be."""

    def __init__(self, family: Family, tokens: int, rest_BLD: Tensor) -> None:
        denoiser = family.denoiser
        name, *later = family.block_lists
        self._head = _Head(_blocks(denoiser, name)[0], tokens, rest_BLD)
        lists = {name: nn.ModuleList([self._head]), **{other: nn.ModuleList() for other in later}}
        self.family = _with_denoiser(family, _with_children(denoiser, lists))

    @property
    def first(self) -> Tensor:
        """``[rows, tokens, D]``, after a call."""
        return self._head.added


class WatchedFamily:
    """A family whose denoiser runs whole; after a call it knows what its first block added, and what the others did."""

    def __init__(self, family: Family, tokens: int) -> None:
        denoiser = family.denoiser
        name = family.block_lists[0]
        head, *others = _blocks(denoiser, name)
        self._head = _Head(head, tokens)
        self._end = _End(tokens)
        last = getattr(denoiser, family.last_layer)
        watched = (
            nn.ModuleDict({key: _Last(layer, self._end) for key, layer in last.items()})
            if isinstance(last, nn.ModuleDict)
            else _Last(last, self._end)
        )
        children = {name: nn.ModuleList([self._head, *others]), family.last_layer: watched}
        self.family = _with_denoiser(family, _with_children(denoiser, children))

    @property
    def first(self) -> Tensor:
        return self._head.added

    @property
    def rest(self) -> Tensor:
        return self._end.tokens_BLD - self._head.made


class _Head(nn.Module):
    """The first block. Its output is the picture's tokens, after the text's where the block returns both."""

    added: Tensor
    made: Tensor

    def __init__(self, block: nn.Module, tokens: int, rest_BLD: Tensor | None = None) -> None:
        super().__init__()
        self.block, self._tokens, self._rest = block, tokens, rest_BLD

    def forward(self, *args: Any, **options: Any) -> Any:
        before_BLD = options["hidden_states"] if "hidden_states" in options else args[0]
        output = self.block(*args, **options)
        after_BLD = output[1] if isinstance(output, tuple) else output
        self.made = after_BLD[:, : self._tokens]
        self.added = self.made - before_BLD[:, : self._tokens]
        if self._rest is None:
            return output
        after_BLD = after_BLD.clone()
        # Rows beyond are padding of the batch.
        after_BLD[: len(self._rest), : self._tokens] += self._rest
        return (output[0], after_BLD) if isinstance(output, tuple) else after_BLD


class _End:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.tokens_BLD: Tensor


class _Last(nn.Module):
    """The layer after the last block."""

    def __init__(self, layer: nn.Module, end: _End) -> None:
        super().__init__()
        self.layer, self._end = layer, end

    def forward(self, hidden_BLD: Tensor, *args: Any, **options: Any) -> Any:
        self._end.tokens_BLD = hidden_BLD[:, : self._end.tokens]
        return self.layer(hidden_BLD, *args, **options)


def _blocks(denoiser: nn.Module, name: str) -> list[nn.Module]:
    return list(getattr(denoiser, name))


def _with_children(module: nn.Module, children: dict[str, Any]) -> nn.Module:
    """A copy that shares everything but these children: other threads look layers up in the module itself."""
    clone = copy.copy(module)
    clone.__dict__["_modules"] = {**module._modules, **children}
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        # A module that accelerate moves has its ``forward`` on the instance, bound to the original.
        hook.pre_forward(module)
        del clone.__dict__["forward"]
    return clone


def _with_denoiser(family: Family, denoiser: nn.Module) -> Family:
    clone: Any = copy.copy(family)
    clone.transformer = denoiser
    return clone  # type: ignore[no-any-return]
