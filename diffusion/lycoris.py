"""LoHa and LoKr weights as plain LoRA pairs, exactly, or as Kronecker products where a pair would be too large.

Both write a layer's change as a product of small matrices, so factors of its rank exist in closed form and nothing is
approximated. Where LoKr keeps its matrices whole that rank is the layer's own: such a change stays what it is.
Formulas: Yeh et al. 2023, arXiv:2309.14859, sections 4.1 (LoHa, a Hadamard product) and 4.2 (LoKr, a Kronecker
product); key names as LyCORIS and peft write them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import LoraInvalid
from diffusion.lora_keys import LOHA, LOKR

RANK_MAX = 1536
"""A whole LoKr of the widest layers of SD 1.x, SDXL and SD 3 medium, whose pairs weigh up to twice the layer. Wider
layers' would leave no room for a model beside them."""
CHEAP_RANK_MAX = 128
"""Up to here a pair costs about what the products with the two matrices of a LoKr do."""


@dataclass(frozen=True)
class Kronecker:
    """A linear layer's change ``kron(w1, w2)``: ``w1 [o1, i1]``, which has alpha / rank in it, and ``w2 [o2, i2]``.

    It acts on ``x [i1 * i2]`` as ``w1 X w2^T`` does on ``X [i1, i2]``: of a layer of 3072 by 3072 that takes 3.6 % of
    the layer's multiplications where ``w1`` is 48 by 48.
    """

    w1: Tensor
    w2: Tensor

    @property
    def outs(self) -> int:
        return self.w1.shape[0] * self.w2.shape[0]

    @property
    def ins(self) -> int:
        return self.w1.shape[1] * self.w2.shape[1]


def take_products(
    raw: Mapping[str, Tensor], *, but_not: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Kronecker]]:
    """``raw`` without the LoKr modules that stay products, and these by path. ``but_not``: paths that need a pair."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in raw.items():
        path, part = _path_and_part(key)
        if part in LOKR and path not in but_not:
            modules.setdefault(path, {})[part] = tensor
    products: dict[str, Kronecker] = {}
    for path, parts in modules.items():
        if stays_product(parts):
            (w1, rank1), (w2, rank2) = (_whole(path, parts, name) for name in ("lokr_w1", "lokr_w2"))
            products[path] = Kronecker(w1 * _scale(path, raw.get(f"{path}.alpha"), rank2 or rank1), w2)
    return {key: tensor for key, tensor in raw.items() if _path_and_part(key)[0] not in products}, products


def stays_product(parts: Mapping[str, Tensor]) -> bool:
    """Whether ``take_products`` takes a LoKr module of these parts, by their shapes alone.

    A whole matrix tells a linear layer from a convolution, whose pair it is better to have; a decomposed one does not,
    so those stay only where there could be no pair.
    """
    is_complete = all(name in parts or {f"{name}_a", f"{name}_b"} <= parts.keys() for name in ("lokr_w1", "lokr_w2"))
    if not is_complete or not parts.keys() <= set(LOKR) or any(tensor.ndim != 2 for tensor in parts.values()):
        return False
    return pair_rank(parts) > (CHEAP_RANK_MAX if "lokr_w2" in parts else RANK_MAX)


def _path_and_part(key: str) -> tuple[str, str]:
    path, _, part = key.removesuffix(".weight").rpartition(".")
    return path, part


def _scale(path: str, alpha: Tensor | None, rank: int) -> float:
    """alpha / rank. LyCORIS ignores alpha where neither matrix is decomposed: rank 0 says so."""
    if alpha is not None and alpha.numel() != 1:
        raise LoraInvalid(f"the alpha of {path!r} is not one number")
    return 1.0 if alpha is None or rank == 0 else float(alpha) / rank


def _whole(path: str, parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, int]:
    """One of the two matrices, and the rank that it is decomposed to, 0 for none."""
    if name in parts:
        return parts[name].float(), 0
    U, V, rank = _factors(path, parts, name)
    return U @ V, rank


def expand(raw: Mapping[str, Tensor], *, down: str, up: str) -> dict[str, Tensor]:
    """``raw`` with every LoHa and LoKr module replaced by its pair, named ``<path>.<down>`` and ``<path>.<up>``.

    A convolution's pair is flat: ``[rank, in * kernel]``. Other keys stay. Raises LoraInvalid for an incomplete module,
    and for Tucker-decomposed ones, which have no pair of this form.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        path, part = _path_and_part(key)
        if part.startswith(("hada_", "lokr_")):
            modules.setdefault(path, {})[part] = tensor
        else:
            kept[key] = tensor
    for path, parts in modules.items():
        if any(tensor.ndim < 2 for tensor in parts.values()):
            raise LoraInvalid(f"a weight of {path!r} is not a matrix")
        alpha = kept.pop(f"{path}.alpha", None)
        A, B, rank = _loha(path, parts) if any(part in LOHA for part in parts) else _lokr(path, parts)
        expanded = A.shape[0]
        kept[f"{path}.{down}"], kept[f"{path}.{up}"] = A, B
        # The pair is scaled by alpha / its own rank, the file's module by alpha / rank.
        kept[f"{path}.alpha"] = torch.tensor(_scale(path, alpha, rank) * expanded)
    return kept


