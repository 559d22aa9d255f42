"""Many things at once, but not too many."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def run_bounded(work: Iterable[Coroutine[Any, Any, T]], at_once: int) -> list[T]:
    """Results in order. At most `at_once` run together; the first error cancels the rest and is raised."""
    slots = asyncio.Semaphore(at_once)

    async def bounded(one: Coroutine[Any, Any, T]) -> T:
        async with slots:
            return await one

    coroutines = list(work)
    tasks = [asyncio.create_task(bounded(one)) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in coroutines:
            one.close()
