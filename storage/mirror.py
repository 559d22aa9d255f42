"""The copy of the job records in object storage: written behind the database, read when the database is empty."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from pydantic import ValidationError

from storage.errors import InvalidKey, ObjectNotFound
from storage.job_record import JobRecord
from storage.jobs import RESTORED_FLAG
from storage.keys import Keys
from storage.objects import ObjectStore, PutItem
from storage.records import OutboxEntry, Records

logger = logging.getLogger(__name__)

BATCH = 64


@dataclass(frozen=True)
class FlushReport:
    """`retry_after_s` is the longest wait that the store asked for."""

    written: int
    failed: int
    retry_after_s: float = 0.0


@dataclass(frozen=True)
class RestoreReport:
    """`unreadable` objects were no records: torn writes, or something else under the mirror's prefix."""

    restored: int
    unreadable: int


class Mirror:
    """Nothing is lost while the store is away: an entry stays in the outbox until its record was written."""

    def __init__(self, records: Records, store: ObjectStore, prefix: str) -> None:
        self._records = records
        self._store = store
        # The mirror lies beside the tenants, not below one, so any tenant's keys lead to it.
        self._keys = Keys(prefix, "default")
        self._trouble: str | None = None

    async def flush(self) -> FlushReport:
        """Write one batch of the outbox. A record that cannot be written is tried again after all the others."""
        entries = await asyncio.to_thread(self._outbox)
        if not entries:
            return FlushReport(written=0, failed=0)
        items = [PutItem(self._key(entry), _to_json(entry.record), "application/json") for entry in entries]
        outcomes = await self._store.put_many(items)
        written = [entry.seq for entry, outcome in zip(entries, outcomes, strict=True) if outcome.error is None]
        failed = [entry.seq for entry, outcome in zip(entries, outcomes, strict=True) if outcome.error is not None]
        await asyncio.to_thread(self._settle, written, failed)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        self._tell(errors[0].code if errors else None, len(errors), len(entries))
        waits = [error.retry_after_s or 0.0 for error in errors]
        return FlushReport(len(written), len(failed), max(waits, default=0.0))

    def _tell(self, trouble: str | None, failed: int, tried: int) -> None:
        """Once for each kind of trouble, which may last for hours."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble is None:
            logger.info("mirror: records are written again")
        else:
            logger.warning("mirror: %d of %d records not written (%s)", failed, tried, trouble)

    async def restore(self) -> RestoreReport | None:
        """Bring the records back into a database that never looked for them; None where that was done before.

        Records that exist are kept. Raises StorageError when the store cannot be read; nothing is marked done then.
        """
        if await asyncio.to_thread(self._is_restored):
            return None
        restored = unreadable = 0
        for info in await self._store.list(self._keys.process_records_prefix()):
            record = await self._read(info.key)
            if record is None:
                unreadable += 1
            elif await asyncio.to_thread(self._insert, record):
                restored += 1
        await asyncio.to_thread(self._mark_restored)
        if restored or unreadable:
            logger.warning("mirror: restored %d records, %d objects were unreadable", restored, unreadable)
        return RestoreReport(restored, unreadable)

    async def _read(self, key: str) -> JobRecord | None:
        try:
            return JobRecord.model_validate_json(await self._store.get(key))
        except (ValidationError, ObjectNotFound, InvalidKey) as error:
            logger.error("mirror: an object is no record (%s)", type(error).__name__)
            return None

    def _key(self, entry: OutboxEntry) -> str:
        return self._keys.process_record(entry.record.id)

    def _outbox(self) -> list[OutboxEntry]:
        with self._records.read("mirror") as tx:
            return tx.outbox(BATCH)

    def _settle(self, written: list[int], failed: list[int]) -> None:
        with self._records.write("mirror") as tx:
            tx.settle_outbox(written=written, failed=failed)

    def _is_restored(self) -> bool:
        with self._records.read("restore") as tx:
            return tx.has_flag(RESTORED_FLAG)

    def _mark_restored(self) -> None:
        with self._records.write("restore") as tx:
            tx.set_flag(RESTORED_FLAG)

    def _insert(self, record: JobRecord) -> bool:
        with self._records.write("restore") as tx:
            if not tx.insert_missing(record):
                return False
            if record.state.is_leased and record.submission_id is not None:
                tx.open_submission(record.submission_id, record.id)
            return True


def _to_json(record: JobRecord) -> bytes:
    return record.model_dump_json().encode()
