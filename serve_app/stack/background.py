"""What an instance does beside serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from storage.loop_thread import LoopThread


class Background:
    """Runs `work` on an event loop in a thread of its own, until it ends or is stopped."""

    def __init__(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._name = name
        self._work = work
        self._thread: LoopThread | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Returns at once."""
        self._thread = LoopThread(self._name)
        self._thread.run_blocking(self._begin())

    def stop(self) -> None:
        """Cancel what is under way and wait for its end. Nothing happens where nothing was started."""
        if self._thread is not None:
            self._thread.run_blocking(self._end())
            self._thread.stop()

    async def _begin(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
