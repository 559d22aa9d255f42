"""The jobs actor without Ray: the life cycle and what goes on behind it, put together in one place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime

from storage.async_jobs import AsyncJobs
from storage.errors import JobError, StorageError
from storage.jobs import Jobs, utc_now
from storage.jobs_config import JobsConfig
from storage.mirror import Mirror
from storage.objects import ObjectStore
from storage.records import Records
from storage.training_queue import TrainingLauncher, TrainingQueue

logger = logging.getLogger(__name__)

# An open breaker is asked at no cost, and may be closed earlier than it said: by another node's probe, or an operator.
MIRROR_WAIT_S_MAX = 2.0


class JobsService:
    """Made on an event loop. `open` first, then `run` until it is cancelled, then `close`.

    `jobs` may be used from `open` on, whether `run` runs or not.
    """

    def __init__(
        self,
        config: JobsConfig,
        launcher: TrainingLauncher,
        store: ObjectStore,
        *,
        clock: Callable[[], datetime] = utc_now,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._sleep = sleep
        self._records = Records(config.records.url)
        jobs = Jobs(self._records, policy=config.policy(), clock=clock)
        self.jobs = AsyncJobs(jobs)
        self._mirror = Mirror(self._records, store, config.s3.prefix)
        self._trainings = TrainingQueue(jobs, launcher, config, clock=clock)

    async def open(self) -> None:
        """Restore an empty database, within `restore_wait_s`. A store that is away is tried again by `run`."""
        try:
            async with asyncio.timeout(self._config.restore_wait_s):
                await self._mirror.restore()
        except (StorageError, JobError, TimeoutError) as error:
            logger.warning("the records could not be restored yet (%s)", type(error).__name__)
        except Exception:
            logger.exception("the records could not be restored yet")

    async def run(self) -> None:
        """Sweep, supervise trainings and write the mirror, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat("sweep", self._config.sweep_interval_s, self._sweep))
            tasks.create_task(self._repeat("training queue", self._config.queue_interval_s, self._supervise))
            tasks.create_task(self._repeat("mirror", self._config.mirror_interval_s, self._write_mirror))

    def close(self) -> None:
        self._records.close()

    async def _repeat(self, name: str, interval_s: float, work: Callable[[], Awaitable[float]]) -> None:
        while True:
            wait_s = 0.0
            try:
                wait_s = await work()
            except (StorageError, JobError) as error:
                logger.warning("%s: %s", name, error)
            except Exception:
                # A fault here must not end the loop: it would leave every job of this cluster without a sweep.
                logger.exception("%s failed", name)
            await self._sleep(max(interval_s, wait_s))

    async def _sweep(self) -> float:
        for record in await self.jobs.reap():
            logger.warning("%s was swept and is %s", record.id, record.state)
        return 0.0

    async def _supervise(self) -> float:
        await asyncio.to_thread(self._trainings.run_once)
        return 0.0

    async def _write_mirror(self) -> float:
        await self._mirror.restore()
        while True:
            report = await self._mirror.flush()
            if report.failed:
                return min(report.retry_after_s, MIRROR_WAIT_S_MAX)
            if not report.written:
                return 0.0
