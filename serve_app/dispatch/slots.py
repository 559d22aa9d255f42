"""A bounded number of pieces of work at once, and the wait for when to look for more. Belongs to one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from serve_app.dispatch.attempt import Sleep


class Slots:
    """The next look is due once a piece has ended, somebody says so, or `poll_s` have passed."""

    def __init__(self, count: int, *, poll_s: float, sleep: Sleep = asyncio.sleep) -> None:
        self.count = count
        self.poll_s = poll_s
        self._sleep = sleep
        self._woken = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def free(self) -> int:
        return max(0, self.count - len(self._running))

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """`work` raises nothing but CancelledError. Whoever finds work asks for no more than is `free`."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def wake(self) -> None:
        self._woken.set()

    async def next_look(self) -> None:
        waits = [asyncio.ensure_future(self._woken.wait()), asyncio.ensure_future(self._sleep(self.poll_s))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        # Before the look itself: what is said while it is made is not in it.
        self._woken.clear()

    async def end(self, *, within_s: float) -> None:
        """What has not ended by itself by then is cancelled."""
        if not self._running:
            return
        _, late = await asyncio.wait(self._running, timeout=within_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._woken.set()
