"""The jobs that RunPod's API begins in this process, until each has ended or a record answers for it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.dispatch.replies import EndedReply, Fingerprint, Reply
from serve_app.errors import RequestTimedOut, ServiceUnavailable
from serve_app.ingress.envelope import RunEnvelope, read_envelope
from serve_app.ingress.errors import INTERNAL, describe
from serve_app.ingress.middleware import log_unexpected
from serve_app.ingress.near_replies import NearReplies
from serve_app.ingress.replies import runpod_error
from serve_app.ingress.runpod_output import within_limit
from serve_app.ingress.runpod_view import SYNC_PREFIX, reply_view, stamped
from serve_app.job_types import HANDLERS, STARTS_WORK, job_type_of
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
from storage.job_record import JobRecord
from storage.job_state import JobKind

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


class JobRunner:
    """One per ingress process. Work that was begun goes on when its client has gone."""

    def __init__(self, services: Services, new_uuid: Callable[[], uuid.UUID]) -> None:
        self._services = services
        self._new_uuid = new_uuid
        self._tasks: set[asyncio.Task[str]] = set()
        self._owner = f"ingress-{uuid.uuid4().hex[:12]}"
        self._keeping: asyncio.Task[None] | None = None
        self.near = NearReplies(services.dispatch, is_only_one=services.ingress_replicas == 1)
        # Of jobs that a request of this process waits for: None until they have ended.
        self._awaited: dict[tuple[str, str], Reply | None] = {}
        # Of jobs whose ids no client knows yet: None until the shared table is told of them.
        self._untold: dict[tuple[str, str], asyncio.Task[str] | None] = {}

    async def run(self, call: Submission, timeout_s: float) -> tuple[str, Reply | None]:
        """The id under which the job is found, and its reply where it ended within `timeout_s` without a record.

        Raises BodyInvalid, InvalidRequest (envelope), IdempotencyKeyReused, ServiceUnavailable.
        """
        until = asyncio.get_running_loop().time() + timeout_s
        runpod_id, task = await self._begin(call)
        if task is None:
            return runpod_id, None
        key = (call.tenant, runpod_id)
        self._awaited[key] = None
        try:
            await asyncio.wait({task}, timeout=max(0.0, until - asyncio.get_running_loop().time()))
        finally:
            reply = self._awaited.pop(key)
        if not task.done() and key in self._untold:
            await self._told(key)
        return (task.result() if task.done() else runpod_id), reply

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
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._services.limits.run_answer_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.near.close()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

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
            await self.near.keep(EndedReply(*key, reply, services.limits.runsync_result_kept_s))
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
        await self.wake_for(outcome.record)
        return {**accepted_message(outcome.record), **outcome.notes}

    async def _followed(self, context: JobContext, record: JobRecord) -> str:
        """From here on the record answers for the job, under the id of the request that first made it."""
        found_as = public_runpod_id(record) or context.runpod_id
        key = (context.tenant, context.runpod_id)
        if await self._is_told(key):
            await self._services.dispatch.hand_over_reply(*key, to=found_as)
        await self.wake_for(record)
        return found_as
