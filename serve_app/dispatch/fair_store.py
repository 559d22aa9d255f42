"""Bounded values by tenant and key, in which no tenant pushes out what is another's."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class FairStore(Generic[V]):
    """Oldest first for each tenant. Beyond the bounds, which hold for all tenants together, the oldest value goes of
    the tenant that holds most.
    """

    def __init__(
        self,
        *,
        entries_max: int,
        bytes_max: int | None = None,
        may_go: Callable[[V], bool] = lambda _: True,
        dropped: Callable[[V], None] = lambda _: None,
    ) -> None:
        """`may_go`: values for which it is false go only when their tenant has no other. `dropped` hears of each
        value that went."""
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._may_go = may_go
        self._dropped = dropped
        self._values: dict[str, OrderedDict[str, V]] = {}
        self._sizes: dict[tuple[str, str], int] = {}
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._total_bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, place: tuple[str, str]) -> bool:
        return place in self._sizes

    def get(self, tenant: str, key: str) -> V | None:
        return self._values.get(tenant, _EMPTY).get(key)

    def put(self, tenant: str, key: str, value: V, *, size_bytes: int = 0) -> None:
        """In the place of what is there, or as the tenant's newest."""
        self._values.setdefault(tenant, OrderedDict())[key] = value
        more_bytes = size_bytes - self._sizes.get((tenant, key), 0)
        self._bytes[tenant] += more_bytes
        self._total_bytes += more_bytes
        self._sizes[tenant, key] = size_bytes
        self._shrink((tenant, key))

    def pop(self, tenant: str, key: str) -> V | None:
        size_bytes = self._sizes.pop((tenant, key), None)
        if size_bytes is None:
            return None
        values = self._values[tenant]
        value = values.pop(key)
        self._bytes[tenant] -= size_bytes
        self._total_bytes -= size_bytes
        if not values:
            del self._values[tenant], self._bytes[tenant]
        self._dropped(value)
        return value

    def of(self, tenant: str) -> Iterator[V]:
        return iter(list(self._values.get(tenant, _EMPTY).values()))

    def items(self) -> Iterator[tuple[str, str, V]]:
        """Of all tenants; what is put or popped meanwhile changes nothing of it."""
        found = [(tenant, key, value) for tenant, values in self._values.items() for key, value in values.items()]
        return iter(found)

    def _shrink(self, newest: tuple[str, str]) -> None:
        """What came last always stays."""
        while len(self) > self._entries_max and self._drop_one(newest, lambda tenant: len(self._values[tenant])):
            pass
        while (
            self._bytes_max is not None
            and self._total_bytes > self._bytes_max
            and self._drop_one(newest, lambda tenant: self._bytes[tenant])
        ):
            pass

    def _drop_one(self, newest: tuple[str, str], held: Callable[[str], int]) -> bool:
        """Of the tenant that holds most, and has one to drop; whether there was any."""
        for tenant in sorted(self._values, key=held, reverse=True):
            gone = self._oldest(tenant, newest)
            if gone is not None:
                self.pop(tenant, gone)
                return True
        return False

    def _oldest(self, tenant: str, newest: tuple[str, str]) -> str | None:
        others = (key for key in self._values[tenant] if (tenant, key) != newest)
        first = next(others, None)
        if first is None or self._may_go(self._values[tenant][first]):
            return first
        return next((key for key in others if self._may_go(self._values[tenant][key])), first)


_EMPTY: OrderedDict[str, Any] = OrderedDict()
