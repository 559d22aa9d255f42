"""The jobs that RunPod's API begins in this process, until each has ended or a record answers for it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from serve_app.dispatch.reply import EndedReply, Fingerprint, Opening, Reply, Sent, Settled, Status
from serve_app.errors import RequestTimedOut, ServiceUnavailable
from serve_app.ingress.envelope import read_envelope
from serve_app.ingress.errors import INTERNAL, describe
from serve_app.ingress.middleware import log_unexpected
from serve_app.ingress.near_replies import NearReplies
from serve_app.ingress.replies import runpod_error
from serve_app.ingress.runpod_output import within_limit
from serve_app.ingress.runpod_records import find_record
from serve_app.ingress.runpod_status import noted_status
from serve_app.ingress.runpod_view import SYNC_PREFIX, reply_view, stamped
from serve_app.job_types import CHANGES_THINGS, HANDLERS, STARTS_WORK, job_type_of
from serve_app.job_types.context import (
    Finished,
    Following,
    JobContext,
    Services,
    is_accepted_only,
    public_runpod_id,
)
from serve_app.job_types.results import accepted_message
from storage.errors import JobError
from storage.job_record import JobRecord, NewWebhook
from storage.job_state import JobKind, JobState

logger = logging.getLogger(__name__)

# Several of these are within the silence after which the reply table gives a process up.
KEEP_INTERVAL_S = 5.0
TAKEN_OVER = frozenset({"train", "train_with_yaml", "generate"})
"""Job types for which a record answers in the end."""

Key = tuple[str, str]


@dataclass(frozen=True)
class Submission:
    """A /run or /runsync call. `wait_s` None is /run."""

    tenant: str
    request_id: str
    body: bytes
    idempotency_key: str | None
    wait_s: float | None


@dataclass
class _Job:
    """An attempt under way. `is_untold`: no client knows its id yet, and nothing but this process knows of it until it
    is `telling` the shared table. `is_handling`: what it does can still be stopped."""

    sent: Sent
    kept_s: float
    is_untold: bool
    attempt: int = 1
    telling: asyncio.Task[str] | None = None
    reply: Reply | None = None
    is_handling: bool = False
    is_cancelled: bool = False


class JobRunner:
    """One per ingress process. Work that was begun goes on when its client has gone."""

    def __init__(self, services: Services, new_uuid: Callable[[], uuid.UUID]) -> None:
        self._services = services
        self._new_uuid = new_uuid
        self._jobs: dict[Key, _Job] = {}
        self._tasks: dict[Key, asyncio.Task[str]] = {}
        self._owner = f"ingress-{uuid.uuid4().hex[:12]}"
        self._keeping: asyncio.Task[None] | None = None
        self.near = NearReplies(services.dispatch, is_only_one=services.ingress_replicas == 1)

    async def run(self, call: Submission, timeout_s: float) -> tuple[str, Reply | None]:
        """The id under which the job is found, and its reply where it ended within `timeout_s` without a record.

        Raises BodyInvalid, InvalidRequest (envelope), IdempotencyKeyReused, ServiceUnavailable.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        runpod_id, is_new = await self._begin(call)
        if not is_new:
            return runpod_id, None
        key = (call.tenant, runpod_id)
        if key not in self._jobs:
            # It ended before this request went on; its reply is with the shared table.
            return runpod_id, None
        job, task = self._jobs[key], self._tasks[key]
        await asyncio.wait({task}, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        if task.done():
            return task.result(), job.reply
        await self._told(key, job)
        return runpod_id, None

    async def retry(self, tenant: str, request_id: str, runpod_id: str) -> None:
        """Do a job once more that failed or timed out, and has no record, under its id.

        Raises RunpodJobNotFound, RunpodJobNotRetryable, RunpodJobNotKept, ServiceUnavailable.
        """
        await self.near.arrived(tenant, runpod_id)
        await asyncio.shield(asyncio.create_task(self._reopen_and_start(tenant, request_id, runpod_id)))

    async def _reopen_and_start(self, tenant: str, request_id: str, runpod_id: str) -> None:
        kept_s = self._services.limits.run_result_kept_s
        again = await self._services.dispatch.reopen_reply(tenant, runpod_id, owner=self._owner, kept_s=kept_s)
        given_up = self._tasks.get((tenant, runpod_id))
        if given_up is not None:
            # It was taken for lost, because nobody had heard of this process for a while.
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
        job = _Job(again.sent, kept_s, is_untold=False, attempt=again.attempt)
        self._start(_context(tenant, request_id, runpod_id, again.sent), job)

    def stop(self, tenant: str, runpod_id: str) -> None:
        """End what is done here for a job that was cancelled, where that is still possible."""
        job = self._jobs.get((tenant, runpod_id))
        if job is not None and job.is_handling and not job.is_cancelled:
            job.is_cancelled = True
            self._tasks[tenant, runpod_id].cancel()

    async def wake_for(self, record: JobRecord) -> None:
        if record.kind is not JobKind.GENERATION:
            return
        try:
            await self._services.dispatch.wake()
        except ServiceUnavailable:
            # The record is queued; the dispatcher finds it at its next look.
            return

    async def close(self) -> None:
        """Give work under way its chance to end, then stop it."""
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=self._services.limits.run_answer_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.near.close()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _begin(self, call: Submission) -> tuple[str, bool]:
        """The job's id, and whether it is a new one: where the same request was sent before, it is that one's."""
        services, limits = self._services, self._services.limits
        envelope = read_envelope(call.body, services.webhooks)
        is_sync = call.wait_s is not None
        runpod_id = f"{SYNC_PREFIX if is_sync else ''}{self._new_uuid()}-u1"
        name = _type_named(envelope.input)
        sent = Sent(
            input=envelope.input,
            policy=envelope.job_policy(),
            webhook_url=envelope.webhook,
            idempotency_key=call.idempotency_key,
            body_sha256=hashlib.sha256(call.body).hexdigest(),
            size_bytes=len(call.body),
            begins_as="IN_QUEUE" if name in TAKEN_OVER else "IN_PROGRESS",
            warnings=envelope.warnings(),
        )
        fingerprint = self._fingerprint(call, name, sent.body_sha256)
        kept_s = limits.runsync_result_kept_s if is_sync else limits.run_result_kept_s
        if call.idempotency_key is not None and name in CHANGES_THINGS:
            kept_s = max(kept_s, limits.idempotency_kept_s)
        job = _Job(sent, kept_s, is_untold=is_sync and fingerprint is None)
        context = _context(call.tenant, call.request_id, runpod_id, sent)
        if job.is_untold:
            self._start(context, job)
            return runpod_id, True
        # A client that goes away meanwhile would leave a job that is noted, and that nobody does.
        return await asyncio.shield(asyncio.create_task(self._open_and_start(context, job, fingerprint)))

    async def _open_and_start(
        self, context: JobContext, job: _Job, fingerprint: Fingerprint | None
    ) -> tuple[str, bool]:
        known = await self._open((context.tenant, context.runpod_id), job, fingerprint)
        if known != context.runpod_id:
            return known, False
        self._start(context, job)
        return context.runpod_id, True

    def _start(self, context: JobContext, job: _Job) -> None:
        key = (context.tenant, context.runpod_id)
        self._jobs[key] = job
        task = self._tasks[key] = asyncio.create_task(self._execute(context, job))
        task.add_done_callback(functools.partial(self._ended, key))
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())

    async def _open(self, key: Key, job: _Job, fingerprint: Fingerprint | None) -> str:
        """Have the shared table note the job. Returns its id, or that of the same request before it."""
        dispatch = self._services.dispatch
        opening = Opening(job.kept_s, fingerprint, self._owner, job.sent.begins_as, sent=job.sent)
        tenant, runpod_id = key
        known = await dispatch.open_reply(tenant, runpod_id, opening)
        if known == runpod_id or fingerprint is None or fingerprint.named_by_client:
            return known
        record = await find_record(self._services.jobs, tenant, known)
        if record is None or not record.state.is_terminal or record.state is JobState.COMPLETED:
            return known
        # Sent again because that one came to nothing, and not by a client that had waited too short.
        return await dispatch.open_reply(tenant, runpod_id, replace(opening, instead_of=known))

    async def _told(self, key: Key, job: _Job) -> None:
        """Tell the shared table of a job that goes on when its request has ended. Raises ServiceUnavailable."""
        if not job.is_untold:
            return
        if job.telling is None:
            job.telling = asyncio.ensure_future(self._open(key, job, None))
        await asyncio.shield(job.telling)

    async def _is_told(self, job: _Job) -> bool:
        """Whether the shared table knows of this job. It is not told any more of one that it does not know."""
        if not job.is_untold:
            return True
        if job.telling is None:
            job.is_untold = False
            return False
        # What arrived after the job was handed over would stand before its record.
        await asyncio.wait({job.telling})
        return True

    async def _keep(self) -> None:
        """Tell the reply table, while there is work, that this process is still at it."""
        while self._jobs:
            await asyncio.sleep(KEEP_INTERVAL_S)
            try:
                for tenant, runpod_id in await self._services.dispatch.hear_from(self._owner):
                    self.stop(tenant, runpod_id)
            except ServiceUnavailable:
                logger.warning("The dispatcher could not be told that %d jobs are under way", len(self._jobs))

    def _ended(self, key: Key, task: asyncio.Task[str]) -> None:
        del self._jobs[key], self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("The reply of a job could not be kept: %s", describe(error).code)

    def _fingerprint(self, call: Submission, name: str | None, digest: str) -> Fingerprint | None:
        """The client's key; else, for /run of types that start work, the body itself for a short time."""
        limits = self._services.limits
        if call.idempotency_key is not None:
            key = f"key:{call.idempotency_key}"
            return Fingerprint(key, digest, limits.idempotency_kept_s, named_by_client=True)
        if call.wait_s is None and name in STARTS_WORK and limits.same_body_window_s > 0:
            return Fingerprint(f"body:{digest}", digest, limits.same_body_window_s, named_by_client=False)
        return None

    async def _execute(self, context: JobContext, job: _Job) -> str:
        """Run the job type and keep its reply. Returns the id under which the job is found."""
        services = self._services
        began = services.clock()
        status: Status = "COMPLETED"
        error: str | None = None
        output: dict[str, Any] | None
        job.is_handling = True
        try:
            outcome = await self._handled(context, job.sent.input)
        except asyncio.CancelledError:
            if not job.is_cancelled:
                raise
            status, output = "CANCELLED", None
        except Exception as failure:  # noqa: BLE001 whatever went wrong, the client polls this id for an answer
            public = describe(failure)
            if public.code == INTERNAL.code:
                log_unexpected(failure, context.request_id)
            output, error = runpod_error(public, context.request_id), public.message
            status = "TIMED_OUT" if isinstance(failure, RequestTimedOut) and failure.by_policy else "FAILED"
        else:
            job.is_handling = False
            if isinstance(outcome, Following) and not is_accepted_only(outcome.record):
                return await self._followed(context, job, outcome.record)
            output = await self._output_of(outcome)
            if context.warnings:
                output = {**output, "warnings": [*context.warnings, *output.get("warnings", [])]}
        job.is_handling = False
        now = services.clock()
        if output is not None:
            output = stamped(
                output,
                request_id=context.request_id,
                worker_id=services.worker_id,
                runpod_id=context.runpod_id,
                duration_ms=round((now - began).total_seconds() * 1000),
                timestamp=now,
            )
        job.reply = await self._kept(context, job, Reply(status, began, now, output, error, attempt=job.attempt))
        if job.reply.attempt != job.attempt:
            # Taken for lost, and retried: what this attempt came to is nobody's any more.
            return context.runpod_id
        if job.reply.status == "CANCELLED":
            await self._cancel_record(context)
        await self._tell(context, job.reply)
        return context.runpod_id

    async def _kept(self, context: JobContext, job: _Job, reply: Reply) -> Reply:
        """The reply that the job's id has from now on: another where it was cancelled, or taken for lost, before."""
        key = (context.tenant, context.runpod_id)
        ended = EndedReply(*key, reply, job.kept_s)
        # The table has what was sent where it was told of the beginning.
        whole = EndedReply(*key, reply, job.kept_s, job.sent) if reply.is_retryable else ended
        if not await self._is_told(job):
            await self.near.keep(whole)
            return reply
        known = await self._services.dispatch.settle_reply(ended)
        if known is None:
            # The table was lost, and knows nothing of what it had been told.
            await self.near.keep(whole)
        if known in (None, Settled(reply.status, reply.attempt)):
            return reply
        return await self._services.dispatch.wait_reply(*key, 0.0) or reply

    async def _cancel_record(self, context: JobContext) -> None:
        """Stop what the job had begun by the time that it was cancelled."""
        jobs = self._services.jobs
        try:
            record = await find_record(jobs, context.tenant, context.runpod_id)
            if record is not None:
                await jobs.request_cancel(record.id, tenant=context.tenant)
        except JobError as error:
            logger.warning("The record of cancelled job %s was not looked at: %s", context.runpod_id, error.code)

    async def _tell(self, context: JobContext, reply: Reply) -> None:
        """The end of a job without a record, to the address that the client named."""
        if context.webhook is None:
            return
        services, asked = self._services, context.webhook
        body = noted_status(reply_view(context.runpod_id, reply, services.clock(), services.worker_id))
        try:
            await services.jobs.add_webhook(tenant=context.tenant, url=asked.url, input=asked.input, body=body)
        except JobError as error:
            # A webhook never fails its job.
            logger.warning("The webhook of request %s was not noted: %s", context.request_id, error.code)

    async def _handled(self, context: JobContext, payload: dict[str, Any]) -> Finished | Following:
        name = job_type_of(payload)
        handler, policy_s = HANDLERS[name], context.policy.execution_timeout_s
        # A record keeps the policy's time by itself; what is limited here is its acceptance.
        is_policys = policy_s is not None and name not in TAKEN_OVER
        timeout_s = policy_s if policy_s is not None and is_policys else self._services.limits.quick_job_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as limit:
                outcome = await handler(self._services, context, payload)
                if isinstance(outcome, Finished):
                    return Finished(await within_limit(self._services, context.tenant, outcome.output))
                return outcome
        except TimeoutError:
            if limit.expired():
                raise RequestTimedOut(timeout_s, is_policys) from None
            raise

    async def _output_of(self, outcome: Finished | Following) -> dict[str, Any]:
        if isinstance(outcome, Finished):
            return outcome.output
        await self.wake_for(outcome.record)
        return accepted_message(outcome.record)

    async def _followed(self, context: JobContext, job: _Job, record: JobRecord) -> str:
        """From here on the record answers for the job, under the id of the request that first made it."""
        found_as = public_runpod_id(record) or context.runpod_id
        if await self._is_told(job):
            dispatch = self._services.dispatch
            if await dispatch.hand_over_reply(context.tenant, context.runpod_id, to=found_as):
                await self._cancel_record(context)
        await self.wake_for(record)
        return found_as


def _context(tenant: str, request_id: str, runpod_id: str, sent: Sent) -> JobContext:
    return JobContext(
        tenant=tenant,
        request_id=request_id,
        runpod_id=runpod_id,
        body_sha256=sent.body_sha256,
        idempotency_key=sent.idempotency_key,
        policy=sent.policy,
        webhook=None if sent.webhook_url is None else NewWebhook(url=sent.webhook_url, input=sent.input),
        warnings=sent.warnings,
    )


def _type_named(payload: dict[str, Any]) -> str | None:
    """The job type that a payload names, known or not; None where it names none."""
    name = payload.get("type", "generate" if "prompt" in payload else None)
    return name if isinstance(name, str) else None
