"""The job life cycle for code without an event loop, such as training workers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

from storage.async_jobs import Until
from storage.job_changes import JobList
from storage.job_record import DEFAULT_LEASE_S, Heartbeat, JobRecord, JobsHealth, NewJob, Page
from storage.job_state import JobKind, JobState
from storage.jobs import Jobs
from storage.jobs_client import JobsClient
from storage.jobs_config import JobsConfig
from storage.loop_thread import LoopThread

P = ParamSpec("P")
T = TypeVar("T")


class BlockingJobs:
    """The methods of `JobsClient`, blocking. Picklable, and safe to call from many threads, but from no event loop."""

    def __init__(self, jobs: JobsClient | None = None) -> None:
        self._jobs = jobs or JobsClient()
        self._thread = LoopThread("blocking-jobs")

    def __reduce__(self) -> tuple[type[BlockingJobs], tuple[JobsClient]]:
        return BlockingJobs, (self._jobs,)

    def close(self) -> None:
        """End the thread. No method may be called afterwards."""
        self._thread.stop()

    def cluster_config(self) -> JobsConfig:
        return self._run(self._jobs.cluster_config())

    def wait(
        self,
        job_id: str,
        *,
        tenant: str | None,
        timeout_s: float,
        until: Until = "final",
        since: datetime | None = None,
    ) -> JobRecord:
        return self._run(self._jobs.wait(job_id, tenant=tenant, timeout_s=timeout_s, until=until, since=since))

    def create(self, job: NewJob) -> JobRecord:
        return self._run(self._jobs.create(job))

    def get(self, job_id: str, *, tenant: str | None = None) -> JobRecord:
        return self._call(Jobs.get, job_id, tenant=tenant)

    def get_by_runpod_id(self, runpod_id: str, *, tenant: str) -> JobRecord:
        return self._call(Jobs.get_by_runpod_id, runpod_id, tenant=tenant)

    def list(
        self,
        tenant: str,
        *,
        kind: JobKind | None = None,
        states: Sequence[JobState] | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        return self._call(Jobs.list, tenant, kind=kind, states=states, limit=limit, cursor=cursor)

    def counts(self, tenant: str | None = None, *, kind: JobKind | None = None) -> dict[JobState, int]:
        return self._call(Jobs.counts, tenant, kind=kind)

    def retried(self, tenant: str | None = None, *, kind: JobKind | None = None) -> int:
        return self._call(Jobs.retried, tenant, kind=kind)

    def leased(self, kind: JobKind) -> JobList:
        return self._call(Jobs.leased, kind)

    def allow_attempts(self, job_id: str, attempts_max: int) -> JobRecord:
        return self._call(Jobs.allow_attempts, job_id, attempts_max)

    def request_cancel(self, job_id: str, *, tenant: str | None) -> JobRecord:
        return self._call(Jobs.request_cancel, job_id, tenant=tenant)

    def retry(self, job_id: str, *, tenant: str | None) -> JobRecord:
        return self._call(Jobs.retry, job_id, tenant=tenant)

    def purge_queue(self, tenant: str, *, kind: JobKind | None = None) -> int:
        return self._call(Jobs.purge_queue, tenant, kind=kind)

    def claim(self, kind: JobKind, owner: str, *, limit: int = 1, lease_s: float = DEFAULT_LEASE_S) -> JobList:
        return self._call(Jobs.claim, kind, owner, limit=limit, lease_s=lease_s)

    def adopt(
        self, job_id: str, owner: str, lease_s: float = DEFAULT_LEASE_S, *, submission_id: str | None = None
    ) -> JobRecord:
        return self._call(Jobs.adopt, job_id, owner, lease_s, submission_id=submission_id)

    def attach(self, job_id: str, *, owner: str, submission_id: str) -> JobRecord:
        return self._call(Jobs.attach, job_id, owner=owner, submission_id=submission_id)

    def start(
        self, job_id: str, owner: str, *, worker_id: str | None = None, lease_s: float = DEFAULT_LEASE_S
    ) -> JobRecord:
        return self._call(Jobs.start, job_id, owner, worker_id=worker_id, lease_s=lease_s)

    def heartbeat(
        self, job_id: str, owner: str, *, progress: dict[str, Any] | None = None, lease_s: float = DEFAULT_LEASE_S
    ) -> Heartbeat:
        return self._call(Jobs.heartbeat, job_id, owner, progress=progress, lease_s=lease_s)

    def complete(self, job_id: str, owner: str, output: dict[str, Any]) -> JobRecord:
        return self._call(Jobs.complete, job_id, owner, output)

    def fail(self, job_id: str, owner: str, error_code: str, message: str, *, retryable: bool = False) -> JobRecord:
        return self._call(Jobs.fail, job_id, owner, error_code, message, retryable=retryable)

    def cancelled(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        return self._call(Jobs.cancelled, job_id, owner, output)

    def timed_out(self, job_id: str, owner: str, output: dict[str, Any] | None = None) -> JobRecord:
        return self._call(Jobs.timed_out, job_id, owner, output)

    def reap(self) -> JobList:
        return self._call(Jobs.reap)

    def health(self) -> JobsHealth:
        return self._call(Jobs.health)

    def _call(self, method: Callable[Concatenate[Jobs, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(self._jobs.call(method, *args, **kwargs))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._thread.run_blocking(work)
