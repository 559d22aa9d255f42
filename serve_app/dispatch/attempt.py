"""One attempt at one generation: started, kept alive, stopped when asked, settled once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from serve_app.collaborators import Inference, JobsApi
from serve_app.inference.plan import GenerationWork
from serve_app.ingress.errors import INTERNAL, describe, unwrapped, where_raised
from storage.errors import JobError, LeaseLost
from storage.job_record import Heartbeat, JobRecord

logger = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]
SETTLE_TRIES = 3


class GenerationAttempt:
    """Holds the lease of `record` under `owner` until the record is settled, or the lease is lost.

    The record is RUNNING, and its time limit counts, from the replica's first event on: waiting for a replica that is
    only being started is not the client's time. Where the object storage is away, the replica waits for it within that
    limit.
    """

    def __init__(
        self,
        jobs: JobsApi,
        inference: Inference,
        record: JobRecord,
        *,
        owner: str,
        lease_s: float,
        heartbeat_s: float,
        sleep: Sleep,
    ) -> None:
        self._jobs = jobs
        self._inference = inference
        self._record = record
        self._owner = owner
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._sleep = sleep
        self._progress: dict[str, Any] | None = None
        self._events: list[dict[str, Any]] = []
        self._started = False

    async def run(self) -> None:
        """Raises LeaseLost when another owner has the job by now, JobError when it could not be settled.

        However it ends, cancellation included, the replica has been told to stop. Cancelled, it hands the job back to
        the queue.
        """
        making = asyncio.create_task(self._make())
        try:
            await self._attend(making)
        except asyncio.CancelledError:
            await _stopped(making)
            await hand_back(self._jobs, self._record, owner=self._owner)
            raise
        except BaseException:
            await _stopped(making)
            raise

    async def _attend(self, making: asyncio.Task[dict[str, Any]]) -> None:
        asked = await self._watch(making)
        if asked is None:
            await self._settle(making)
            return
        await _stopped(making)
        # Asked for both, the user's own wish is what the record says.
        end = self._jobs.cancelled if asked.cancel_requested else self._jobs.timed_out
        await self._surely(lambda: end(self._record.id, self._owner))

    async def _make(self) -> dict[str, Any]:
        """Raises what the replica raises."""
        work = GenerationWork(process_id=self._record.id, tenant=self._record.tenant, request=self._record.request)
        output: dict[str, Any] | None = None
        async with aclosing(self._inference.generate(work)) as events:
            async for event in events:
                await self._start(event.get("worker_id"))
                if "progress" in event:
                    self._note(event["progress"])
                output = event.get("output", output)
        if output is None:
            raise RuntimeError("the replica ended without a result")
        return output

    async def _start(self, worker_id: str | None = None) -> None:
        if not self._started:
            await self._jobs.start(self._record.id, self._owner, worker_id=worker_id, lease_s=self._lease_s)
            self._started = True

    def _note(self, progress: dict[str, Any]) -> None:
        self._progress = progress
        self._events.append(progress)

    async def _watch(self, making: asyncio.Task[dict[str, Any]]) -> Heartbeat | None:
        """Until `making` is done (None), or a heartbeat's answer asks to stop."""
        while True:
            pause = asyncio.ensure_future(self._sleep(self._heartbeat_s))
            try:
                await asyncio.wait({making, pause}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
            if making.done():
                return None
            answer = await self._beat()
            if answer is not None and (answer.cancel_requested or answer.timed_out):
                return answer

    async def _beat(self) -> Heartbeat | None:
        """Raises LeaseLost. A heartbeat that cannot be delivered is not the end: the lease lasts for several."""
        progress, self._progress = self._progress, None
        events, self._events = self._events, []
        try:
            return await self._jobs.heartbeat(
                self._record.id, self._owner, progress=progress, events=events, lease_s=self._lease_s
            )
        except LeaseLost:
            raise
        except JobError as error:
            self._events = events + self._events
            logger.warning("A heartbeat of %s was not taken: %s", self._record.id, error.code)
            return None

    async def _settle(self, making: asyncio.Task[dict[str, Any]]) -> None:
        error = making.exception()
        if error is None:
            output = making.result()
            await self._surely(lambda: self._jobs.complete(self._record.id, self._owner, output, events=self._events))
            return
        if isinstance(error, LeaseLost):
            raise error
        public = describe(error)
        if public.code == INTERNAL.code:
            name = type(unwrapped(error)).__name__
            logger.error("Unexpected %s while making %s at %s", name, self._record.id, where_raised(error))
        await self._surely(
            lambda: self._jobs.fail(
                self._record.id, self._owner, public.code, public.message, retryable=public.retryable
            )
        )

    async def _surely(self, settle: Callable[[], Awaitable[JobRecord]]) -> None:
        """Settling repeats safely, and the pictures are stored already: worth more than one try."""
        for attempt in range(1, SETTLE_TRIES + 1):
            try:
                await settle()
            except LeaseLost:
                raise
            except JobError:
                if attempt == SETTLE_TRIES:
                    raise
                await self._sleep(self._heartbeat_s)
            else:
                return


async def hand_back(jobs: JobsApi, record: JobRecord, *, owner: str) -> None:
    """To the queue, as the attempt that it was. Raises nothing: where it fails, the lease runs out."""
    try:
        await jobs.hand_back(record.id, owner)
    except JobError as error:
        logger.warning("%s was not handed back: %s; its lease will run out", record.id, error.code)


async def _stopped(task: asyncio.Task[dict[str, Any]]) -> None:
    """Cancel `task` and wait until it has really ended, however it ends."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        # Marks the error as seen: nobody needs the result of work that was stopped.
        task.exception()
