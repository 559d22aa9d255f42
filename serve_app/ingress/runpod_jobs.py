"""RunPod's operations over job types and job records. Knows no HTTP."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

from serve_app.dispatch.replies import RETRIED
from serve_app.dispatch.reply import Reply
from serve_app.errors import RunpodJobNotFound, RunpodJobNotRetryable
from serve_app.ingress.job_runner import JobRunner, Submission
from serve_app.ingress.runpod_records import find_record
from serve_app.ingress.runpod_status import reply_status, status_object
from serve_app.ingress.runpod_stream import record_stream, reply_stream
from serve_app.ingress.runpod_view import is_expired, runpod_status
from serve_app.ingress.watched import WatchedRecords
from serve_app.job_types.context import (
    Services,
    is_accepted_only,
)
from storage.errors import JobNotCancellable
from storage.job_record import JobRecord
from storage.job_state import JobState

# Within what the JavaScript client waits for an answer to /cancel.
TAKE_OVER_S = 1.5


class RunpodJobs:
    """One per ingress process. Work that was begun goes on when its client has gone."""

    def __init__(self, services: Services, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4) -> None:
        self._services = services
        self._runner = JobRunner(services, new_uuid)
        self._watched = WatchedRecords(services.jobs)

    async def run(self, call: Submission) -> dict[str, Any]:
        """`{"id", "status": "IN_QUEUE"}`, soon, whatever the job type does.

        The answer waits for the job's acceptance for `run_answer_s`, so that an id is normally given for a record
        that exists. Raises BodyInvalid, InvalidRequest (envelope), IdempotencyKeyReused, ServiceUnavailable.
        """
        runpod_id, _ = await self._runner.run(call, self._services.limits.run_answer_s)
        return {"id": runpod_id, "status": "IN_QUEUE"}

    async def runsync(self, call: Submission) -> dict[str, Any]:
        """The status object, final if the job ends within `wait_s`. Raises like `run` and `status`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + (call.wait_s or 0.0)
        runpod_id, reply = await self._runner.run(call, call.wait_s or 0.0)
        if reply is not None:
            return await reply_status(self._services, runpod_id, reply)
        return await self.status(call.tenant, call.request_id, runpod_id, wait_s=max(0.0, until - loop.time()))

    async def status(self, tenant: str, request_id: str, runpod_id: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """The status object, once it is final or `wait_s` has passed. Raises RunpodJobNotFound, StorageError."""
        services, loop = self._services, asyncio.get_running_loop()
        watched = self._watched.get((tenant, runpod_id))
        if watched is not None and (wait_s <= 0 or watched.state.is_terminal):
            return await status_object(services, watched, request_id)
        until = loop.time() + wait_s
        reply = await self._reply(tenant, runpod_id, wait_s)
        if reply is not None:
            return await reply_status(services, runpod_id, reply)
        record = await self._record(tenant, runpod_id)
        remaining_s = until - loop.time()
        if remaining_s > 0 and not record.state.is_terminal and not is_accepted_only(record):
            record = await services.jobs.wait(record.id, tenant=tenant, timeout_s=remaining_s, until="final")
        if wait_s <= 0 and not is_accepted_only(record):
            self._watched.watch((tenant, runpod_id), record)
        return await status_object(services, record, request_id)

    async def stream(self, tenant: str, request_id: str, runpod_id: str, *, wait_s: float) -> dict[str, Any]:
        """What was reported since the last call, once there is something or `wait_s` has passed.

        Raises RunpodJobNotFound, also for a cancelled job whose end was told, and StorageError.
        """
        services, loop = self._services, asyncio.get_running_loop()
        until = loop.time() + wait_s
        await self._runner.near.arrived(tenant, runpod_id)
        reply = await self._shared_reply(tenant, runpod_id, wait_s)
        if reply is not None:
            # Before it counts as told: where no URL can be made now, the next call tells it.
            told = await reply_status(services, runpod_id, reply)
            return reply_stream(told, is_first=await services.dispatch.drain_reply(tenant, runpod_id))
        record = await self._record(tenant, runpod_id)
        return await record_stream(services, record, request_id, wait_s=max(0.0, until - loop.time()))

    async def cancel(self, tenant: str, runpod_id: str) -> dict[str, Any]:
        """Asks the job to stop. A job that has ended is told as it ended. Raises RunpodJobNotFound."""
        reply = await self._cancelled_reply(tenant, runpod_id)
        if reply is not None:
            return {"id": runpod_id, "status": reply.status}
        record = await self._record(tenant, runpod_id)
        if is_accepted_only(record):
            return {"id": runpod_id, "status": runpod_status(record)}
        try:
            await self._services.jobs.request_cancel(record.id, tenant=tenant)
            self._watched.forget((tenant, runpod_id))
        except JobNotCancellable:
            ended = await self._services.jobs.get(record.id, tenant=tenant)
            return {"id": runpod_id, "status": runpod_status(ended)}
        return {"id": runpod_id, "status": "CANCELLED"}

    async def retry(self, tenant: str, request_id: str, runpod_id: str) -> dict[str, Any]:
        """Queues a FAILED or TIMED_OUT job again.

        Raises RunpodJobNotFound, RunpodJobNotRetryable, RunpodJobNotKept, JobNotRetryable.
        """
        reply = await self._reply(tenant, runpod_id, 0.0)
        if reply is not None:
            await self._runner.retry(tenant, request_id, runpod_id)
            return {"id": runpod_id, "status": "IN_QUEUE"}
        record = await self._record(tenant, runpod_id)
        if is_accepted_only(record):
            raise RunpodJobNotRetryable
        await self._runner.wake_for(await self._services.jobs.retry(record.id, tenant=tenant))
        self._watched.forget((tenant, runpod_id))
        return {"id": runpod_id, "status": "IN_QUEUE"}

    async def purge_queue(self, tenant: str) -> dict[str, Any]:
        return {"removed": await self._services.jobs.purge_queue(tenant), "status": "completed"}

    async def health(self, tenant: str) -> dict[str, Any]:
        """Counted, not estimated: the tenant's records by state, its jobs without one whose status is still known, the
        replicas as Serve knows them."""
        jobs = self._services.jobs
        counts, retried, quick, workers = await asyncio.gather(
            jobs.counts(tenant),
            jobs.retried(tenant),
            self._services.dispatch.count_replies(tenant),
            self._services.workers.counts(),
        )
        quick = Counter(quick)
        return {
            "jobs": {
                "completed": counts[JobState.COMPLETED] + quick["COMPLETED"],
                "failed": counts[JobState.FAILED] + counts[JobState.TIMED_OUT] + quick["FAILED"] + quick["TIMED_OUT"],
                "inProgress": counts[JobState.STARTING] + counts[JobState.RUNNING] + quick["IN_PROGRESS"],
                "inQueue": counts[JobState.QUEUED] + quick["IN_QUEUE"],
                "retried": retried + quick[RETRIED],
            },
            "workers": {
                "idle": workers.idle,
                "initializing": workers.initializing,
                "ready": workers.ready,
                "running": workers.running,
                "throttled": workers.throttled,
                "unhealthy": workers.unhealthy,
            },
        }

    async def close(self) -> None:
        await self._watched.close()
        await self._runner.close()

    async def _reply(self, tenant: str, runpod_id: str, wait_s: float) -> Reply | None:
        near = self._runner.near.get(tenant, runpod_id)
        return near or await self._shared_reply(tenant, runpod_id, wait_s)

    async def _cancelled_reply(self, tenant: str, runpod_id: str) -> Reply | None:
        """How a job without a record stands, once it was asked to stop. None where a record answers, or nobody."""
        reply = await self._reply(tenant, runpod_id, 0.0)
        if reply is not None and reply.status == "IN_QUEUE":
            # A record is to take over in a moment, and can be cancelled with all that it stands for.
            reply = await self._shared_reply(tenant, runpod_id, TAKE_OVER_S)
        if reply is None or reply.is_final:
            return reply
        reply = await self._services.dispatch.cancel_reply(tenant, runpod_id)
        if reply is not None and reply.status == "CANCELLED":
            self._runner.stop(tenant, runpod_id)
        return reply

    async def _shared_reply(self, tenant: str, runpod_id: str, wait_s: float) -> Reply | None:
        """What the shared table has. None where a record answers for the job, or nobody knows it."""
        reply = await self._services.dispatch.wait_reply(tenant, runpod_id, wait_s)
        if (
            reply is not None
            and reply.is_interrupted
            and await find_record(self._services.jobs, tenant, runpod_id) is not None
        ):
            return None
        return reply

    async def _record(self, tenant: str, runpod_id: str) -> JobRecord:
        """Raises RunpodJobNotFound: unknown, another tenant's, or no longer kept."""
        services = self._services
        record = await find_record(services.jobs, tenant, runpod_id)
        if record is None:
            raise RunpodJobNotFound
        if is_expired(record, services.clock(), services.limits) and not await services.jobs.is_keyed(record.id):
            raise RunpodJobNotFound
        return record
