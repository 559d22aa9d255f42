"""All of a family's slots: which layers have them, which tables exist, and what the next call adds to which row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias

from torch import Tensor, nn

from diffusion.engine.merged import MergedWeights, own_weight
from diffusion.engine.packed import Adapter, K, Layout, Packed, Product, base_layer, pair_layout, product_layout
from diffusion.engine.slot_layers import LayerSlot, give_slot, take_slot
from diffusion.engine.slot_table import Combo, SlotTable
from diffusion.families.base import Family

TABLES_MAX = 4
SHRINK_FACTOR = 4
"""A table whose rank is more than this many times what a call needs is made anew."""
Parts: TypeAlias = list[list[Packed[K]]]
"""By slot, in the order of its adapters."""


class LoraSlots:
    """``arrange`` before a call of a component, ``release`` when its layers should be plain again.

    With ``fixed_shapes``, for compiled modules, every call sees the same rank and the same layers once they have been
    seen: a table only grows (ranks in powers of two), and rows without a LoRA get zeros. Without it a call costs what
    its own LoRAs need, and a table far above their rank gives its memory back.
    """

    def __init__(self, family: Family, *, fixed_shapes: bool = False) -> None:
        self._family = family
        self._components = {
            name: _ComponentSlots(name, module, family, fixed_shapes=fixed_shapes)
            for name, module in family.lora_components.items()
        }

    def arrange(self, component: str, combos: Sequence[Combo], *, table: Hashable = None) -> None:
        """Give the next calls of ``component`` one combo per slot.

        A call's rows must be a multiple of the slots, each slot's rows side by side. ``table`` names the batch that
        this is one call of: batches that take turns then do not overwrite one another.
        """
        self._components[component].arrange(combos, table)

    def growth_bytes(self, component: str, combos: Sequence[Combo], *, table: Hashable = None) -> int:
        """What ``arrange`` would allocate beside what is there."""
        return self._components[component].growth_bytes(combos, table)

    def release(self, components: Iterable[str] | None = None) -> None:
        """No layer of these (None: of all) adds anything. Tables stay filled."""
        for component in self._components if components is None else components:
            self._components[component].release()

    def remove(self) -> None:
        """Free the tables and give every layer its own class back."""
        for component in self._components.values():
            component.remove()

    @property
    def size_bytes(self) -> int:
        return sum(component.size_bytes for component in self._components.values())


class _ComponentSlots:
    """Of one component: its pairs, and then its products."""

    def __init__(self, name: str, module: nn.Module, family: Family, *, fixed_shapes: bool) -> None:
        self._pairs = _Pairs(name, module, family, fixed_shapes=fixed_shapes)
        self._products = _Products(name, module, family, fixed_shapes=fixed_shapes)

    @property
    def size_bytes(self) -> int:
        return self._pairs.size_bytes + self._products.size_bytes

    def arrange(self, combos: Sequence[Combo], key: Hashable) -> None:
        self._pairs.arrange(combos, key)
        self._products.arrange(combos, key)

    def growth_bytes(self, combos: Sequence[Combo], key: Hashable) -> int:
        return self._pairs.growth_bytes(combos, key) + self._products.growth_bytes(combos, key)

    def release(self) -> None:
        self._pairs.release()
        self._products.release()

    def remove(self) -> None:
        self._pairs.remove()
        self._products.remove()


@dataclass(frozen=True, eq=False)
class _Needs(Generic[K]):
    """Of a table for a call."""

    layout: Layout[K]
    slots: int
    rank: int
    dora: bool


class _Part(ABC, Generic[K]):
    """The tables of a component's pairs, or of its products, and what its layers see of them."""

    def __init__(self, name: str, module: nn.Module, family: Family, *, fixed_shapes: bool) -> None:
        self._name, self._module, self._family, self._fixed = name, module, family, fixed_shapes
        self._layout = self._empty_layout()
        self._slots: dict[str, LayerSlot] = {}
        self._tables: OrderedDict[Hashable, SlotTable[K]] = OrderedDict()
        self._rank_ceiling, self._dora_seen = 1, False
        self._bound: tuple[object, ...] | None = None

    @abstractmethod
    def _empty_layout(self) -> Layout[K]: ...

    @abstractmethod
    def _of(self, adapter: Adapter) -> Packed[K] | None:
        """What of an adapter belongs here."""

    @abstractmethod
    def _path(self, name: K) -> str: ...

    @abstractmethod
    def _names(self, parts: Parts[K]) -> Hashable:
        """What ``_show`` makes of ``parts``, quick to compare."""

    @abstractmethod
    def _show(self, table: SlotTable[K], slots: int, rank: int, parts: Parts[K] | None, *, dora: bool) -> None:
        """Give every layer its place in the table, up to ``rank``, where ``parts`` have it; None for all places."""

    @abstractmethod
    def _hide(self, slot: LayerSlot) -> None: ...

    @abstractmethod
    def _merged(self, needs: _Needs[K]) -> MergedWeights | None:
        """The layers that get their weights per slot."""

    @property
    def size_bytes(self) -> int:
        return sum(table.size_bytes for table in self._tables.values())

    def arrange(self, combos: Sequence[Combo], key: Hashable) -> None:
        parts = self._parts(combos)
        rank = _rank(parts)
        if rank == 0 and not (self._fixed and self._slots):
            self.release()
            return
        dora = any(part.dora for own in parts for part in own)
        table = self._table(key, self._needs(parts, len(combos)))
        table.fill(combos)
        if self._fixed:
            rank, dora, seen = table.rank, table.dora, None
        else:
            seen = parts
        wanted = (table, len(combos), rank, dora, None if seen is None else self._names(seen))
        if self._bound != wanted:
            self._bound = wanted
            self._show(table, len(combos), rank, seen, dora=dora)

    def growth_bytes(self, combos: Sequence[Combo], key: Hashable) -> int:
        """Of the table's A and B: output scales and merged weights are small beside them."""
        parts = self._parts(combos)
        rank, table = _rank(parts), self._tables.get(key)
        if rank == 0 and not (self._fixed and self._slots):
            return 0
        needs = self._needs(parts, len(combos))
        if table is not None and self._serves(table, needs):
            return 0
        width = needs.layout.a_width + needs.layout.b_width
        needed_bytes = needs.slots * needs.rank * width * self._family.dtype.itemsize
        return max(0, needed_bytes - (0 if table is None else table.factor_bytes))

    def release(self) -> None:
        if self._bound is not None:
            for slot in self._slots.values():
                self._hide(slot)
            self._bound = None

    def remove(self) -> None:
        self.release()
        for path in self._slots:
            take_slot(base_layer(self._module, path))
        self._slots.clear()
        self._tables.clear()
        self._layout, self._rank_ceiling, self._dora_seen = self._empty_layout(), 1, False

    def _parts(self, combos: Sequence[Combo]) -> Parts[K]:
        return [[part for adapter, _ in combo if (part := self._of(adapter)) is not None] for combo in combos]

    def _needs(self, parts: Parts[K], slots: int) -> _Needs[K]:
        rank, dora = _power_of_two(_rank(parts)), any(part.dora for own in parts for part in own)
        if self._fixed:
            rank, dora = max(rank, self._rank_ceiling), dora or self._dora_seen
        return _Needs(self._layout.with_layers(_widths(parts)), _power_of_two(slots), rank, dora)

    def _serves(self, table: SlotTable[K], needs: _Needs[K]) -> bool:
        return (
            table.layout is needs.layout
            and table.slots >= needs.slots
            and table.rank >= needs.rank
            and (self._fixed or table.rank <= SHRINK_FACTOR * needs.rank)
            and table.dora >= needs.dora
        )

    def _table(self, key: Hashable, needs: _Needs[K]) -> SlotTable[K]:
        table = self._tables.get(key)
        if table is None or not self._serves(table, needs):
            table = None  # before the new one: both need not fit at once
            self._tables.pop(key, None)
            self.release()
            table = SlotTable(
                self._of, needs.layout, slots=needs.slots, rank=needs.rank, dora=needs.dora,
                device=self._family.device, dtype=self._family.dtype, merged=self._merged(needs),
            )  # fmt: skip
            self._tables[key] = table
            self._keep(needs)
        self._tables.move_to_end(key)
        while len(self._tables) > TABLES_MAX:
            self._tables.popitem(last=False)
        return table

    def _keep(self, needs: _Needs[K]) -> None:
        """What other calls have to keep up with, now that there is a table of it."""
        self._rank_ceiling, self._dora_seen = max(self._rank_ceiling, needs.rank), self._dora_seen or needs.dora
        if needs.layout is not self._layout:
            self._layout = needs.layout
            for path in {self._path(name) for name in needs.layout.names} - self._slots.keys():
                self._slots[path] = give_slot(base_layer(self._module, path))


