"""Linear and convolution layers that add a LoRA of its own to every row of a batch.

A layer becomes one of these by a change of its class, once; its name, its parameters and its place in the model stay,
so peft, compilers and state dicts see what they saw before. What it adds is set from outside through ``lora_slot``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerSlot:
    """What a layer adds: ``A [n, in, r]``, ``B [n, r, out]``, for ``n`` slots of equally many neighbouring rows.

    ``output_scale [n, out]`` is DoRA's. ``weight [n, out, in]`` stands for all three and for the layer's own weight.
    Each of ``products`` is a Kronecker product's ``w1 [n, o1, i1]`` and ``w2 [n, o2, i2]``; linear layers alone have
    them. With nothing set the layer is its plain self.
    """

    __slots__ = ("A", "B", "output_scale", "products", "weight")

    def __init__(self) -> None:
        self.products: tuple[tuple[Tensor, Tensor], ...] = ()
        self.clear_pair()

    def clear_pair(self) -> None:
        """All but the products."""
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.output_scale: Tensor | None = None
        self.weight: Tensor | None = None


class SlotLinear(nn.Linear):
    """Mixed in before the layer's own class. In place on the layer's output: for inference only while a slot is set."""

    lora_slot: LayerSlot

    def forward(self, x: Tensor) -> Tensor:
        slot = self.lora_slot
        if slot.weight is None:
            out = super().forward(x)
            if slot.A is not None and slot.B is not None:
                _add_pair(out, x, slot.A, slot.B, slot.output_scale, self.bias)
        else:
            out = _linear(x, slot.weight, self.bias)
        for w1, w2 in slot.products:
            _add_product(out, x, w1, w2)
        return out


class SlotConv2d(nn.Conv2d):
    """As ``SlotLinear``. A's ``in`` counts channels times kernel places; the stride and padding are the layer's own."""

    lora_slot: LayerSlot

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        A, B, scale = self.lora_slot.A, self.lora_slot.B, self.lora_slot.output_scale
        if A is None or B is None:
            return out
        slots, rows = A.shape[0], x.shape[0] // A.shape[0]
        out = out.contiguous()
        out_nrop = out.view(slots, rows, out.shape[1], -1)
        if scale is not None:
            bias = None if self.bias is None else self.bias[:, None]
            _rescale(out_nrop, scale[:, None, :, None], bias)
        down_rnkp = self._down(x.to(A.dtype), A, slots, rows)
        for row in range(rows):
            # [n, out, r] x [n, r, places]; one row of each slot at a time, so that nothing is transposed in memory
            out_nrop[:, row].baddbmm_(B.transpose(1, 2), down_rnkp[row])
        return out

    def _down(self, x: Tensor, A: Tensor, slots: int, rows: int) -> Tensor:
        """``[rows of a slot, n, r, places]``."""
        channels, rank = x.shape[1], A.shape[2]
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            x_nrcp = x.reshape(slots, rows, channels, -1)
            return torch.stack([torch.bmm(A.transpose(1, 2), x_nrcp[:, row]) for row in range(rows)])
        # A convolution of many groups, each a slot's own: [rows, n * channels, h, w] -> [rows, n * r, h', w']
        grouped = x.reshape(slots, rows, *x.shape[1:]).transpose(0, 1).reshape(rows, slots * channels, *x.shape[2:])
        weight = A.transpose(1, 2).reshape(slots * rank, channels, *self.kernel_size)
        down = nn.functional.conv2d(grouped, weight, None, self.stride, self.padding, self.dilation, groups=slots)
        return down.reshape(rows, slots, rank, -1)


def _linear(x: Tensor, weight_noi: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight is another for each slot of rows."""
    x_nti, weight_nio = x.reshape(weight_noi.shape[0], -1, x.shape[-1]), weight_noi.transpose(1, 2)
    out_nto = torch.bmm(x_nti, weight_nio) if bias is None else torch.baddbmm(bias, x_nti, weight_nio)
    return out_nto.view(*x.shape[:-1], -1)


def _add_pair(
    out: Tensor, x: Tensor, A_nir: Tensor, B_nro: Tensor, scale_no: Tensor | None, bias: Tensor | None
) -> None:
    """In place."""
    slots = A_nir.shape[0]
    out_nto = out.view(slots, -1, out.shape[-1])
    if scale_no is not None:
        _rescale(out_nto, scale_no.unsqueeze(1), bias)
    x_nti = x.reshape(slots, -1, x.shape[-1])
    out_nto.baddbmm_(torch.bmm(x_nti.to(A_nir.dtype), A_nir), B_nro)


def _add_product(out: Tensor, x: Tensor, w1_npq: Tensor, w2_nuv: Tensor) -> None:
    """In place: ``w1 X w2^T`` of each row's ``X [q, v]``."""
    slots, (p, q), (u, v) = w1_npq.shape[0], w1_npq.shape[1:], w2_nuv.shape[1:]
    x_nav = x.reshape(slots, -1, v).to(w2_nuv.dtype)
    half_ntqu = torch.bmm(x_nav, w2_nuv.transpose(1, 2)).view(slots, -1, q, u)
    out.view(slots, -1, p, u).add_(torch.einsum("npq,ntqu->ntpu", w1_npq, half_ntqu))


def _rescale(out: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """In place: scales what the layer computed, not its bias."""
    if bias is None:
        out.mul_(scale)
    else:
        out.sub_(bias).mul_(scale).add_(bias)


def give_slot(layer: nn.Module) -> LayerSlot:
    """The slot of a linear or convolution layer, which becomes a slot layer if it is none yet."""
    if not isinstance(layer, SlotLinear | SlotConv2d):
        _become(layer, _slot_class(type(layer)))
        layer.__dict__["lora_slot"] = LayerSlot()
    slot: LayerSlot = layer.__dict__["lora_slot"]
    return slot


def take_slot(layer: nn.Module) -> None:
    """The layer is of its own class again."""
    if isinstance(layer, SlotLinear | SlotConv2d):
        _become(layer, next(cls for cls, slotted in _SLOT_CLASSES.items() if slotted is type(layer)))
        del layer.lora_slot


_SLOT_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SlotLinear, nn.Conv2d: SlotConv2d}


def _slot_class(cls: type[nn.Module]) -> type[nn.Module]:
    """For a subclass (a quantized linear layer), one that calls the subclass's own ``forward``."""
    if cls not in _SLOT_CLASSES:
        mixin: type[nn.Module] = SlotConv2d if issubclass(cls, nn.Conv2d) else SlotLinear
        _SLOT_CLASSES[cls] = type(f"Slot{cls.__name__}", (mixin, cls), {"__module__": __name__})
    return _SLOT_CLASSES[cls]


def _become(layer: nn.Module, cls: type[nn.Module]) -> None:
    # Past nn.Module's own __setattr__, which knows parameters and submodules.
    object.__setattr__(layer, "__class__", cls)
