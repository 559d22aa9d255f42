"""Reads of the job records straight from their database, for processes that can reach it.

The jobs actor answers a write after its commit, and a read that begins after a commit sees it, in SQLite's WAL mode
from any process of the machine and in PostgreSQL from anywhere. So these reads are as true as the actor's own, and
they go on while it is away. Everything that writes goes through the actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from storage.errors import JobError, RecordsError, RecordsUnavailable
from storage.jobs import RESTORED_FLAG, Jobs
from storage.records import Records, RecordsTx
from storage.records_engine import mapped_errors
from storage.row_lookups import RowLookups

logger = logging.getLogger(__name__)

READS = frozenset(
    method.__name__
    for method in (
        Jobs.get,
        Jobs.get_by_runpod_id,
        Jobs.list,
        Jobs.counts,
        Jobs.queued,
        Jobs.retried,
        Jobs.events,
        Jobs.issued_keys,
    )
)
"""What may be asked here: nothing of it writes."""

_OF_ONE_ROW = frozenset({Jobs.get.__name__, Jobs.get_by_runpod_id.__name__})
BATCH_MAX = 64

Find = Callable[[], Awaitable[str | None]]


class NotReadableError(Exception):
    """Ask the jobs actor: the database is not open here, or did not answer."""


@dataclass(frozen=True)
class _Read:
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: asyncio.Future[Any]


class _OneView:
    """What a reading method of `Jobs` uses of `Records`, with all reads in one transaction."""

    def __init__(self, tx: RecordsTx) -> None:
        self._tx = tx

    @contextlib.contextmanager
    def read(self, operation: str) -> Iterator[RecordsTx]:
        with mapped_errors(operation):
            yield self._tx


class _Rows:
    """Reads of one row.

    Of SQLite on the event loop itself: the row is found by its key, in tens of microseconds and without waiting for a
    lock. A thread costs ten times that, because it and the event loop take the interpreter from one another. Where
    there is something to wait for it is a thread's all the same, with those that come while others are read in one
    transaction.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.lookups = None if records.file is None else RowLookups(records.file)
        self._here = None if self.lookups is None else Jobs(cast(Records, self.lookups))
        self._waiting: list[_Read] = []
        self._reading: asyncio.Task[None] | None = None

    async def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._here is not None:
            try:
                return getattr(Jobs, name)(self._here, *args, **kwargs)
            except RecordsUnavailable:
                logger.debug("%s waits for the database in a thread", name)
        read = _Read(name, args, kwargs, asyncio.get_running_loop().create_future())
        self._waiting.append(read)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return await read.answer

    def close(self) -> None:
        if self.lookups is not None:
            self.lookups.close()

    async def _read(self) -> None:
        while self._waiting:
            # A view that begins now sees all that was written before these were asked for.
            batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
            try:
                outcomes = await asyncio.to_thread(self._all, batch)
            except Exception as error:  # noqa: BLE001 each of them is told
                outcomes = [error] * len(batch)
            for read, outcome in zip(batch, outcomes, strict=True):
                if read.answer.done():
                    continue
                if isinstance(outcome, Exception):
                    read.answer.set_exception(outcome)
                else:
                    read.answer.set_result(outcome)

    def _all(self, batch: Sequence[_Read]) -> list[Any]:
        with self._records.read("batch") as tx:
            jobs = Jobs(cast(Records, _OneView(tx)))
            return [_outcome(jobs, read) for read in batch]


def _outcome(jobs: Jobs, read: _Read) -> Any:
    try:
        return getattr(Jobs, read.name)(jobs, *read.args, **read.kwargs)
    except Exception as error:  # noqa: BLE001 for whoever asked
        return error


class DirectReads:
    """Belongs to one event loop. The database is looked for in the background, so that no call waits for that."""

    def __init__(self, find: Find) -> None:
        """`find` brings the database's URL, None where this process cannot open it."""
        self._find = find
        self._opening: asyncio.Task[None] | None = None
        self._records: Records | None = None
        self._jobs: Jobs | None = None
        self._rows: _Rows | None = None
        self._file: tuple[str, int] | None = None

    @property
    def is_open(self) -> bool:
        return self._jobs is not None

    async def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The method of `Jobs` of that name, one of READS. Raises what it raises, and NotReadableError."""
        if self._jobs is None or self._rows is None or self._is_replaced():
            self._open_again()
            raise NotReadableError
        try:
            if name in _OF_ONE_ROW:
                return await self._rows.call(name, args, kwargs)
            return await asyncio.to_thread(getattr(Jobs, name), self._jobs, *args, **kwargs)
        except RecordsError as error:
            logger.warning("the records were not readable here (%s)", error.code)
            raise NotReadableError from error

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
        self._let_go()

    def _let_go(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._jobs = self._rows = None
        if self._records is not None:
            self._records.close()
            self._records = None

    def _is_replaced(self) -> bool:
        """Whether the file that is open here is no longer the database, which may have been lost and made anew."""
        if self._file is None:
            return False
        path, inode = self._file
        try:
            # At every read: a Path takes longer for it than the system.
            return os.stat(path).st_ino != inode
        except OSError:
            return True

    def _open_again(self) -> None:
        self._let_go()
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        try:
            url = await self._find()
            if url is None:
                # Another node's file. That does not change while this process lives, so the task never ends.
                await asyncio.Event().wait()
            elif not await asyncio.to_thread(self._opened, url):
                # The actor is still looking for records to restore, and has calls wait until it has.
                await asyncio.sleep(1.0)
        except JobError as error:
            logger.warning("the records are read through the jobs actor (%s)", error.code)
            await asyncio.sleep(1.0)

    def _opened(self, url: str) -> bool:
        records = Records(url, read_only=True)
        with records.read("restored") as tx:
            if not tx.has_flag(RESTORED_FLAG):
                records.close()
                return False
        file = records.file
        self._file = None if file is None else (str(file), file.stat().st_ino)
        self._records, self._jobs, self._rows = records, Jobs(records), _Rows(records)
        return True
