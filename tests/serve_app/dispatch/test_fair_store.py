"""Bounds that one tenant's values cannot use up for another."""

from __future__ import annotations

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from serve_app.dispatch.fair_store import FairStore

ENTRIES_MAX, BYTES_MAX = 6, 100
steps = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("123456789"), st.integers(0, 60), st.booleans()), max_size=60
)


@given(steps)
def test_it_is_within_its_bounds_and_the_newest_is_there(steps: list[tuple[str, str, int, bool]]) -> None:
    dropped: list[int] = []
    store: FairStore[int] = FairStore(entries_max=ENTRIES_MAX, bytes_max=BYTES_MAX, dropped=dropped.append)
    here: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
    for number, (tenant, key, size_bytes, pops) in enumerate(steps):
        before = len(dropped)
        if pops:
            value = store.pop(tenant, key)
            assert value == here.pop((tenant, key), (None, 0))[0]
            assert dropped[before:] == ([] if value is None else [value])
            continue
        store.put(tenant, key, number, size_bytes=size_bytes)
        here[tenant, key] = (number, size_bytes)
        gone = set(dropped[before:])
        here = OrderedDict((place, held) for place, held in here.items() if held[0] not in gone)
        assert store.get(tenant, key) == number
        assert len(store) <= ENTRIES_MAX
        assert sum(size for _, size in here.values()) <= BYTES_MAX
    assert {(tenant, key): value for tenant, key, value in store.items()} == {
        place: value for place, (value, _) in here.items()
    }


def test_whoever_holds_most_loses_its_own_oldest() -> None:
    store: FairStore[int] = FairStore(entries_max=4)
    store.put("quiet", "only", 0)
    for number in range(50):
        store.put("busy", str(number), number)
    assert store.get("quiet", "only") == 0
    assert list(store.of("busy")) == [47, 48, 49]


def test_of_bytes_too() -> None:
    store: FairStore[int] = FairStore(entries_max=100, bytes_max=100)
    for number in range(5):
        store.put("quiet", str(number), number, size_bytes=5)
    for number in range(5):
        store.put("busy", str(number), number, size_bytes=50)
    assert list(store.of("quiet")) == [0, 1, 2, 3, 4]
    assert list(store.of("busy")) == [4]


def test_what_may_not_go_stays_while_there_is_another() -> None:
    store: FairStore[bool] = FairStore(entries_max=3, may_go=lambda is_final: is_final)
    store.put("a", "under way", False)
    for number in range(5):
        store.put("a", str(number), True)
    assert store.get("a", "under way") is False
    for number in range(5):
        store.put("a", f"also {number}", False)
    assert len(store) == 3
