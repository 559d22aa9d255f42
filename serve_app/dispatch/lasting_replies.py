"""The reply table with what clients rely on noted in the job records' database: a job without a record, whose id a
client has, is found again after the table's process was lost, and its `Idempotency-Key` still means it.

Noted is each beginning and each end, before it is told. The beginning of a job that a record is to take over from is
not: its record, and the key that is kept with it, outlive everything anyway. Where the database does not answer in time
the table goes on alone.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from pydantic import TypeAdapter, ValidationError

from serve_app.collaborators import JobsApi
from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, SavedReply, Settled
from serve_app.links import put_back, taken_out
from storage.errors import JobError
from storage.jobs import Jobs
from storage.kept_replies import NotedReply

logger = logging.getLogger(__name__)

PREFIX = "quick:"
# /run is to answer within the three seconds that the JavaScript client waits.
NOTE_TIMEOUT_S = 1.0
RESTORE_WAIT_S = 5.0
RESTORE_RETRY_S = 1.0
# Larger results, which are files' bytes, are quicker asked for again than kept twice; what is larger only by what was
# sent with a job is noted without it, and cannot be retried after a restart.
NOTE_BYTES_MAX = 256 * 1024

_SAVED = TypeAdapter(SavedReply)


class LastingReplies:
    """Belongs to one event loop. `restore` is to run once; until it has, calls wait, for `RESTORE_WAIT_S` at most."""

    def __init__(self, table: ReplyTable, jobs: JobsApi) -> None:
        self.table = table
        self._jobs = jobs
        self._is_restored = asyncio.Event()

    async def restore(self) -> None:
        """Put back what was noted, as soon as the database can be read."""
        while True:
            try:
                noted = await self._jobs.call(Jobs.noted_replies, PREFIX)
            except JobError as error:
                logger.warning("The replies of an earlier dispatcher could not be read (%s)", error.code)
                await asyncio.sleep(RESTORE_RETRY_S)
                continue
            for one in noted:
                self._put_back(one)
            self._is_restored.set()
            return

    def _put_back(self, noted: NotedReply) -> None:
        body = noted.body or ""
        try:
            saved = _SAVED.validate_json(body)
            if saved.reply.output is not None:
                put_back(saved.reply.output, saved.links)
        except (ValidationError, LookupError, TypeError):
            logger.warning("A reply that another version noted is not understood")
            return
        self.table.put_back(saved, size_bytes=len(body))

    async def ready(self) -> None:
        if self._is_restored.is_set():
            return
        try:
            await asyncio.wait_for(self._is_restored.wait(), RESTORE_WAIT_S)
        except TimeoutError:
            logger.warning("The replies of an earlier dispatcher are still not read; answering without them")
            # They are put back whenever they are read; until then every call would wait as long.
            self._is_restored.set()

    async def open(self, tenant: str, runpod_id: str, opening: Opening) -> str:
        """Like `ReplyTable.open`. Raises IdempotencyKeyReused."""
        await self.ready()
        known = self.table.open(tenant, runpod_id, opening)
        if known == runpod_id and opening.status == "IN_PROGRESS":
            await self._note(tenant, runpod_id)
        return known

    async def reopen(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened:
        """Like `ReplyTable.reopen`. Raises RunpodJobNotFound, RunpodJobNotRetryable, RunpodJobNotKept."""
        await self.ready()
        reopened = self.table.reopen(tenant, runpod_id, owner=owner, kept_s=kept_s)
        await self._note(tenant, runpod_id)
        return reopened

    async def hand_over(self, tenant: str, runpod_id: str, *, to: str) -> bool:
        """Like `ReplyTable.hand_over`. What was noted of an attempt before would stand before the record."""
        before = self.table.get(tenant, runpod_id)
        was_cancelled = self.table.hand_over(tenant, runpod_id, to=to)
        if before is not None and before.attempt > 1:
            await self._write(NotedReply(tenant, f"{PREFIX}{runpod_id}", None, before.created_at))
        return was_cancelled

    async def settle(self, ended: EndedReply) -> Settled | None:
        """Like `ReplyTable.settle`."""
        await self.ready()
        before = self.table.get(ended.tenant, ended.runpod_id)
        settled = self.table.settle(ended)
        if before is not None and not before.is_final and (before.status == "IN_PROGRESS" or ended.reply.is_retryable):
            await self._note(ended.tenant, ended.runpod_id)
        return settled

    async def cancel(self, tenant: str, runpod_id: str) -> Reply | None:
        """Like `ReplyTable.cancel`."""
        await self.ready()
        reply = self.table.cancel(tenant, runpod_id)
        if reply is not None:
            await self._note(tenant, runpod_id)
        return reply

    async def _note(self, tenant: str, runpod_id: str) -> None:
        saved = self.table.saved(tenant, runpod_id)
        if saved is None:
            return
        if saved.sent is not None and saved.sent.size_bytes > NOTE_BYTES_MAX:
            saved = replace(saved, sent=None)
        if saved.reply.output is not None:
            output, links = taken_out(saved.reply.output)
            saved = replace(saved, reply=replace(saved.reply, output=output), links=links)
        body = _SAVED.dump_json(saved).decode()
        if len(body) > NOTE_BYTES_MAX and saved.sent is not None:
            body = _SAVED.dump_json(replace(saved, sent=None)).decode()
        name = f"{PREFIX}{runpod_id}"
        await self._write(NotedReply(tenant, name, body if len(body) <= NOTE_BYTES_MAX else None, saved.expires_at))

    async def _write(self, noted: NotedReply) -> None:
        try:
            async with asyncio.timeout(NOTE_TIMEOUT_S):
                await self._jobs.call(Jobs.note_replies, [noted])
        except (JobError, TimeoutError) as error:
            logger.warning("The next dispatcher would not know how %s stands (%s)", noted.name, type(error).__name__)
