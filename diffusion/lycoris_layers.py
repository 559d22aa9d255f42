"""LoKr and LoHa as networks to be trained, through peft's layers.

A layer's change is ``alpha / rank`` times a Kronecker product (LoKr) or a Hadamard product of two low-rank matrices
(LoHa), Yeh et al. 2023, arXiv:2309.14859. Key names are peft's, which are LyCORIS' own: ``<path>.lokr_w1`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoHaConfig, LoKrConfig
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.layer import LoKrLayer
from torch import Tensor, nn

from diffusion.errors import SettingNotSupported
from diffusion.lycoris import RANK_MAX, pair_rank, stays_product

FULL_RANK = 2**30
"""Above half of every layer's sides, from where on LyCORIS keeps a factor whole."""


@dataclass(frozen=True)
class Lycoris:
    """``factor`` is LoKr's: the side of the smaller matrix, -1 for the square root of the layer's. With ``full_rank``
    the larger matrix is whole, and rank and alpha have no say."""

    kind: Literal["lokr", "loha"]
    factor: int = -1
    full_rank: bool = False

    def config(
        self, *, rank: int, alpha: float, targets: Sequence[str], patterns: Mapping[str, dict[str, float]]
    ) -> LoKrConfig | LoHaConfig:
        """peft's settings; a new adapter changes nothing, because one of its factors is zero."""
        rank = FULL_RANK if self.full_rank else rank
        common: dict[str, Any] = {"r": rank, "alpha": alpha, "target_modules": list(targets)}
        if not self.full_rank:
            common |= patterns
        if self.kind == "loha":
            return LoHaConfig(**common)
        return LoKrConfig(**common, decompose_factor=self.factor, init_weights="lycoris")

    def network_args(self) -> dict[str, str]:
        """As LyCORIS' trainer notes them in ``ss_network_args``."""
        if self.kind == "loha":
            return {"algo": "loha"}
        return {"algo": "lokr", "factor": str(self.factor), "full_matrix": str(self.full_rank)}


class ProductLinear(LoKrLinear):  # type: ignore[misc]
    """peft's layer without the matrix of the base layer's size that it makes, and keeps for the gradients, in a call.

    For a wide transformer those weigh as much as its weights in float32, and take as many multiplications.
    """

    def _get_delta_activations(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        w1, w2 = (self._matrix(name, adapter_name) for name in ("lokr_w1", "lokr_w2"))
        x_nqv = self._cast_input_dtype(x, w1.dtype).unflatten(-1, (w1.shape[1], w2.shape[1]))
        changed = torch.einsum("pq,...qu->...pu", w1 * self.scaling[adapter_name], x_nqv @ w2.T)
        return changed.flatten(-2)

    def _matrix(self, name: str, adapter_name: str) -> Tensor:
        whole = getattr(self, name)
        if adapter_name in whole:
            matrix: Tensor = whole[adapter_name]
            return matrix
        first, second = (getattr(self, f"{name}_{part}")[adapter_name] for part in "ab")
        return torch.matmul(first, second)


def use_products(component: nn.Module) -> None:
    """LoKr's linear layers become ``ProductLinear``."""
    for _, layer in _layers(component):
        if type(layer) is LoKrLinear:
            # Past nn.Module's own __setattr__, which knows parameters and submodules.
            object.__setattr__(layer, "__class__", ProductLinear)


def settle_scales(component: nn.Module, adapter_name: str) -> None:
    """LyCORIS applies no ``alpha / rank`` where both of LoKr's matrices are whole, peft does: here it is left out too,
    as every reader of the file will."""
    for _, layer in _layers(component):
        if adapter_name in getattr(layer, "lokr_w1", ()) and adapter_name in layer.lokr_w2:
            layer.r[adapter_name], layer.alpha[adapter_name] = 1, 1.0
            layer.scaling[adapter_name] = 1.0


def check_ranks(component: nn.Module, adapter_name: str) -> None:
    """Raises SettingNotSupported where a layer's change has a higher rank than the engine serves as a pair."""
    for path, layer in _layers(component):
        factors = _factors(layer, adapter_name)
        rank = pair_rank(factors)
        is_linear = isinstance(layer.get_base_layer(), nn.Linear)
        if rank > RANK_MAX and not (is_linear and stays_product(factors)):
            advice = "a smaller rank" if isinstance(layer, LoHaLayer) else "'lokr_full_rank: false', or a smaller rank"
            raise SettingNotSupported(
                "network",
                f"layer {path} would have rank {rank}, and {RANK_MAX} is the most that is served; use {advice}",
            )


def alphas(component: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """``<path>.alpha`` of every layer; 1 where it has no effect."""
    return {
        f"{path}.alpha": torch.tensor(float(layer.alpha[adapter_name]))
        for path, layer in _layers(component)
        if adapter_name in layer.alpha
    }


def _layers(component: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in component.named_modules() if isinstance(m, LoKrLayer | LoHaLayer))


def _factors(layer: Any, adapter_name: str) -> dict[str, Tensor]:
    held = {name: getattr(layer, name) for name in layer.adapter_layer_names}
    return {name: parameters[adapter_name] for name, parameters in held.items() if adapter_name in parameters}
