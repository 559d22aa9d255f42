"""The load of `outage.py`: callers that write, read and check, and some of them go away in the middle of a call."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.actor import StorageClient
from storage.errors import StorageError, StorageUnavailable
from storage.objects import PutItem
from storage.settings import MIB, S3Settings

SIZES = (100, 20_000, 300_000)
BATCH_ITEMS = 12
FILE_BYTES = 12 * MIB
PAUSE_S = 0.02
BATCH_PAUSE_S = 0.2
FILE_PAUSE_S = 1.0
PAUSE_AFTER_ERROR_S = 0.1
# So many calls are cancelled where they still last after one of these times.
CANCELLED_SHARE = 0.1
CANCELLED_AFTER_S = (0.002, 0.02, 0.2, 2.0)

OK, FAILED, REFUSED_AT_ONCE, CANCELLED = "ok", "failed", "refused", "cancelled"


@dataclass
class Phase:
    """What happened while a fault lasted; a call counts where it began. Times in seconds.

    `calls` by operation and end: ok; failed after attempts; refused without one; cancelled by its caller. `attempts`
    are the storage actor's, by what they told the breaker, `requests` what the server's port received of them (None
    where nobody listened). `beyond_deadline_s` is of the call that was furthest beyond its own deadline, or nearest to
    it where negative. `later_attempts` were made after the breaker had opened and what was under way then had ended.
    """

    name: str
    lasted_s: float = 0.0
    calls: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    attempts: dict[str, int] = field(default_factory=dict)
    requests: int | None = None
    failed_after_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    longest_deadline_s: float = 0.0
    beyond_deadline_s: float = float("-inf")
    opened_after_s: float | None = None
    later_attempts: dict[str, int] | None = None
    recovered_after_s: float | None = None

    def ended(self, end: str) -> int:
        return sum(ends[end] for ends in self.calls.values())


class Load:
    """Callers at work until told to pause or to stop. Belongs to one event loop."""

    def __init__(self, store: StorageClient, settings: S3Settings, folder: Path, workers: int) -> None:
        self._store = store
        self._settings = settings
        self._file = folder / "file"
        self._file.write_bytes(random.Random(0).randbytes(FILE_BYTES))
        self.acknowledged: dict[str, str] = {}
        self.phase = Phase("before")
        self.last_success = 0.0
        self.wrong_bytes = 0
        self._in_call = 0
        self._quiet = asyncio.Event()
        self._stopping = False
        self._going = asyncio.Event()
        self._going.set()
        rounds = [*[self._object] * workers, self._batch, self._upload]
        self._tasks = [asyncio.create_task(self._work(number, one)) for number, one in enumerate(rounds)]

    @staticmethod
    def attempts_at_once(workers: int, settings: S3Settings) -> int:
        """The most that these callers can have under way: one each, those of a batch and of a file's parts, and the
        clean-up of an upload that failed."""
        return workers + BATCH_ITEMS + settings.parts_in_flight + 1

    async def pause(self) -> None:
        """Returns when no call is under way."""
        self._going.clear()
        while self._in_call:
            await self._quiet.wait()

    def go_on(self) -> None:
        self._going.set()

    async def stop(self) -> None:
        self._stopping = True
        self._going.set()
        await asyncio.gather(*self._tasks)

    async def _work(self, worker: int, one: Any) -> None:
        chance = random.Random(worker)
        number = 0
        while not self._stopping:
            number += 1
            await asyncio.sleep(await one(f"load/{worker}/{number:06d}", chance))
            await self._going.wait()

    async def _object(self, key: str, chance: random.Random) -> float:
        """Returns how long to pause."""
        data = chance.randbytes(chance.choice(SIZES))
        sha256 = hashlib.sha256(data).hexdigest()
        if await self._timed("put", self._store.put(key, data), len(data), chance) is None:
            return PAUSE_AFTER_ERROR_S
        self.acknowledged[key] = sha256
        back = await self._timed("get", self._store.get(key, expected_sha256=sha256), len(data), chance)
        if back is not None and back != data:
            self.wrong_bytes += 1
        return PAUSE_S

    async def _batch(self, key: str, chance: random.Random) -> float:
        items = [PutItem(f"{key}/{n}", chance.randbytes(chance.choice(SIZES))) for n in range(BATCH_ITEMS)]
        outcomes = await self._timed("put_many", self._store.put_many(items), max(SIZES), chance)
        for item, outcome in zip(items, outcomes or (), strict=False):
            if outcome.error is None:
                self.acknowledged[item.key] = hashlib.sha256(item.data).hexdigest()
        return BATCH_PAUSE_S

    async def _upload(self, key: str, chance: random.Random) -> float:
        info = await self._timed("upload_file", self._store.upload_file(self._file, key), FILE_BYTES, chance)
        if info is None:
            return PAUSE_AFTER_ERROR_S
        self.acknowledged[key] = str(info.sha256)
        return FILE_PAUSE_S

    async def _timed(self, operation: str, call: Awaitable[Any], size_bytes: int, chance: random.Random) -> Any:
        """The result; None after an error or where the caller went away."""
        phase, started = self.phase, time.monotonic()
        patience_s = chance.choice(CANCELLED_AFTER_S) if chance.random() < CANCELLED_SHARE else None
        result = None
        self._in_call += 1
        self._quiet.clear()
        try:
            async with asyncio.timeout(patience_s):
                result = await call
        except TimeoutError:
            end = CANCELLED
        except StorageError as error:
            end = end_of([error])
        else:
            end = end_of([outcome.error for outcome in result]) if operation == "put_many" else OK
        finally:
            self._in_call -= 1
            if not self._in_call:
                self._quiet.set()
        took_s = time.monotonic() - started
        phase.calls[operation][end] += 1
        self._note_time(phase, end, took_s, size_bytes)
        return result

    def _note_time(self, phase: Phase, end: str, took_s: float, size_bytes: int) -> None:
        deadline_s = self._settings.deadline_s + size_bytes / self._settings.throughput_min_bytes_per_s
        phase.beyond_deadline_s = max(phase.beyond_deadline_s, took_s - deadline_s)
        if took_s > phase.longest_s:
            phase.longest_s, phase.longest_deadline_s = took_s, deadline_s
        if end == FAILED:
            phase.failed_after_s.append(took_s)
        if end == OK:
            self.last_success = time.monotonic()


def end_of(errors: list[StorageError | None]) -> str:
    """Of a call whose parts ended so. One of a batch that was tried makes the batch one that was."""
    there = [error for error in errors if error is not None]
    if not there:
        return OK
    untried = all(isinstance(error, StorageUnavailable) and error.attempts == 0 for error in there)
    return REFUSED_AT_ONCE if untried and len(there) == len(errors) else FAILED
