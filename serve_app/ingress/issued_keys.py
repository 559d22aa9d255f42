"""The keys made over HTTP as one ingress replica knows them, without a look into the database at each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from storage.key_rows import IssuedKey

AGE_S_MAX = 2.0
"""A key that was revoked or made is so on every replica after at most this, and the time of one look."""

Load = Callable[[], Awaitable[Sequence[IssuedKey]]]


class KnownKeys:
    """Belongs to one event loop. Looks at most once in `age_s_max`, however many requests come."""

    def __init__(self, load: Load, *, age_s_max: float = AGE_S_MAX, now: Callable[[], float] = time.monotonic) -> None:
        """`load` brings the valid keys."""
        self._load = load
        self._age_s_max = age_s_max
        self._now = now
        self._by_digest: Mapping[str, IssuedKey] = {}
        self._loaded_at: float | None = None
        self._looking: asyncio.Task[bool] | None = None

    async def find(self, key_sha256: str) -> IssuedKey | None:
        """The valid key of this digest (hex). Raises what `load` raises: an old answer is never given instead."""
        while self._loaded_at is None or self._now() - self._loaded_at >= self._age_s_max:
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
            # Shielded: one request that goes away must not end the look of the others.
            if await asyncio.shield(self._looking):
                break
        return self._by_digest.get(key_sha256)

    def forget(self) -> None:
        """Look again at the next request: something was changed here."""
        self._loaded_at, self._looking = None, None

    async def _look(self) -> bool:
        """Whether what was found counts: nothing was changed here since the look began."""
        looking, began = asyncio.current_task(), self._now()
        try:
            keys = await self._load()
            if self._looking is not looking:
                return False
            self._by_digest = {key.key_sha256: key for key in keys}
            self._loaded_at = began
            return True
        finally:
            if self._looking is looking:
                self._looking = None
