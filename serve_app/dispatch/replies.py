"""The replies of RunPod jobs that have no job record: health, upload, listings, refused requests.

A record is made for trainings and generations only; every other job type ends within its own request, and its reply is
kept here for as long as RunPod keeps results. The table is bounded and lives in memory: after a restart of the
dispatcher these ids answer 404, like expired ones. A job ends with the ingress process that does it: one whose process
has not been heard of for a while is FAILED.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from serve_app.errors import IdempotencyKeyReused, JobInterrupted
from serve_app.ingress.errors import describe

SWEEP_INTERVAL = timedelta(seconds=1)
WAIT_SLICE_S = 5.0
OWNER_SILENT_MAX = timedelta(seconds=30)
ReplyStatus = Literal["IN_QUEUE", "COMPLETED", "FAILED"]


@dataclass(frozen=True)
class Reply:
    """How a job without a record stands. `error` is set exactly where `status` is FAILED.

    Until it ends it is IN_QUEUE: should a record take over, the status then never goes backwards. `is_interrupted`: its
    process was lost, which may have happened after it had made a record and before it could say so here.
    """

    status: ReplyStatus
    created_at: datetime
    finished_at: datetime | None = None
    output: dict[str, Any] | None = None
    error: str | None = None
    is_interrupted: bool = False

    @property
    def is_final(self) -> bool:
        return self.status != "IN_QUEUE"


@dataclass(frozen=True)
class EndedReply:
    """A final reply that is to be found under its id for `kept_s`."""

    tenant: str
    runpod_id: str
    reply: Reply
    kept_s: float


@dataclass(frozen=True)
class Fingerprint:
    """What makes two requests the same one: the client's key, or the body itself; kept for `kept_s`.

    Where the client named no key, the fingerprint of a request that failed is forgotten at once, so that the same
    body can be sent again after its cause was mended.
    """

    key: str
    body_sha256: str
    kept_s: float
    named_by_client: bool


@dataclass
class _Entry:
    reply: Reply
    kept_s: float
    expires_at: datetime
    owner: str | None = None
    size_bytes: int = 0
    fingerprint: tuple[str, str] | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    is_drained: bool = False


@dataclass(frozen=True)
class _Seen:
    runpod_id: str
    body_sha256: str
    expires_at: datetime
    named_by_client: bool


class ReplyTable:
    """Bounded, single-owner. All times come from `clock` (aware, UTC)."""

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        entries_max: int = 10_000,
        bytes_max: int = 64 * 1024 * 1024,
        pending_max_s: float = 660.0,
    ) -> None:
        self._clock = clock
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._pending_max_s = pending_max_s
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._seen: OrderedDict[tuple[str, str], _Seen] = OrderedDict()
        self._heard: dict[str, datetime] = {}
        self._bytes = 0
        self._swept_at = clock()

    def open(
        self,
        tenant: str,
        runpod_id: str,
        *,
        kept_s: float,
        fingerprint: Fingerprint | None,
        owner: str | None = None,
    ) -> str:
        """Note a job that begins now. Returns `runpod_id`, or the id of the same request that came before.

        `owner` is the process that does it, which must be heard from until it has ended; None is believed for ever.
        Raises IdempotencyKeyReused where the client's key came with another body.
        """
        now = self._clock()
        self._sweep(now)
        mark = None
        if fingerprint is not None:
            mark = (tenant, fingerprint.key)
            earlier = self._seen.get(mark)
            if earlier is not None and earlier.expires_at > now:
                if earlier.body_sha256 != fingerprint.body_sha256:
                    raise IdempotencyKeyReused
                return earlier.runpod_id
            self._seen[mark] = _Seen(
                runpod_id,
                fingerprint.body_sha256,
                now + timedelta(seconds=fingerprint.kept_s),
                fingerprint.named_by_client,
            )
        if (tenant, runpod_id) in self._entries:
            # It ended on its way here.
            return runpod_id
        expires_at = now + timedelta(seconds=self._pending_max_s)
        reply = Reply(status="IN_QUEUE", created_at=now)
        self._entries[tenant, runpod_id] = _Entry(reply, kept_s, expires_at, owner, fingerprint=mark)
        if owner is not None:
            self._heard[owner] = now
        self._shrink()
        return runpod_id

    def hear_from(self, owner: str) -> None:
        """That process is still there, and so are the jobs that it opened."""
        self._heard[owner] = self._clock()
        self._sweep(self._clock())

    def settle(
        self, tenant: str, runpod_id: str, *, output: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        """Note how the job ended; a second ending is ignored. `error` makes it FAILED."""
        entry = self._entries.get((tenant, runpod_id))
        if entry is not None and not entry.reply.is_final:
            self._settle(entry, output, error)

    def _settle(
        self, entry: _Entry, output: dict[str, Any] | None, error: str | None, *, is_interrupted: bool = False
    ) -> None:
        now = self._clock()
        entry.reply = Reply(
            status="COMPLETED" if error is None else "FAILED",
            created_at=entry.reply.created_at,
            finished_at=now,
            output=output,
            error=error,
            is_interrupted=is_interrupted,
        )
        entry.expires_at = now + timedelta(seconds=entry.kept_s)
        entry.size_bytes = len(json.dumps(output)) if output is not None else 0
        self._bytes += entry.size_bytes
        if error is not None:
            self._forget_unnamed(entry)
        entry.settled.set()
        self._shrink()

    def keep(self, ended: EndedReply) -> None:
        """Note a job that has ended, whether it was opened before or not; a second ending is ignored."""
        key = (ended.tenant, ended.runpod_id)
        if key not in self._entries:
            expires_at = self._clock() + timedelta(seconds=ended.kept_s)
            self._entries[key] = _Entry(Reply("IN_QUEUE", ended.reply.created_at), ended.kept_s, expires_at)
        self.settle(*key, output=ended.reply.output, error=ended.reply.error)

    def hand_over(self, tenant: str, runpod_id: str, *, to: str) -> None:
        """A job record answers from now on, under the id `to`; the same request sent again is told that id."""
        entry = self._entries.get((tenant, runpod_id))
        seen = None if entry is None or entry.fingerprint is None else self._seen.get(entry.fingerprint)
        if entry is not None and entry.fingerprint is not None and seen is not None:
            self._seen[entry.fingerprint] = replace(seen, runpod_id=to)
        self._drop((tenant, runpod_id))

    def get(self, tenant: str, runpod_id: str) -> Reply | None:
        """How the job stands, or None where it is unknown here: expired, another tenant's, or held by a record."""
        now = self._clock()
        self._sweep(now)
        entry = self._entries.get((tenant, runpod_id))
        return None if entry is None or entry.expires_at <= now else entry.reply

    def drain(self, tenant: str, runpod_id: str) -> bool:
        """Whether the final output is still to be streamed; True once."""
        entry = self._entries.get((tenant, runpod_id))
        if entry is None or not entry.reply.is_final or entry.is_drained:
            return False
        entry.is_drained = True
        return True

    async def wait(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None:
        """Like `get`, after the job ended, was handed over, or `timeout_s` passed."""
        entry = self._entries.get((tenant, runpod_id))
        until = asyncio.get_running_loop().time() + timeout_s
        while entry is not None and not entry.reply.is_final:
            left_s = until - asyncio.get_running_loop().time()
            try:
                # In slices, because an owner's silence is only seen by looking.
                await asyncio.wait_for(entry.settled.wait(), min(left_s, WAIT_SLICE_S))
            except TimeoutError:
                if left_s <= WAIT_SLICE_S:
                    break
                self._sweep(self._clock())
            else:
                break
        return self.get(tenant, runpod_id)

    def _forget_unnamed(self, entry: _Entry) -> None:
        seen = None if entry.fingerprint is None else self._seen.get(entry.fingerprint)
        if seen is not None and entry.fingerprint is not None and not seen.named_by_client:
            del self._seen[entry.fingerprint]

    def _drop(self, key: tuple[str, str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.size_bytes
            entry.settled.set()

    def _sweep(self, now: datetime) -> None:
        """Forget what has expired. Looks at everything, so not at every call: that would cost each one milliseconds."""
        if now < self._swept_at + SWEEP_INTERVAL:
            return
        self._swept_at = now
        self._interrupt(now)
        for key in [key for key, entry in self._entries.items() if entry.expires_at <= now]:
            self._drop(key)
        for mark in [mark for mark, seen in self._seen.items() if seen.expires_at <= now]:
            del self._seen[mark]

    def _interrupt(self, now: datetime) -> None:
        """End the jobs whose owner is silent."""
        silent = {owner for owner, heard_at in self._heard.items() if heard_at + OWNER_SILENT_MAX <= now}
        if not silent:
            return
        told = describe(JobInterrupted())
        for entry in list(self._entries.values()):
            if entry.owner in silent and not entry.reply.is_final:
                output = {"error": told.message, "error_type": told.code}
                self._settle(entry, output, told.message, is_interrupted=True)
        for owner in silent:
            del self._heard[owner]

    def _shrink(self) -> None:
        """Drop the oldest beyond the bounds; the newest always stays."""
        while len(self._entries) > self._entries_max or (self._bytes > self._bytes_max and len(self._entries) > 1):
            self._drop(next(iter(self._entries)))
        while len(self._seen) > self._entries_max:
            self._seen.popitem(last=False)
