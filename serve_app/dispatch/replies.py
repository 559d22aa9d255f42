"""The replies of RunPod jobs that have no job record: health, upload, listings, refused requests.

A record is made for trainings and generations only; every other job type ends within its own request, and its reply is
kept here for as long as RunPod keeps results. The table is bounded and lives in memory; `lasting_replies` notes what
must outlive it. A job ends with the ingress process that does it: one whose process has not been heard of for a while
is FAILED. Who cancels one is told so at once; its process hears of it the next time that it is heard from. What was
sent with a job is kept beside its reply until it has come to something, so that one that failed can be done again
under its id.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from pydantic_core import to_json

from serve_app.dispatch.fair_store import FairStore
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, SavedReply, Seen, Sent, Settled
from serve_app.errors import (
    IdempotencyKeyReused,
    JobInterrupted,
    RunpodJobNotFound,
    RunpodJobNotKept,
    RunpodJobNotRetryable,
)
from serve_app.ingress.errors import describe

SWEEP_INTERVAL = timedelta(seconds=1)
WAIT_SLICE_S = 5.0
OWNER_SILENT_MAX = timedelta(seconds=30)
RETRIED = "retried"


@dataclass
class _Entry:
    """`fingerprint`: the key of the request, until a record answers for it."""

    place: tuple[str, str]
    reply: Reply
    kept_s: float
    expires_at: datetime
    owner: str | None = None
    fingerprint: str | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    is_drained: bool = False


class ReplyTable:
    """Bounded, single-owner. All times come from `clock` (aware, UTC).

    Beyond the bounds, a tenant with many or large replies loses its own oldest, and no job under way before those that
    have ended. A key goes with the reply that it stands for: who sends it then begins anew, and is not told an id that
    nobody knows.
    """

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        entries_max: int = 10_000,
        bytes_max: int = 64 * 1024 * 1024,
        pending_max_s: float = 660.0,
    ) -> None:
        self._clock = clock
        self._pending_max_s = pending_max_s
        self._entries: FairStore[_Entry] = FairStore(
            entries_max=entries_max,
            bytes_max=bytes_max,
            may_go=lambda entry: entry.reply.is_final,
            dropped=self._dropped,
        )
        self._seen: FairStore[Seen] = FairStore(entries_max=entries_max)
        # With bounds of its own: a job that cannot be retried is better than one whose reply is lost.
        self._sent: FairStore[Sent] = FairStore(entries_max=entries_max, bytes_max=bytes_max)
        self._heard: dict[str, datetime] = {}
        self._to_stop: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        self._swept_at = clock()

    def open(self, tenant: str, runpod_id: str, opening: Opening) -> str:
        """Note a job that begins now. Returns `runpod_id`, or the id of the same request that came before.

        Raises IdempotencyKeyReused where the client's key came with another body.
        """
        now = self._clock()
        self._sweep(now)
        fingerprint = opening.fingerprint
        if fingerprint is not None:
            earlier = self._seen.get(tenant, fingerprint.key)
            if earlier is not None and earlier.expires_at > now and earlier.runpod_id != opening.instead_of:
                if earlier.body_sha256 != fingerprint.body_sha256:
                    raise IdempotencyKeyReused
                return earlier.runpod_id
            expires_at = now + timedelta(seconds=fingerprint.kept_s)
            seen = Seen(runpod_id, fingerprint.body_sha256, expires_at, fingerprint.named_by_client)
            self._seen.put(tenant, fingerprint.key, seen)
        if (tenant, runpod_id) in self._entries:
            # It ended on its way here.
            return runpod_id
        reply = Reply(opening.status, created_at=now)
        mark = None if fingerprint is None else fingerprint.key
        ends_at = now + timedelta(seconds=self._pending_max_s)
        begun = _Entry((tenant, runpod_id), reply, opening.kept_s, ends_at, opening.owner, mark)
        self._entries.put(tenant, runpod_id, begun)
        self._keep_sent(tenant, runpod_id, opening.sent)
        if opening.owner is not None:
            self._heard[opening.owner] = now
        return runpod_id

    def reopen(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened:
        """A job that failed or timed out begins once more, at the process `owner`. Its next reply is kept for `kept_s`,
        or as long as this one where that is longer.

        Raises RunpodJobNotFound, RunpodJobNotRetryable, RunpodJobNotKept (what was sent with it is not there any more).
        """
        now = self._clock()
        if self.get(tenant, runpod_id) is None:
            raise RunpodJobNotFound
        entry = self._entries.get(tenant, runpod_id)
        if entry is None or not entry.reply.is_retryable:
            raise RunpodJobNotRetryable
        sent = self._sent.get(tenant, runpod_id)
        if sent is None:
            raise RunpodJobNotKept
        attempt = entry.reply.attempt + 1
        begun = _Entry(
            (tenant, runpod_id),
            Reply(sent.begins_as, created_at=now, attempt=attempt),
            max(kept_s, entry.kept_s),
            now + timedelta(seconds=self._pending_max_s),
            owner,
            entry.fingerprint,
        )
        self._entries.put(tenant, runpod_id, begun)
        self._heard[owner] = now
        return Reopened(sent, attempt)

    def hear_from(self, owner: str) -> list[tuple[str, str]]:
        """That process is still there, and so are the jobs that it opened. Returns those of them, by tenant and id,
        that were cancelled since it was last heard from."""
        self._heard[owner] = self._clock()
        self._sweep(self._clock())
        return self._to_stop.pop(owner, [])

    def settle(self, ended: EndedReply) -> Settled | None:
        """Note how the job ended; a second ending is ignored, and so is that of an attempt which was given up.

        Returns how it ended, None where nothing is known of it.
        """
        entry = self._entries.get(ended.tenant, ended.runpod_id)
        if entry is None:
            return None
        if not entry.reply.is_final and entry.reply.attempt == ended.reply.attempt:
            self._settle(ended.tenant, ended.runpod_id, entry, ended.reply)
        return Settled(entry.reply.status, entry.reply.attempt)

    def _settle(self, tenant: str, runpod_id: str, entry: _Entry, reply: Reply) -> None:
        """With the times that this table knows."""
        now = self._clock()
        entry.reply = replace(reply, created_at=entry.reply.created_at, finished_at=now, attempt=entry.reply.attempt)
        if not reply.is_retryable:
            self._sent.pop(tenant, runpod_id)
        entry.expires_at = now + timedelta(seconds=entry.kept_s)
        if reply.status != "COMPLETED":
            self._forget_unnamed(tenant, entry)
        entry.settled.set()
        size_bytes = 0 if reply.output is None else len(to_json(reply.output))
        self._entries.put(tenant, runpod_id, entry, size_bytes=size_bytes)

    def cancel(self, tenant: str, runpod_id: str) -> Reply | None:
        """A job that has not ended is CANCELLED from now on. Returns how it stands, None where nothing is known of
        it."""
        entry = self._entries.get(tenant, runpod_id)
        if entry is None:
            return None
        if not entry.reply.is_final:
            self._settle(tenant, runpod_id, entry, Reply("CANCELLED", entry.reply.created_at))
            if entry.owner is not None:
                self._to_stop[entry.owner].append((tenant, runpod_id))
        return entry.reply

    def saved(self, tenant: str, runpod_id: str) -> SavedReply | None:
        entry = self._entries.get(tenant, runpod_id)
        if entry is None:
            return None
        seen = None if entry.fingerprint is None else self._seen.get(tenant, entry.fingerprint)
        return SavedReply(
            tenant, runpod_id, entry.reply, entry.kept_s, entry.expires_at, entry.owner, entry.fingerprint, seen,
            self._sent.get(tenant, runpod_id),
        )  # fmt: skip

    def put_back(self, saved: SavedReply, *, size_bytes: int) -> None:
        """What was noted of a job, where nothing newer is known. Its owner is taken to be there until it is silent."""
        now = self._clock()
        tenant, key = saved.tenant, saved.fingerprint
        if saved.expires_at <= now or (tenant, saved.runpod_id) in self._entries:
            return
        seen = saved.seen
        if key is not None and seen is not None and seen.expires_at > now and self._seen.get(tenant, key) is None:
            self._seen.put(tenant, key, seen)
        entry = _Entry((tenant, saved.runpod_id), saved.reply, saved.kept_s, saved.expires_at, saved.owner, key)
        if saved.reply.is_final:
            entry.settled.set()
        elif saved.owner is not None:
            self._heard.setdefault(saved.owner, now)
        self._entries.put(tenant, saved.runpod_id, entry, size_bytes=size_bytes)
        self._keep_sent(tenant, saved.runpod_id, saved.sent)

    def counts(self, tenant: str) -> dict[str, int]:
        """The tenant's jobs that are known here, by status, and as `retried` how often they were."""
        self._sweep(self._clock())
        replies = [entry.reply for entry in self._entries.of(tenant)]
        return {**Counter(reply.status for reply in replies), RETRIED: sum(reply.attempt - 1 for reply in replies)}

    def keep(self, ended: EndedReply) -> None:
        """Note a job that has ended, whether it was opened before or not; a second ending is ignored."""
        tenant, runpod_id, reply = ended.tenant, ended.runpod_id, ended.reply
        if (tenant, runpod_id) not in self._entries:
            expires_at = self._clock() + timedelta(seconds=ended.kept_s)
            begun = Reply("IN_PROGRESS", reply.created_at, attempt=reply.attempt)
            self._entries.put(tenant, runpod_id, _Entry((tenant, runpod_id), begun, ended.kept_s, expires_at))
            self._keep_sent(tenant, runpod_id, ended.sent)
        self.settle(ended)

    def _keep_sent(self, tenant: str, runpod_id: str, sent: Sent | None) -> None:
        if sent is not None:
            self._sent.put(tenant, runpod_id, sent, size_bytes=sent.size_bytes)

    def hand_over(self, tenant: str, runpod_id: str, *, to: str) -> bool:
        """A job record answers from now on, under the id `to`; the same request sent again is told that id.

        Returns whether the job was cancelled before.
        """
        entry = self._entries.get(tenant, runpod_id)
        if entry is not None and entry.fingerprint is not None:
            seen = self._seen.get(tenant, entry.fingerprint)
            if seen is not None:
                self._seen.put(tenant, entry.fingerprint, replace(seen, runpod_id=to))
            entry.fingerprint = None
        self._entries.pop(tenant, runpod_id)
        self._sent.pop(tenant, runpod_id)
        return entry is not None and entry.reply.status == "CANCELLED"

    def get(self, tenant: str, runpod_id: str) -> Reply | None:
        """How the job stands, or None where it is unknown here: expired, another tenant's, or held by a record."""
        now = self._clock()
        self._sweep(now)
        entry = self._entries.get(tenant, runpod_id)
        return None if entry is None or entry.expires_at <= now else entry.reply

    def drain(self, tenant: str, runpod_id: str) -> bool:
        """Whether the final output is still to be streamed; True once."""
        entry = self._entries.get(tenant, runpod_id)
        if entry is None or not entry.reply.is_final or entry.is_drained:
            return False
        entry.is_drained = True
        return True

    async def wait(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None:
        """Like `get`, after the job ended, was handed over, or `timeout_s` passed."""
        entry = self._entries.get(tenant, runpod_id)
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

    def _dropped(self, entry: _Entry) -> None:
        entry.settled.set()
        tenant, runpod_id = entry.place
        seen = None if entry.fingerprint is None else self._seen.get(tenant, entry.fingerprint)
        if entry.fingerprint is not None and seen is not None and seen.runpod_id == runpod_id and entry.reply.is_final:
            self._seen.pop(tenant, entry.fingerprint)

    def _forget_unnamed(self, tenant: str, entry: _Entry) -> None:
        seen = None if entry.fingerprint is None else self._seen.get(tenant, entry.fingerprint)
        if seen is not None and entry.fingerprint is not None and not seen.named_by_client:
            self._seen.pop(tenant, entry.fingerprint)

    def _sweep(self, now: datetime) -> None:
        """Forget what has expired. Looks at everything, so not at every call: that would cost each one milliseconds."""
        if now < self._swept_at + SWEEP_INTERVAL:
            return
        self._swept_at = now
        self._interrupt(now)
        for tenant, runpod_id, entry in self._entries.items():
            if entry.expires_at <= now:
                self._entries.pop(tenant, runpod_id)
        for tenant, runpod_id, _ in self._sent.items():
            if (tenant, runpod_id) not in self._entries:
                self._sent.pop(tenant, runpod_id)
        for tenant, mark, seen in self._seen.items():
            if seen.expires_at <= now:
                self._seen.pop(tenant, mark)

    def _interrupt(self, now: datetime) -> None:
        """End the jobs whose owner is silent."""
        silent = {owner for owner, heard_at in self._heard.items() if heard_at + OWNER_SILENT_MAX <= now}
        if not silent:
            return
        told = describe(JobInterrupted())
        output = {"error": told.message, "error_type": told.code}
        for tenant, runpod_id, entry in self._entries.items():
            if entry.owner in silent and not entry.reply.is_final:
                began = entry.reply.created_at
                lost = Reply("FAILED", began, output=output, error=told.message, is_interrupted=True)
                self._settle(tenant, runpod_id, entry, lost)
        for owner in silent:
            del self._heard[owner]
            self._to_stop.pop(owner, None)
