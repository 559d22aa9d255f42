"""One deadline for an operation of several calls, each of which has bounds of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

from storage.errors import StorageTimeout

_enclosing: ContextVar[asyncio.Timeout | None] = ContextVar("enclosing", default=None)


class Deadline:
    """`total_s` counts from the beginning of the block that it is of."""

    def __init__(self, scope: asyncio.Timeout, total_s: float) -> None:
        self._scope = scope
        self.total_s = total_s

    def allow(self, extra_s: float) -> None:
        """More time, for work that has turned out to be larger."""
        self.total_s += extra_s
        when = self._scope.when()
        if when is not None:
            self._scope.reschedule(when + extra_s)


@asynccontextmanager
async def within(operation: str, total_s: float) -> AsyncIterator[Deadline]:
    """Raises StorageTimeout where the block takes longer."""
    try:
        async with asyncio.timeout(total_s) as scope:
            deadline = Deadline(scope, total_s)
            outside = _enclosing.set(scope)
            try:
                yield deadline
            finally:
                _enclosing.reset(outside)
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise StorageTimeout(operation, deadline.total_s) from error


def is_cut() -> bool:
    """Whether the block that this runs in, in a task of its own too, has reached its deadline."""
    scope = _enclosing.get()
    return scope is not None and scope.expired()
