"""RunPod's operations over job types and job records. Knows no HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.dispatch.replies import EndedReply, Fingerprint, Reply
from serve_app.errors import RequestTimedOut, RunpodJobNotFound, RunpodJobNotRetryable, ServiceUnavailable
from serve_app.ingress.envelope import RunEnvelope, read_envelope
from serve_app.ingress.errors import INTERNAL, describe
from serve_app.ingress.middleware import log_unexpected
from serve_app.ingress.near_replies import NearReplies
from serve_app.ingress.replies import runpod_error
from serve_app.ingress.runpod_output import within_limit
from serve_app.ingress.runpod_status import status_object
from serve_app.ingress.runpod_stream import record_stream, reply_stream
from serve_app.ingress.runpod_view import (
    SYNC_PREFIX,
    is_expired,
    reply_view,
    runpod_status,
    stamped,
)
from serve_app.ingress.watched import WatchedRecords
from serve_app.job_types import HANDLERS, STARTS_WORK, job_type_of
from serve_app.job_types.context import (
    ACCEPTED_PREFIX,
    Finished,
    Following,
    JobContext,
    Services,
    is_accepted_only,
    public_runpod_id,
)
from serve_app.job_types.results import accepted_message
from storage.errors import JobError, JobNotCancellable, JobNotFound
from storage.job_record import JobRecord
from storage.job_state import JobKind, JobState

logger = logging.getLogger(__name__)

# Several of these are within the silence after which the reply table gives a process up.
KEEP_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Submission:
    """A /run or /runsync call. `wait_s` None is /run."""

    tenant: str
    request_id: str
    body: bytes
    idempotency_key: str | None
    wait_s: float | None


class RunpodJobs:
    """One per ingress process. Work that was begun goes on when its client has gone."""

    def __init__(self, services: Services, new_uuid: Callable[[], uuid.UUID] = uuid.uuid4) -> None:
        self._services = services
        self._new_uuid = new_uuid
        self._tasks: set[asyncio.Task[str]] = set()
        self._owner = f"ingress-{uuid.uuid4().hex[:12]}"
        self._keeping: asyncio.Task[None] | None = None
        self._watched = WatchedRecords(services.jobs)
        self._near = NearReplies(services.dispatch, is_only_one=services.ingress_replicas == 1)
        # Of jobs that a request of this process waits for: None until they have ended.
        self._awaited: dict[tuple[str, str], Reply | None] = {}
        # Of jobs whose ids no client knows yet: None until the shared table is told of them.
        self._untold: dict[tuple[str, str], asyncio.Task[str] | None] = {}

    async def run(self, call: Submission) -> dict[str, Any]:
        """`{"id", "status": "IN_QUEUE"}`, soon, whatever the job type does.

        The answer waits for the job's acceptance for `run_answer_s`, so that an id is normally given for a record
        that exists. Raises BodyInvalid, InvalidRequest (envelope), IdempotencyKeyReused, ServiceUnavailable.
        """
        runpod_id, task = await self._begin(call)
        if task is not None:
            await asyncio.wait({task}, timeout=self._services.limits.run_answer_s)
            runpod_id = task.result() if task.done() else runpod_id
        return {"id": runpod_id, "status": "IN_QUEUE"}

    async def runsync(self, call: Submission) -> dict[str, Any]:
        """The status object, final if the job ends within `wait_s`. Raises like `run`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + (call.wait_s or 0.0)
        runpod_id, task = await self._begin(call)
        if task is not None:
            key = (call.tenant, runpod_id)
            self._awaited[key] = None
            try:
                await asyncio.wait({task}, timeout=max(0.0, until - loop.time()))
            finally:
                reply = self._awaited.pop(key)
            if not task.done() and key in self._untold:
                await self._told(key)
            runpod_id = task.result() if task.done() else runpod_id
            if reply is not None:
                return reply_view(runpod_id, reply, self._services.clock(), self._services.worker_id)
        return await self.status(call.tenant, call.request_id, runpod_id, wait_s=max(0.0, until - loop.time()))

    async def status(self, tenant: str, request_id: str, runpod_id: str, *, wait_s: float = 0.0) -> dict[str, Any]:
        """The status object, once it is final or `wait_s` has passed. Raises RunpodJobNotFound."""
        services, loop = self._services, asyncio.get_running_loop()
        watched = self._watched.get((tenant, runpod_id))
        if watched is not None and (wait_s <= 0 or watched.state.is_terminal):
            return await status_object(services, watched, request_id)
        until = loop.time() + wait_s
        reply = await self._reply(tenant, runpod_id, wait_s)
        if reply is not None:
            return reply_view(runpod_id, reply, services.clock(), services.worker_id)
        record = await self._record(tenant, runpod_id)
        remaining_s = until - loop.time()
        if remaining_s > 0 and not record.state.is_terminal and not is_accepted_only(record):
            record = await services.jobs.wait(record.id, tenant=tenant, timeout_s=remaining_s, until="final")
        if wait_s <= 0 and not is_accepted_only(record):
            self._watched.watch((tenant, runpod_id), record)
        return await status_object(services, record, request_id)

    async def stream(self, tenant: str, request_id: str, runpod_id: str, *, wait_s: float) -> dict[str, Any]:
        """What was reported since the last call, once there is something or `wait_s` has passed.

        Raises RunpodJobNotFound, also for a cancelled job whose end was told.
        """
        services, loop = self._services, asyncio.get_running_loop()
        until = loop.time() + wait_s
        await self._near.arrived(tenant, runpod_id)
        reply = await self._shared_reply(tenant, runpod_id, wait_s)
        if reply is not None:
            return reply_stream(reply, is_first=await services.dispatch.drain_reply(tenant, runpod_id))
        record = await self._record(tenant, runpod_id)
        return await record_stream(services, record, request_id, wait_s=max(0.0, until - loop.time()))

    async def cancel(self, tenant: str, runpod_id: str) -> dict[str, Any]:
        """Asks the job to stop. A job that has ended is told as it ended. Raises RunpodJobNotFound."""
        reply = await self._reply(tenant, runpod_id, 0.0)
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

    async def retry(self, tenant: str, runpod_id: str) -> dict[str, Any]:
        """Queues a FAILED or TIMED_OUT job again. Raises RunpodJobNotFound, RunpodJobNotRetryable, JobNotRetryable."""
        if await self._reply(tenant, runpod_id, 0.0) is not None:
            raise RunpodJobNotRetryable
        record = await self._record(tenant, runpod_id)
        if is_accepted_only(record):
            raise RunpodJobNotRetryable
        await self._wake_for(await self._services.jobs.retry(record.id, tenant=tenant))
        self._watched.forget((tenant, runpod_id))
        return {"id": runpod_id, "status": "IN_QUEUE"}

    async def purge_queue(self, tenant: str) -> dict[str, Any]:
        return {"removed": await self._services.jobs.purge_queue(tenant), "status": "completed"}

    async def health(self, tenant: str) -> dict[str, Any]:
        """Counted, not estimated: the tenant's records by state, the replicas as Serve knows them."""
        jobs = self._services.jobs
        counts, retried, workers = await asyncio.gather(
            jobs.counts(tenant), jobs.retried(tenant), self._services.workers.counts()
        )
        return {
            "jobs": {
                "completed": counts[JobState.COMPLETED],
                "failed": counts[JobState.FAILED] + counts[JobState.TIMED_OUT],
                "inProgress": counts[JobState.STARTING] + counts[JobState.RUNNING],
                "inQueue": counts[JobState.QUEUED],
                "retried": retried,
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
        """Give work under way its chance to end, then stop it."""
        await self._watched.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._services.limits.run_answer_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._near.close()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _reply(self, tenant: str, runpod_id: str, wait_s: float) -> Reply | None:
        near = self._near.get(tenant, runpod_id)
        return near or await self._shared_reply(tenant, runpod_id, wait_s)

    async def _told(self, key: tuple[str, str]) -> None:
        """Tell the shared table of a job that goes on when its request has ended. Raises ServiceUnavailable."""
        telling = self._untold[key]
        if telling is None:
            opened = self._services.dispatch.open_reply(
                *key, kept_s=self._services.limits.runsync_result_kept_s, fingerprint=None, owner=self._owner
            )
            telling = self._untold[key] = asyncio.ensure_future(opened)
        await asyncio.shield(telling)

    async def _is_told(self, key: tuple[str, str]) -> bool:
        """Whether the shared table knows of this job. It is not told any more of one that it does not know."""
        if key not in self._untold:
            return True
        telling = self._untold[key]
        if telling is None:
            del self._untold[key]
            return False
        # What arrived after the job was handed over would stand before its record.
        await asyncio.wait({telling})
        return True

    async def _begin(self, call: Submission) -> tuple[str, asyncio.Task[str] | None]:
        """The job's id, and its task; no task where the same request was sent before."""
        services, limits = self._services, self._services.limits
        envelope = read_envelope(call.body, services.webhooks)
        sync = call.wait_s is not None
        runpod_id = f"{SYNC_PREFIX if sync else ''}{self._new_uuid()}-u1"
        digest = hashlib.sha256(call.body).hexdigest()
        fingerprint = self._fingerprint(call, envelope, digest)
        if sync and fingerprint is None:
            self._untold[call.tenant, runpod_id] = None
        else:
            known = await services.dispatch.open_reply(
                call.tenant,
                runpod_id,
                kept_s=limits.runsync_result_kept_s if sync else limits.run_result_kept_s,
                fingerprint=fingerprint,
                owner=self._owner,
            )
            if known != runpod_id:
                return known, None
        context = JobContext(
            tenant=call.tenant,
            request_id=call.request_id,
            runpod_id=runpod_id,
            body_sha256=digest,
            idempotency_key=call.idempotency_key,
            policy=envelope.job_policy(),
            webhook=envelope.new_webhook(),
        )
        task = asyncio.create_task(self._execute(context, envelope.input))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: self._untold.pop((call.tenant, runpod_id), None))
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())
        return runpod_id, task

    async def _keep(self) -> None:
        """Tell the reply table, while there is work, that this process is still at it."""
        while self._tasks:
            await asyncio.sleep(KEEP_INTERVAL_S)
            try:
                await self._services.dispatch.hear_from(self._owner)
            except ServiceUnavailable:
                logger.warning("The dispatcher could not be told that %d jobs are under way", len(self._tasks))

    def _ended(self, task: asyncio.Task[str]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("The reply of a job could not be kept: %s", describe(error).code)

    def _fingerprint(self, call: Submission, envelope: RunEnvelope, digest: str) -> Fingerprint | None:
        """The client's key; else, for /run of types that start work, the body itself for a short time."""
        limits = self._services.limits
        if call.idempotency_key is not None:
            key = f"key:{call.idempotency_key}"
            return Fingerprint(key, digest, limits.idempotency_kept_s, named_by_client=True)
        name = envelope.input.get("type", "generate" if "prompt" in envelope.input else None)
        if call.wait_s is None and name in STARTS_WORK and limits.same_body_window_s > 0:
            return Fingerprint(f"body:{digest}", digest, limits.same_body_window_s, named_by_client=False)
        return None

    async def _execute(self, context: JobContext, payload: dict[str, Any]) -> str:
        """Run the job type and keep its reply. Returns the id under which the job is found."""
        services = self._services
        began = services.clock()
        error: str | None = None
        try:
            outcome = await self._handled(context, payload)
        except Exception as failure:  # noqa: BLE001 whatever went wrong, the client polls this id for an answer
            public = describe(failure)
            if public.code == INTERNAL.code:
                log_unexpected(failure, context.request_id)
            output, error = runpod_error(public, context.request_id), public.message
        else:
            if isinstance(outcome, Following) and not is_accepted_only(outcome.record):
                return await self._followed(context, outcome.record)
            output = await self._output_of(outcome)
        now = services.clock()
        output = stamped(
            output,
            request_id=context.request_id,
            worker_id=services.worker_id,
            runpod_id=context.runpod_id,
            duration_ms=round((now - began).total_seconds() * 1000),
            timestamp=now,
        )
        reply = Reply("COMPLETED" if error is None else "FAILED", began, now, output, error)
        key = (context.tenant, context.runpod_id)
        if key in self._untold:
            await self._near.keep(EndedReply(*key, reply, services.limits.runsync_result_kept_s))
        else:
            await services.dispatch.settle_reply(*key, output=output, error=error)
        if key in self._awaited:
            # Whoever waits for this job in this process need not ask for what was just sent.
            self._awaited[key] = reply
        await self._tell(context, reply)
        return context.runpod_id

    async def _tell(self, context: JobContext, reply: Reply) -> None:
        """The end of a job without a record, to the address that the client named."""
        if context.webhook is None:
            return
        services, asked = self._services, context.webhook
        body = reply_view(context.runpod_id, reply, services.clock(), services.worker_id)
        try:
            await services.jobs.add_webhook(tenant=context.tenant, url=asked.url, input=asked.input, body=body)
        except JobError as error:
            # A webhook never fails its job.
            logger.warning("The webhook of request %s was not noted: %s", context.request_id, error.code)

    async def _handled(self, context: JobContext, payload: dict[str, Any]) -> Finished | Following:
        timeout_s = self._services.limits.quick_job_timeout_s
        handler = HANDLERS[job_type_of(payload)]
        try:
            async with asyncio.timeout(timeout_s) as limit:
                outcome = await handler(self._services, context, payload)
                if isinstance(outcome, Finished):
                    return Finished(await within_limit(self._services, context.tenant, outcome.output))
                return outcome
        except TimeoutError:
            if limit.expired():
                raise RequestTimedOut(timeout_s) from None
            raise

    async def _output_of(self, outcome: Finished | Following) -> dict[str, Any]:
        if isinstance(outcome, Finished):
            return outcome.output
        await self._wake_for(outcome.record)
        return accepted_message(outcome.record)

    async def _followed(self, context: JobContext, record: JobRecord) -> str:
        """From here on the record answers for the job, under the id of the request that first made it."""
        found_as = public_runpod_id(record) or context.runpod_id
        key = (context.tenant, context.runpod_id)
        if await self._is_told(key):
            await self._services.dispatch.hand_over_reply(*key, to=found_as)
        await self._wake_for(record)
        return found_as

    async def _wake_for(self, record: JobRecord) -> None:
        if record.kind is not JobKind.GENERATION:
            return
        try:
            await self._services.dispatch.wake()
        except ServiceUnavailable:
            # The record is queued; the dispatcher finds it at its next look.
            return

    async def _shared_reply(self, tenant: str, runpod_id: str, wait_s: float) -> Reply | None:
        """What the shared table has. None where a record answers for the job, or nobody knows it."""
        reply = await self._services.dispatch.wait_reply(tenant, runpod_id, wait_s)
        if reply is not None and reply.is_interrupted and await self._found(tenant, runpod_id) is not None:
            return None
        return reply

    async def _record(self, tenant: str, runpod_id: str) -> JobRecord:
        """Raises RunpodJobNotFound: unknown, another tenant's, or no longer kept."""
        record = await self._found(tenant, runpod_id)
        if record is None or is_expired(record, self._services.clock(), self._services.limits):
            raise RunpodJobNotFound
        return record

    async def _found(self, tenant: str, runpod_id: str) -> JobRecord | None:
        for name in (runpod_id, f"{ACCEPTED_PREFIX}{runpod_id}"):
            try:
                record = await self._services.jobs.get_by_runpod_id(name, tenant=tenant)
            except JobNotFound:
                continue
            # An id that spells out the prefix is not one that was given to anybody.
            return record if public_runpod_id(record) == runpod_id else None
        return None
