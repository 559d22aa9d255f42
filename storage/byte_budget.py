"""Bounds the bytes that are held in memory at one time, first come, first served."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Belongs to one event loop. More than the whole budget is let through when nothing else is held."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._waiting: OrderedDict[asyncio.Future[None], int] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    def resize(self, capacity_bytes: int) -> None:
        """More room lets in those who wait; with less, what is held stays held."""
        self._capacity_bytes = capacity_bytes
        self._admit()

    @asynccontextmanager
    async def hold(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for room, and keep it to the end of the block. Cancelling the wait gives up the place."""
        await self._take(size_bytes)
        try:
            yield
        finally:
            self._give_back(size_bytes)

    async def _take(self, size_bytes: int) -> None:
        if not self._waiting and self._fits(size_bytes):
            self._held_bytes += size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = size_bytes
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.pop(turn, None)
                self._admit()
            else:
                self._give_back(size_bytes)
            raise

    def _give_back(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            turn, size_bytes = next(iter(self._waiting.items()))
            # Whoever was cancelled in this very turn of the loop is still in the queue, and will never give back.
            if not turn.cancelled():
                if not self._fits(size_bytes):
                    return
                self._held_bytes += size_bytes
                turn.set_result(None)
            del self._waiting[turn]

    def _fits(self, size_bytes: int) -> bool:
        return self._held_bytes == 0 or self._held_bytes + size_bytes <= self._capacity_bytes
