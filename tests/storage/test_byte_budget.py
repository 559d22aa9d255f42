from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.byte_budget import ByteBudget


class Holders:
    """Tasks that hold bytes until they are let go."""

    def __init__(self, capacity_bytes: int) -> None:
        self.budget = ByteBudget(capacity_bytes)
        self.holding: list[str] = []
        self.let_go = {name: asyncio.Event() for name in "abcd"}

    def start(self, name: str, size_bytes: int) -> asyncio.Task[None]:
        async def hold() -> None:
            async with self.budget.hold(size_bytes):
                self.holding.append(name)
                await self.let_go[name].wait()
            self.holding.remove(name)

        return asyncio.create_task(hold())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_more_is_held_than_the_budget_and_waiting_is_first_come_first_served() -> None:
    holders = Holders(10)
    holders.start("a", 6)
    holders.start("b", 6)
    small = holders.start("c", 1)
    await settle()
    assert holders.holding == ["a"]

    holders.let_go["a"].set()
    await settle()

    assert holders.holding == ["b", "c"]
    assert holders.budget.held_bytes == 7
    small.cancel()
    await settle()
    assert holders.budget.held_bytes == 6


async def test_what_is_larger_than_the_budget_goes_alone() -> None:
    holders = Holders(10)
    holders.start("a", 1)
    holders.start("b", 100)
    await settle()
    assert holders.holding == ["a"]

    holders.let_go["a"].set()
    await settle()
    assert holders.holding == ["b"]


async def test_one_that_gives_up_waiting_holds_nobody_up() -> None:
    holders = Holders(10)
    holders.start("a", 6)
    waiting = holders.start("b", 9)
    holders.start("c", 3)
    await settle()
    assert holders.holding == ["a"]

    waiting.cancel()
    await settle()

    assert holders.holding == ["a", "c"]
    assert waiting.cancelled()


async def test_one_that_is_cancelled_as_its_turn_comes_gives_its_place_back() -> None:
    holders = Holders(10)
    first = holders.start("a", 10)
    waiting = holders.start("b", 10)
    await settle()
    holders.let_go["a"].set()
    while not first.done():
        await asyncio.sleep(0)
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    assert holders.budget.held_bytes == 0


async def test_places_of_all_that_are_cancelled_at_once_are_free_again() -> None:
    holders = Holders(1)
    tasks = [holders.start(name, 1) for name in "abc"]
    await settle()
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(end) for end in ends] == [asyncio.CancelledError] * 3
    assert holders.budget.held_bytes == 0
    holders.start("d", 1)
    await settle()
    assert holders.holding[-1] == "d"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, 12)),
        st.tuples(st.sampled_from(("cancel", "let go")), st.integers(0, 3)),
        st.tuples(st.just("resize"), st.integers(0, 12)),
        st.tuples(st.sampled_from(("turn", "cancel all")), st.just(0)),
    ),
    max_size=40,
)


@given(STEPS)
def test_what_is_held_is_what_the_holders_hold_whatever_is_cancelled(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_play(steps))


async def _play(steps: list[tuple[str, int]]) -> None:
    budget = ByteBudget(10)
    inside: dict[int, int] = {}
    tasks: list[tuple[asyncio.Task[None], asyncio.Event]] = []

    async def hold(number: int, size_bytes: int, let_go: asyncio.Event) -> None:
        async with budget.hold(size_bytes):
            inside[number] = size_bytes
            try:
                await let_go.wait()
            finally:
                del inside[number]

    for step, value in steps:
        if step == "start":
            let_go = asyncio.Event()
            tasks.append((asyncio.create_task(hold(len(tasks), value, let_go)), let_go))
            await asyncio.sleep(0)
        elif step == "resize":
            budget.resize(value)
        elif step == "turn":
            await asyncio.sleep(0)
        elif step == "cancel all":
            for task, _ in tasks:
                task.cancel()
        elif tasks:
            task, let_go = tasks[value % len(tasks)]
            if step == "cancel":
                task.cancel()
            else:
                let_go.set()
    await settle()
    assert budget.held_bytes == sum(inside.values())
    for _, let_go in tasks:
        let_go.set()
    ends = await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
    assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
    assert budget.held_bytes == 0
