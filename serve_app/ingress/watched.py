"""Copies of the records that clients poll now, so that a poll costs no call to another process.

Each copy is kept true by one long-poll at the jobs actor, as long as somebody asks for it. It is behind the records by
the time of one message. A copy that cannot be kept true is dropped, and the next poll asks the records again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.collaborators import JobsApi
from storage.errors import JobError
from storage.job_record import JobRecord

logger = logging.getLogger(__name__)

# Well below the long polls that the jobs actor admits, with room for clients that wait themselves.
WATCHED_MAX = 200
IDLE_S = 10.0
SLICE_S = 20.0

Key = tuple[str, str]


@dataclass
class _Watch:
    record: JobRecord
    asked_at_s: float
    task: asyncio.Task[None] | None = None


class WatchedRecords:
    """By tenant and whatever name the caller finds a record under. Only records that have not ended are kept."""

    def __init__(self, jobs: JobsApi, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self._clock_s = clock_s
        self._watches: dict[Key, _Watch] = {}

    def get(self, key: Key) -> JobRecord | None:
        """The record as it stands, None where it is not watched."""
        watch = self._watches.get(key)
        if watch is None:
            return None
        watch.asked_at_s = self._clock_s()
        return watch.record

    def watch(self, key: Key, record: JobRecord) -> None:
        """Keep a copy of a record that was just read, where it may still change and there is room."""
        if record.state.is_terminal or key in self._watches or len(self._watches) >= WATCHED_MAX:
            return
        watch = _Watch(record, self._clock_s())
        self._watches[key] = watch
        watch.task = asyncio.create_task(self._follow(key, watch))

    def forget(self, key: Key) -> None:
        """After a change by this process, which the next poll must see."""
        watch = self._watches.pop(key, None)
        if watch is not None and watch.task is not None:
            watch.task.cancel()

    async def close(self) -> None:
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        for key in list(self._watches):
            self.forget(key)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, key: Key, watch: _Watch) -> None:
        """Until the record has ended, nobody asks any more, or it cannot be read."""
        try:
            while not watch.record.state.is_terminal and self._clock_s() - watch.asked_at_s <= IDLE_S:
                record = watch.record
                watch.record = await self._jobs.wait(
                    record.id, tenant=record.tenant, timeout_s=SLICE_S, until="change", since=record.updated_at
                )
        except JobError as error:
            logger.warning("%s is watched no more: %s", watch.record.id, error.code)
        finally:
            if self._watches.get(key) is watch:
                del self._watches[key]
