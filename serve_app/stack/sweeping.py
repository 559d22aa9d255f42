"""Sweeps of the object store, as the supervisor makes them: one after another, for as long as the instance runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serve_app.settings import Settings
from serve_app.stack.background import Background
from serve_app.stack.instance import Instance
from storage.counters import CLEANUP_FAILURES, Counters
from storage.embedded import TemporaryFiles
from storage.errors import JobError, StorageError
from storage.jobs_config import JobsConfig
from storage.sweep_report import SweepReport
from storage.sweeper import Sweeper

logger = logging.getLogger(__name__)


def sweeper_of(
    settings: Settings, instance: Instance, counters: Counters, *, config: JobsConfig | None = None
) -> Sweeper:
    """A sweeper of this cluster, where Ray is initialised. Without `config`, storage is where `settings` say."""
    from storage.actor import StorageClient
    from storage.jobs_client import JobsClient

    s3, breaker = (settings.s3(), settings.breaker()) if config is None else (config.s3, config.breaker)
    objects = instance.s3_folder / "objects"
    return Sweeper(
        StorageClient(s3, breaker),
        JobsClient(),
        s3.prefix,
        settings.sweep,
        counters=counters,
        temporary_files=TemporaryFiles(objects) if objects.is_dir() else None,
    )


class PeriodicSweeps:
    """Waits, sweeps, waits: nothing is swept while the instance still starts."""

    def __init__(
        self,
        sweep: Callable[[], Awaitable[SweepReport]],
        interval_s: float,
        counters: Counters,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sweep = sweep
        self._interval_s = interval_s
        self._counters = counters
        self._sleep = sleep
        self._background = Background("sweeps", self.run)

    def start(self) -> None:
        """In a thread of its own."""
        self._background.start()

    def stop(self) -> None:
        """Cut short a sweep that is under way; every step of one is safe to repeat."""
        self._background.stop()

    async def run(self) -> None:
        """Until cancelled. A sweep that fails as a whole is logged and counted, and the next one comes in its time."""
        while True:
            await self._sleep(self._interval_s)
            try:
                report = await self._sweep()
            except (StorageError, JobError) as error:
                self._counters.add(CLEANUP_FAILURES, resource="sweep")
                logger.warning("the sweep was given up (%s)", error.code)
            except Exception:
                # One sweep's fault must not end all the later ones.
                self._counters.add(CLEANUP_FAILURES, resource="sweep")
                logger.exception("the sweep was given up")
            else:
                logger.info("swept %s, %d failures", report.totals() or "nothing", len(report.failures))