class _Pairs(_Part[str]):
    """A LoRA's rank is what its slot needs of the table's; of a layer ``A`` and ``B`` are seen, or a merged weight."""

    def _empty_layout(self) -> Layout[str]:
        return pair_layout(self._module)

    def _of(self, adapter: Adapter) -> Packed[str] | None:
        return adapter.parts.get(self._name)

    def _path(self, name: str) -> str:
        return name

    def _names(self, parts: Parts[str]) -> frozenset[str]:
        return frozenset[str]().union(*{part.layout.names for own in parts for part in own})

    def _show(self, table: SlotTable[str], slots: int, rank: int, parts: Parts[str] | None, *, dora: bool) -> None:
        names = table.layout.names if parts is None else self._names(parts)
        for path, slot in self._slots.items():
            self._hide(slot)
            if path not in names:
                continue
            slot.weight = None if table.merged is None else table.merged.view(path, slots)
            if slot.weight is None:
                A, B = table.factors(path, slots)
                slot.A, slot.B = A[:, :rank].transpose(1, 2), B[:, :rank]
                slot.output_scale = table.output_scale(path, slots) if dora else None

    def _hide(self, slot: LayerSlot) -> None:
        slot.clear_pair()

    def _merged(self, needs: _Needs[str]) -> MergedWeights:
        found = {path: own_weight(base_layer(self._module, path), self._family.device) for path in needs.layout.names}
        own = {path: weight for path, weight in found.items() if weight is not None}
        return MergedWeights(needs.layout, own, needs.slots)


