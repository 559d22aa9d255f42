"""Takes queued generations, has them made, and settles their records. Plain: runs without Ray.

A generation is claimed under a lease that heartbeats keep. Whatever goes wrong here, the record is either settled or
its lease runs out, and then the jobs actor queues it again. Told to stop, the loop lets what runs end, and hands back
what does not end in time.
"""

from __future__ import annotations

import asyncio
import logging

from serve_app.collaborators import DispatchLoad, Inference, JobsApi
from serve_app.dispatch.attempt import GenerationAttempt, Sleep, hand_back
from serve_app.dispatch.slots import Slots
from storage.errors import JobError, LeaseLost
from storage.job_record import JobRecord
from storage.job_state import JobKind

logger = logging.getLogger(__name__)


class GenerationDispatcher:
    """At most `slots` generations at a time. `owner` names this dispatcher's leases; it must differ after a restart."""

    def __init__(
        self,
        jobs: JobsApi,
        inference: Inference,
        *,
        owner: str,
        slots: int,
        lease_s: float = 30.0,
        heartbeat_s: float = 1.0,
        poll_s: float = 2.0,
        drain_s: float = 15.0,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._jobs = jobs
        self._inference = inference
        self._owner = owner
        self._slots = Slots(slots, poll_s=poll_s, sleep=sleep)
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._drain_s = drain_s
        self._sleep = sleep

    def wake(self) -> None:
        """Look for queued work now instead of at the next poll."""
        self._slots.wake()

    def load(self) -> DispatchLoad:
        return DispatchLoad(running=self._slots.running, slots=self._slots.count)

    async def run(self) -> None:
        """Until cancelled; then nothing more is claimed, and what is under way has `drain_s` to end. What does not is
        stopped and queued again, as the attempt that it was."""
        try:
            while True:
                await self._claim()
                await self._slots.next_look()
        finally:
            await self._slots.end(within_s=self._drain_s)

    async def _claim(self) -> None:
        free = self._slots.free
        if free <= 0:
            return
        claim = self._jobs.claim(JobKind.GENERATION, self._owner, limit=free, lease_s=self._lease_s)
        claiming = asyncio.ensure_future(claim)
        try:
            # What is asked for may be ours before the answer is here.
            records = await asyncio.shield(claiming)
        except JobError as error:
            logger.warning("Generations could not be claimed: %s; trying again in %g s", error.code, self._slots.poll_s)
            return
        except asyncio.CancelledError:
            await self._hand_back(claiming)
            raise
        for record in records:
            self._slots.start(self._attend(record))

    async def _hand_back(self, claiming: asyncio.Future[list[JobRecord]]) -> None:
        """To the queue what is still claimed after the loop was told to stop."""
        try:
            records = await claiming
        except JobError as error:
            logger.warning("What the last claim got is not known: %s; its leases will run out", error.code)
            return
        for record in records:
            await hand_back(self._jobs, record, owner=self._owner)

    async def _attend(self, record: JobRecord) -> None:
        """One generation from its claim to its settled record. Raises nothing but CancelledError."""
        attempt = GenerationAttempt(
            self._jobs,
            self._inference,
            record,
            owner=self._owner,
            lease_s=self._lease_s,
            heartbeat_s=self._heartbeat_s,
            sleep=self._sleep,
        )
        try:
            await attempt.run()
        except LeaseLost:
            logger.warning("The lease of %s was lost; its work here was dropped", record.id)
        except JobError as error:
            logger.error("%s could not be settled: %s; its lease will run out", record.id, error.code)
