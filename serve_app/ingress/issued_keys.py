"""The keys made over HTTP as one ingress replica knows them, without a look into the database at each request."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from storage.errors import JobError, JobsUnavailable
from storage.key_rows import IssuedKey

logger = logging.getLogger(__name__)

AGE_S_MAX = 2.0
"""A key that was revoked or made is so on every replica after at most this, and the time of one look."""
LOOK_S_MAX = 3.0
AGE_S_MAX_UNLOOKED = 30.0
"""How long a known key is still taken while the database does not answer. Nobody can revoke one meanwhile."""
PAUSE_S = 1.0
NOTED_EVERY_S = 300.0
"""How often the use of a key is noted, by each replica."""

Load = Callable[[], Awaitable[Sequence[IssuedKey]]]
Note = Callable[[Sequence[str]], Awaitable[None]]


class KnownKeys:
    """Belongs to one event loop. Looks at most once in `age_s_max`, however many requests come."""

    def __init__(
        self,
        load: Load,
        note: Note | None = None,
        *,
        age_s_max: float = AGE_S_MAX,
        look_s_max: float = LOOK_S_MAX,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`load` brings the valid keys; `note` takes the ids of those that were used."""
        self._load = load
        self._note = note
        self._age_s_max = age_s_max
        self._look_s_max = look_s_max
        self._now = now
        self._by_digest: Mapping[str, IssuedKey] = {}
        self._loaded_at: float | None = None
        self._failed_at: float | None = None
        self._looking: asyncio.Task[bool] | None = None
        self._noted_at: dict[str, float] = {}
        self._to_note: set[str] = set()
        self._noting: asyncio.Task[None] | None = None

    async def find(self, key_sha256: str) -> IssuedKey | None:
        """The valid key of this digest (hex).

        Raises JobError where the database does not answer within `look_s_max`, and at once for a moment after that;
        but a key that was valid in the last AGE_S_MAX_UNLOOKED is taken.
        """
        try:
            await self._be_current()
        except JobError:
            known = self._by_digest.get(key_sha256)
            if known is None or self._loaded_at is None or self._now() - self._loaded_at >= AGE_S_MAX_UNLOOKED:
                raise
        found = self._by_digest.get(key_sha256)
        if found is not None:
            self._use(found.id)
        return found

    def forget(self) -> None:
        """Look again at the next request: something was changed here."""
        self._loaded_at, self._failed_at, self._looking = None, None, None

    async def _be_current(self) -> None:
        while self._loaded_at is None or self._now() - self._loaded_at >= self._age_s_max:
            if self._failed_at is not None and self._now() - self._failed_at < PAUSE_S:
                raise JobsUnavailable("issued_keys")
            if self._looking is None:
                self._looking = asyncio.create_task(self._look())
            # Shielded: one request that goes away must not end the look of the others.
            if await asyncio.shield(self._looking):
                break

    async def _look(self) -> bool:
        """Whether what was found counts: nothing was changed here since the look began."""
        looking, began = asyncio.current_task(), self._now()
        try:
            async with asyncio.timeout(self._look_s_max):
                keys = await self._load()
            if self._looking is not looking:
                return False
            self._by_digest = {key.key_sha256: key for key in keys}
            self._loaded_at, self._failed_at = began, None
            return True
        except (TimeoutError, JobError) as error:
            if self._looking is not looking:
                return False
            self._failed_at = self._now()
            raise JobsUnavailable("issued_keys") from error
        finally:
            if self._looking is looking:
                self._looking = None

    def _use(self, key_id: str) -> None:
        """Have a use noted, behind the request, unless that was done a short while ago."""
        noted_at = self._noted_at.get(key_id)
        if self._note is None or (noted_at is not None and self._now() - noted_at < NOTED_EVERY_S):
            return
        self._noted_at[key_id] = self._now()
        self._to_note.add(key_id)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._note_uses(self._note))

    async def _note_uses(self, note: Note) -> None:
        while self._to_note:
            key_ids = sorted(self._to_note)
            self._to_note.clear()
            try:
                await note(key_ids)
            except JobError as error:
                logger.warning("the use of %d keys was not noted (%s)", len(key_ids), error.code)
                for key_id in key_ids:
                    # The next use tries again.
                    self._noted_at.pop(key_id, None)
                return