class _Products(_Part[Product]):
    """Each adapter of a slot has a row of the table's; of a layer the two matrices of every row are seen."""

    def _empty_layout(self) -> Layout[Product]:
        return product_layout(self._module)

    def _of(self, adapter: Adapter) -> Packed[Product] | None:
        return adapter.products.get(self._name)

    def _path(self, name: Product) -> str:
        return name.path

    def _names(self, parts: Parts[Product]) -> frozenset[tuple[int, frozenset[Product]]]:
        return frozenset((row, part.layout.names) for own in parts for row, part in enumerate(own))

    def _show(
        self, table: SlotTable[Product], slots: int, rank: int, parts: Parts[Product] | None, *, dora: bool
    ) -> None:
        every = ((row, table.layout.names) for row in range(rank))
        places = {(row, name) for row, names in (every if parts is None else self._names(parts)) for name in names}
        seen: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for row, product in sorted(places):
            w1, w2 = table.factors(product, slots)
            (o1, o2), (i1, i2) = product.outs, product.ins
            seen[product.path].append((w1[:, row].view(slots, o1, i1), w2[:, row].view(slots, o2, i2)))
        for path, slot in self._slots.items():
            slot.products = tuple(seen[path])

    def _hide(self, slot: LayerSlot) -> None:
        slot.products = ()

    def _merged(self, needs: _Needs[Product]) -> None:
        return None


def _rank(parts: Parts[K]) -> int:
    """Of the slot that needs most."""
    return max((sum(part.rank for part in own) for own in parts), default=0)


def _widths(parts: Parts[K]) -> dict[K, tuple[int, int]]:
    return {name: widths for own in parts for part in own for name, widths in part.layout.widths.items()}


def _power_of_two(number: int) -> int:
    """The next one that is no smaller; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()
