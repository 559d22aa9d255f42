"""The Ray shell of the job life cycle: one named actor for the cluster. Its clients are in `storage.jobs_client`."""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from storage.actor import NAMESPACE, StorageClient
from storage.async_jobs import Until
from storage.blocking_jobs import BlockingJobs
from storage.errors import JobsUnavailable
from storage.job_record import JobRecord
from storage.jobs import Jobs
from storage.jobs_client import ACTOR_NAME, JobsClient
from storage.jobs_config import JobsConfig
from storage.jobs_service import JobsService
from storage.loop_thread import LoopThread
from storage.objects import ObjectStore
from storage.training_queue import TrainingLauncher

__all__ = ["ACTOR_NAME", "BlockingJobs", "JobsActor", "JobsClient", "JobsConfig", "ensure_jobs_actor"]

logger = logging.getLogger(__name__)

LONG_POLLS_MAX = 1000
CALLS_MAX = 256
START_TIMEOUT_S = 120.0
HEAD_NODE = "node:__internal_head__"


class JobsActor:
    """The actor's body. Ray gives each concurrency group an event loop of its own, but the service belongs to one:
    it lives on a thread of ours, and every method runs there.
    """

    def __init__(self, config: JobsConfig, launcher: TrainingLauncher, store: ObjectStore | None) -> None:
        self._config = config
        self._thread = LoopThread("jobs")
        # Begun here and not at the first call: after a restart nobody may call for a while, and trainings are waiting.
        self._serving = self._thread.run_blocking(_serve(config, launcher, store))

    async def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the method of `Jobs` of that name."""
        return await self._thread.run(self._serving.call(name, args, kwargs))

    # Long polls have places of their own, so that however many they are, a heartbeat finds one.
    @ray.method(concurrency_group="long_polls")  # type: ignore[untyped-decorator]
    async def wait(
        self, job_id: str, tenant: str | None, timeout_s: float, until: Until, since: datetime | None
    ) -> JobRecord:
        return await self._thread.run(self._serving.wait(job_id, tenant, timeout_s, until, since))

    async def config(self) -> JobsConfig:
        return self._config

    async def url_on(self, node_id: str) -> str | None:
        """The database's URL for a process on that node of the cluster; None where a file lies on another."""
        url = self._config.records.url
        here = str(ray.get_runtime_context().get_node_id())
        return url if node_id == here or not url.startswith("sqlite") else None


class _Serving:
    """A service that opens and runs in the background. Calls wait until it has looked for records to restore."""

    def __init__(self, service: JobsService) -> None:
        self._jobs = service.jobs
        self._opened = asyncio.create_task(service.open())
        self._running = asyncio.create_task(self._run(service))

    async def _run(self, service: JobsService) -> None:
        await asyncio.shield(self._opened)
        await service.run()

    async def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        await asyncio.shield(self._opened)
        return await self._jobs.call(getattr(Jobs, name), *args, **kwargs)

    async def wait(
        self, job_id: str, tenant: str | None, timeout_s: float, until: Until, since: datetime | None
    ) -> JobRecord:
        await asyncio.shield(self._opened)
        return await self._jobs.wait(job_id, tenant=tenant, timeout_s=timeout_s, until=until, since=since)


async def _serve(config: JobsConfig, launcher: TrainingLauncher, store: ObjectStore | None) -> _Serving:
    return _Serving(JobsService(config, launcher, store or StorageClient(config.s3, config.breaker)))


class _OtherConfigurationError(Exception):
    """An actor that is to be replaced has not ended yet."""


def _may_come_up(error: BaseException) -> bool:
    """Whether asking again can help: an actor that was gone or going, and not one that failed to construct itself."""
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return False
    return isinstance(error, ActorDiedError | ActorUnavailableError | _OtherConfigurationError)


def actor_options(namespace: str) -> dict[str, Any]:
    return {
        "name": ACTOR_NAME,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        # Repeating a call is the clients' business: they alone know how long their caller will wait.
        "max_task_retries": 0,
        "num_cpus": 0,
        "max_concurrency": CALLS_MAX,
        # The database may be a file of the head node; restarted anywhere else, the actor would find an empty one. And
        # Ray's dashboard, which takes the trainings, may listen on that node's loopback only.
        "resources": {HEAD_NODE: 0.001},
    }


def ensure_jobs_actor(
    config: JobsConfig, launcher: TrainingLauncher, *, store: ObjectStore | None = None, namespace: str = NAMESPACE
) -> JobsClient:
    """Start the jobs actor where there is none, and wait until it answers.

    `launcher` and `store` are pickled into the actor; without `store` it uses the storage actor of its node. An actor
    that runs already with another configuration is replaced. Raises JobsUnavailable when it does not come up.
    """
    actor_class = ray.remote(concurrency_groups={"long_polls": LONG_POLLS_MAX})(JobsActor)
    # The name of an actor that was killed for good may still lead to it for a moment; asked again, Ray makes a new one.
    starting = Retrying(
        stop=stop_after_delay(START_TIMEOUT_S),
        wait=wait_random_exponential(multiplier=0.1, max=2.0),
        retry=retry_if_exception(_may_come_up),
        reraise=True,
    )

    def start() -> None:
        actor = actor_class.options(**actor_options(namespace)).remote(config, launcher, store)
        if ray.get(actor.config.remote(), timeout=START_TIMEOUT_S) != config:
            logger.warning("the jobs actor runs already, with another configuration, and is replaced")
            ray.kill(actor)
            raise _OtherConfigurationError

    try:
        starting(start)
    except (RayActorError, GetTimeoutError, _OtherConfigurationError) as error:
        raise JobsUnavailable("start") from error
    return JobsClient(namespace=namespace)
