"""The asynchronous face of the life cycle: one set of methods, in this process over `Jobs` or across Ray."""

from __future__ import annotations

import abc
import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from storage.job_changes import JobList
from storage.job_record import DEFAULT_LEASE_S, Drained, Heartbeat, JobRecord, JobsHealth, NewJob, Page
from storage.job_state import JobKind, JobState
from storage.job_streams import DRAIN_MAX, NONE_UNDER_WAY, WEBHOOKS_TAKEN_MAX, EventList, WebhookList
from storage.jobs import Jobs, new_job_id
from storage.webhook_record import Webhook

P = ParamSpec("P")
T = TypeVar("T")

Until = Literal["final", "change"]


class AsyncJobsApi(abc.ABC):
    """The methods of `Jobs`, awaited, and `wait`. Their meaning and errors are documented there."""

    @abc.abstractmethod
    async def call(self, method: Callable[Concatenate[Jobs, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a method of `Jobs` where the records are: `call(Jobs.get, job_id)`."""

    @abc.abstractmethod
    async def wait(
        self,
        job_id: str,
        *,
        tenant: str | None,
        timeout_s: float,
        until: Until = "final",
        since: datetime | None = None,
    ) -> JobRecord:
        """Long-poll: the record once it is final, or, with "change", once its `updated_at` is after `since`.

        `since` None means from now on. A final record is returned at once. After `timeout_s` the record is returned
        as it then is. Raises JobNotFound.
        """

    async def create(self, job: NewJob) -> JobRecord:
        # The id is chosen on this side, so that a creation repeated after a lost answer makes no second job.
        named = job if job.job_id is not None else job.model_copy(update={"job_id": new_job_id(job.kind)})
        return await self.call(Jobs.create, named)

    async def get(self, job_id: str, *, tenant: str | None = None) -> JobRecord:
        return await self.call(Jobs.get, job_id, tenant=tenant)

    async def get_by_runpod_id(self, runpod_id: str, *, tenant: str) -> JobRecord:
        return await self.call(Jobs.get_by_runpod_id, runpod_id, tenant=tenant)

    async def list(
        self,
        tenant: str,
        *,
        kind: JobKind | None = None,
        states: Sequence[JobState] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        return await self.call(Jobs.list, tenant, kind=kind, states=states, limit=limit, cursor=cursor)

    async def counts(self, tenant: str | None = None, *, kind: JobKind | None = None) -> dict[JobState, int]:
        return await self.call(Jobs.counts, tenant, kind=kind)

    async def queued(self, kind: JobKind) -> dict[str, int]:
        return await self.call(Jobs.queued, kind)

    async def retried(self, tenant: str | None = None, *, kind: JobKind | None = None) -> int:
        return await self.call(Jobs.retried, tenant, kind=kind)

    async def is_keyed(self, job_id: str) -> bool:
        return await self.call(Jobs.is_keyed, job_id)

    async def request_cancel(self, job_id: str, *, tenant: str | None) -> JobRecord:
        return await self.call(Jobs.request_cancel, job_id, tenant=tenant)

    async def retry(self, job_id: str, *, tenant: str | None) -> JobRecord:
        return await self.call(Jobs.retry, job_id, tenant=tenant)

    async def purge_queue(self, tenant: str, *, kind: JobKind | None = None) -> int:
        return await self.call(Jobs.purge_queue, tenant, kind=kind)

    async def claim(self, kind: JobKind, owner: str, *, limit: int = 1, lease_s: float = DEFAULT_LEASE_S) -> JobList:
        return await self.call(Jobs.claim, kind, owner, limit=limit, lease_s=lease_s)

    async def adopt(
        self, job_id: str, owner: str, lease_s: float = DEFAULT_LEASE_S, *, submission_id: str | None = None
    ) -> JobRecord:
        return await self.call(Jobs.adopt, job_id, owner, lease_s, submission_id=submission_id)

    async def attach(self, job_id: str, *, owner: str, submission_id: str) -> JobRecord:
        return await self.call(Jobs.attach, job_id, owner=owner, submission_id=submission_id)

    async def start(
        self, job_id: str, owner: str, *, worker_id: str | None = None, lease_s: float = DEFAULT_LEASE_S
    ) -> JobRecord:
        return await self.call(Jobs.start, job_id, owner, worker_id=worker_id, lease_s=lease_s)

    async def heartbeat(
        self,
        job_id: str,
        owner: str,
        *,
        progress: dict[str, Any] | None = None,
        events: Sequence[dict[str, Any]] | None = None,
        lease_s: float = DEFAULT_LEASE_S,
    ) -> Heartbeat:
        return await self.call(Jobs.heartbeat, job_id, owner, progress=progress, events=events, lease_s=lease_s)

    async def complete(
        self, job_id: str, owner: str, output: dict[str, Any], *, events: Sequence[dict[str, Any]] = ()
    ) -> JobRecord:
        return await self.call(Jobs.complete, job_id, owner, output, events=events)

    async def fail(
        self, job_id: str, owner: str, error_code: str, message: str, *, retryable: bool = False
    ) -> JobRecord:
        return await self.call(Jobs.fail, job_id, owner, error_code, message, retryable=retryable)

    async def hand_back(self, job_id: str, owner: str) -> JobRecord:
        return await self.call(Jobs.hand_back, job_id, owner)

    async def cancelled(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        return await self.call(Jobs.cancelled, job_id, owner, output)

    async def timed_out(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        return await self.call(Jobs.timed_out, job_id, owner, output)

    async def events(self, job_id: str, *, tenant: str | None, after: int = 0, limit: int = DRAIN_MAX) -> EventList:
        return await self.call(Jobs.events, job_id, tenant=tenant, after=after, limit=limit)

    async def drain(self, job_id: str, *, tenant: str) -> Drained:
        return await self.call(Jobs.drain, job_id, tenant=tenant)

    async def add_webhook(self, *, tenant: str, url: str, input: dict[str, Any], body: dict[str, Any]) -> None:  # noqa: A002
        await self.call(Jobs.add_webhook, tenant=tenant, url=url, input=input, body=body)

    async def take_webhooks(
        self,
        limit: int = WEBHOOKS_TAKEN_MAX,
        *,
        limit_of_tenant: int = WEBHOOKS_TAKEN_MAX,
        under_way: Mapping[str, int] = NONE_UNDER_WAY,
    ) -> WebhookList:
        return await self.call(Jobs.take_webhooks, limit, limit_of_tenant=limit_of_tenant, under_way=under_way)

    async def settle_webhook(self, webhook: Webhook, *, delivered: bool) -> bool:
        return await self.call(Jobs.settle_webhook, webhook, delivered=delivered)

    async def reap(self) -> JobList:
        return await self.call(Jobs.reap)

    async def health(self) -> JobsHealth:
        return await self.call(Jobs.health)


class AsyncJobs(AsyncJobsApi):
    """The life cycle in this process. Belongs to the event loop it was made on.

    Every call runs in a thread: a commit waits for the disk, and other calls and long polls must not wait with it.
    The order of writes is kept by the lock in `Records`, which admits one at a time.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()
        self._watchers: dict[str, set[asyncio.Queue[JobRecord]]] = {}
        jobs.on_change = self._on_change

    async def call(self, method: Callable[Concatenate[Jobs, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, self._jobs, *args, **kwargs)

    async def wait(
        self,
        job_id: str,
        *,
        tenant: str | None,
        timeout_s: float,
        until: Until = "final",
        since: datetime | None = None,
    ) -> JobRecord:
        # Watching begins before the first look, so no change falls between the two.
        with self._watch(job_id) as changes:
            record = await self.get(job_id, tenant=tenant)
            seen = since or record.updated_at
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while not (record.state.is_terminal or (until == "change" and record.updated_at > seen)):
                        # Changes bring their record: a thousand waiters read the database no more often than one.
                        change = await changes.get()
                        # Threads announce what they committed in any order.
                        record = max(record, change, key=lambda it: it.updated_at)
        return record

    @contextlib.contextmanager
    def _watch(self, job_id: str) -> Iterator[asyncio.Queue[JobRecord]]:
        changes: asyncio.Queue[JobRecord] = asyncio.Queue()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(changes)
        try:
            yield changes
        finally:
            watchers.discard(changes)
            if not watchers and self._watchers.get(job_id) is watchers:
                del self._watchers[job_id]

    def _on_change(self, record: JobRecord) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._notify, record)

    def _notify(self, record: JobRecord) -> None:
        for changes in self._watchers.get(record.id, ()):
            changes.put_nowait(record)
