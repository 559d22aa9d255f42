"""Keeps a client that is slow itself from taking a slow answer for a dead server.

`Window` bounds how many attempts run at once. It grows while they are answered soon, and halves when one times out, is
throttled or is answered late: TCP's slow start and additive increase
(https://www.rfc-editor.org/rfc/rfc5681#section-3.1), its restart after an idle time, and, as in TCP Vegas, a look at
the delay, because a round that grew until it timed out would already have opened the breaker. Without a window a burst
of calls makes the queue at the server that then times all of them out.

`Lateness` tells how much of a time this process has lost because its event loop did not run, as on a machine without
a free core or one that was suspended. Timers that ran out meanwhile say nothing about the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from storage.byte_budget import ByteBudget

FIRST = 8
# One attempt that hangs must not hold up all the others.
FEWEST = 4
IDLE_S = 5.0
# From here on more at once would only wait longer. One round doubles the delay at most, far from any timeout.
GROWS_WITHIN_S = 2.0
LATE_AFTER_S = 4.0
BEAT_S = 0.25


class Window:
    """Belongs to one event loop. First come, first served; cancelling the wait gives up the place."""

    def __init__(self, most: int, *, first: int = FIRST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._first = float(min(first, most))
        self._clock = clock
        self._size = self._first
        self._steep_until = float(most)
        self._shrunk_at_s = float("-inf")
        self._idle_since_s: float | None = clock()
        self._places = ByteBudget(int(self._size))

    @property
    def size(self) -> int:
        return self._places.capacity_bytes

    @property
    def held(self) -> int:
        return self._places.held_bytes

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, and keep it to the end of the block."""
        self._restart_if_idle()
        async with self._places.hold(1):
            self._idle_since_s = None
            try:
                yield
            finally:
                if self._places.held_bytes == 1:
                    self._idle_since_s = self._clock()

    def answered(self, started_s: float, allowed_s: float) -> None:
        """An attempt that began then got its answer. `allowed_s` is what moving its bytes may take.

        The window grows only where it was what held others back.
        """
        delay_s = self._clock() - started_s - allowed_s
        if delay_s > LATE_AFTER_S:
            self.overloaded(started_s)
        elif delay_s <= GROWS_WITHIN_S and self._places.held_bytes >= self.size:
            step = 1.0 if self._size < self._steep_until else 1.0 / self._size
            self._resize(min(float(self._most), self._size + step))

    def overloaded(self, started_s: float) -> None:
        """An attempt that began then got no answer in time. Attempts that ran together halve the window once."""
        if started_s >= self._shrunk_at_s:
            self._shrunk_at_s = self._clock()
            self._steep_until = max(float(min(FEWEST, self._most)), self._size / 2)
            self._resize(self._steep_until)

    def _restart_if_idle(self) -> None:
        idle_since_s = self._idle_since_s
        if idle_since_s is not None and self._clock() - idle_since_s >= IDLE_S:
            self._steep_until = float(self._most)
            self._resize(min(self._size, self._first))

    def _resize(self, size: float) -> None:
        self._size = size
        self._places.resize(int(size))


def on_this_loop(delay_s: float, beat: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(delay_s, beat)


class Lateness:
    """Belongs to one event loop. Keeps a timer, made by `later`, only while somebody watches."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] = on_this_loop,
    ) -> None:
        self._clock = clock
        self._later = later
        self._watchers = 0
        self._lost_s = 0.0
        self._due_s = 0.0
        self._beats = False

    @contextmanager
    def watched(self) -> Iterator[Callable[[], float]]:
        """Gives a function that says how many seconds have been lost since the block began."""
        self._watchers += 1
        if not self._beats:
            self._beat_later()
        before_s = self._total_s()
        try:
            yield lambda: self._total_s() - before_s
        finally:
            self._watchers -= 1

    def _total_s(self) -> float:
        """With what the beat that is overdue now has lost."""
        return self._lost_s + max(0.0, self._clock() - self._due_s)

    def _beat(self) -> None:
        self._lost_s = self._total_s()
        self._beats = False
        if self._watchers:
            self._beat_later()

    def _beat_later(self) -> None:
        self._beats = True
        self._due_s = self._clock() + BEAT_S
        self._later(BEAT_S, self._beat)
