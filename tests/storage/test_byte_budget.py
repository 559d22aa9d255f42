from __future__ import annotations

import asyncio

import pytest

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