def pair_of(path: str, product: Kronecker) -> tuple[Tensor, Tensor]:
    """The product as ``A`` and ``B``, for a layer that cannot have it as it is. Raises LoraInvalid: it is too wide."""
    A, B, _ = _lokr(path, {"lokr_w1": product.w1, "lokr_w2": product.w2})
    return A, B


def pair_rank(parts: Mapping[str, Tensor]) -> int:
    """The rank of the pair that ``expand`` makes of one module's ``parts``, from their shapes alone."""
    if any(part in LOHA for part in parts):
        return parts["hada_w1_b"].shape[0] * parts["hada_w2_b"].shape[0]
    rank = 1
    for name in ("lokr_w1", "lokr_w2"):
        whole = parts.get(name)
        rank *= parts[f"{name}_b"].shape[0] if whole is None else min(whole.shape[0], math.prod(whole.shape[1:]))
    return rank


def _loha(path: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """``(w1_a w1_b) * (w2_a w2_b)``: row ``(p, q)`` of A is ``w1_b[p] * w2_b[q]``, column of B likewise."""
    if set(parts) != set(LOHA):
        raise LoraInvalid(f"the LoHa weights of {path!r} are incomplete or Tucker-decomposed")
    w1_a, w1_b, w2_a, w2_b = (parts[name].float().flatten(1) for name in LOHA)
    if w1_a.shape[0] != w2_a.shape[0] or w1_b.shape[1] != w2_b.shape[1]:
        raise LoraInvalid(f"the LoHa weights of {path!r} do not belong together")
    if w1_a.shape[1] != w1_b.shape[0] or w2_a.shape[1] != w2_b.shape[0]:
        raise LoraInvalid(f"the LoHa weights of {path!r} do not belong together")
    _check_rank(path, w1_b.shape[0] * w2_b.shape[0])
    A = torch.einsum("pi,qi->pqi", w1_b, w2_b).flatten(0, 1)
    B = torch.einsum("op,oq->opq", w1_a, w2_a).flatten(1)
    return A.contiguous(), B.contiguous(), w1_b.shape[0]


def _lokr(path: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    """``kron(w1, w2)``: with ``w = U V`` for both, ``kron(U1, U2) kron(V1, V2)``."""
    if not set(parts) <= set(LOKR):
        raise LoraInvalid(f"the LoKr weights of {path!r} are Tucker-decomposed")
    U1, V1, rank1 = _factors(path, parts, "lokr_w1")
    U2, V2, rank2 = _factors(path, parts, "lokr_w2")
    _check_rank(path, U1.shape[1] * U2.shape[1])
    return torch.kron(V1, V2).contiguous(), torch.kron(U1, U2).contiguous(), rank2 or rank1


def _factors(path: str, parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, int]:
    """``U [out, r]``, ``V [r, in]`` and the file's own rank, 0 for a full matrix."""
    if f"{name}_a" in parts and f"{name}_b" in parts:
        U, V = parts[f"{name}_a"].float().flatten(1), parts[f"{name}_b"].float().flatten(1)
        if U.shape[1] != V.shape[0]:
            raise LoraInvalid(f"the LoKr weights of {path!r} do not belong together")
        return U, V, V.shape[0]
    if name not in parts:
        raise LoraInvalid(f"the LoKr weights of {path!r} are incomplete")
    full = parts[name].float().flatten(1)
    if full.shape[0] <= full.shape[1]:
        return torch.eye(full.shape[0]), full, 0
    return full, torch.eye(full.shape[1]), 0


def _check_rank(path: str, rank: int) -> None:
    if not 0 < rank <= RANK_MAX:
        raise LoraInvalid(f"the weights of {path!r} have rank {rank}; {RANK_MAX} is the most")
