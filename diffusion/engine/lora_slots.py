"""All of a family's slots: which layers have them, which tables exist, and what the next call adds to which row."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor, nn

from diffusion.engine.merged import own_weight
from diffusion.engine.packed import Layout, Packed, base_layer, layer_order
from diffusion.engine.slot_layers import LayerSlot, give_slot, take_slot
from diffusion.engine.slot_table import Combo, SlotTable
from diffusion.families.base import Family

TABLES_MAX = 4


class LoraSlots:
    """``arrange`` before a call of a component, ``release`` when its layers should be plain again.

    With ``fixed_shapes``, for compiled modules, every call sees the same rank and the same layers once they have been
    seen: a table only grows (ranks in powers of two), and rows without a LoRA get zeros. Without it a call costs what
    its own LoRAs need.
    """

    def __init__(self, family: Family, *, fixed_shapes: bool = False) -> None:
        self._family = family
        self._components = {
            name: _ComponentSlots(name, module, family, fixed_shapes=fixed_shapes)
            for name, module in family.lora_components.items()
        }

    def arrange(self, component: str, combos: Sequence[Combo], *, table: Hashable = None) -> int:
        """Give the next calls of ``component`` one combo per slot. Returns how many slots had to be written.

        A call's rows must be a multiple of the slots, each slot's rows side by side. ``table`` names the batch that
        this is one call of: batches that take turns then do not overwrite one another.
        """
        return self._components[component].arrange(combos, table)

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
    def __init__(self, name: str, module: nn.Module, family: Family, *, fixed_shapes: bool) -> None:
        self._name, self._module, self._family, self._fixed = name, module, family, fixed_shapes
        self._layout = Layout({}, layer_order(module))
        self._slots: dict[str, LayerSlot] = {}
        self._tables: OrderedDict[Hashable, SlotTable] = OrderedDict()
        self._rank_ceiling, self._dora_seen = 1, False
        self._bound: tuple[object, ...] | None = None

    @property
    def size_bytes(self) -> int:
        return sum(table.size_bytes for table in self._tables.values())

    def arrange(self, combos: Sequence[Combo], key: Hashable) -> int:
        parts = self._parts(combos)
        rank = _rank(parts)
        if rank == 0 and not (self._fixed and self._slots):
            self.release()
            return 0
        dora = any(part.dora for own in parts for part in own)
        self._grow(rank, _widths(parts), dora=dora)
        table = self._table(key, len(combos))
        written = table.fill(combos)
        if self._fixed:
            rank, dora, used = table.rank, table.dora, None
        else:
            layouts = {id(p.layout.columns): p.layout.columns.keys() for own in parts for p in own}
            used = frozenset[str]().union(*layouts.values())
        self._bind(table, len(combos), rank, used, dora=dora)
        return written

    def growth_bytes(self, combos: Sequence[Combo], key: Hashable) -> int:
        """Of the table's A and B: output scales and merged weights are small beside them."""
        parts = self._parts(combos)
        rank, table = _rank(parts), self._tables.get(key)
        if rank == 0 and not (self._fixed and self._slots):
            return 0
        layout = self._layout.with_layers(_widths(parts))
        ceiling, slots = max(self._rank_ceiling, _power_of_two(rank)), _power_of_two(len(combos))
        if table is not None and table.layout is layout and table.rank >= ceiling and table.slots >= slots:
            return 0
        needed_bytes = slots * ceiling * (layout.a_width + layout.b_width) * self._family.dtype.itemsize
        return max(0, needed_bytes - (0 if table is None else table.factor_bytes))

    def _parts(self, combos: Sequence[Combo]) -> list[list[Packed]]:
        """By slot."""
        return [[a.parts[self._name] for a, _ in combo if self._name in a.parts] for combo in combos]

    def release(self) -> None:
        if self._bound is not None:
            for slot in self._slots.values():
                slot.clear()
            self._bound = None

    def remove(self) -> None:
        self.release()
        for path in self._slots:
            take_slot(base_layer(self._module, path))
        self._slots.clear()
        self._tables.clear()
        self._layout, self._rank_ceiling, self._dora_seen = Layout({}, layer_order(self._module)), 1, False

    def _grow(self, rank: int, widths: dict[str, tuple[int, int]], *, dora: bool) -> None:
        self._rank_ceiling = max(self._rank_ceiling, _power_of_two(rank))
        self._dora_seen |= dora
        self._layout = self._layout.with_layers(widths)
        for path in self._layout.columns.keys() - self._slots.keys():
            self._slots[path] = give_slot(base_layer(self._module, path))

    def _table(self, key: Hashable, slots: int) -> SlotTable:
        table = self._tables.get(key)
        if (
            table is None
            or table.slots < slots
            or table.rank < self._rank_ceiling
            or table.layout is not self._layout
            or table.dora != self._dora_seen
        ):
            self._tables.pop(key, None)  # before the new one: both need not fit at once
            self.release()
            table = SlotTable(
                self._name, self._layout, slots=_power_of_two(slots), rank=self._rank_ceiling,
                dora=self._dora_seen, device=self._family.device, dtype=self._family.dtype, merged=self._own_weights(),
            )  # fmt: skip
            self._tables[key] = table
        self._tables.move_to_end(key)
        while len(self._tables) > TABLES_MAX:
            self._tables.popitem(last=False)
        return table

    def _bind(self, table: SlotTable, slots: int, rank: int, used: frozenset[str] | None, *, dora: bool) -> None:
        wanted = (table, slots, rank, used, dora)
        if self._bound == wanted:
            return
        self._bound = wanted
        for path, slot in self._slots.items():
            if used is None or path in used:
                table.bind(path, slot, slots, rank, dora=dora)
            else:
                slot.clear()

    def _own_weights(self) -> dict[str, Tensor]:
        """Of the layers that are merged."""
        weights = {path: own_weight(base_layer(self._module, path), self._family.device) for path in self._slots}
        return {path: weight for path, weight in weights.items() if weight is not None}


def _rank(parts: Sequence[Sequence[Packed]]) -> int:
    """Of the slot that needs most."""
    return max((sum(part.rank for part in own) for own in parts), default=0)


def _widths(parts: Sequence[Sequence[Packed]]) -> dict[str, tuple[int, int]]:
    return {path: widths for own in parts for part in own for path, widths in part.layout.widths.items()}


def _power_of_two(number: int) -> int:
    """The next one that is no smaller; 1 for 0."""
    return 1 << max(0, number - 1).bit_length()
