"""The client of the jobs actor for event loops. `storage.blocking_jobs` has the one for everything else."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_delay
from tenacity import wait_random_exponential as wait_random

from storage.actor import NAMESPACE
from storage.async_jobs import AsyncJobsApi, Until
from storage.direct_reads import READS, DirectReads, NotReadableError
from storage.errors import JobError, JobsUnavailable
from storage.job_record import JobRecord
from storage.jobs import Jobs
from storage.jobs_config import JobsConfig

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

ACTOR_NAME = "jobs"
UNAVAILABLE_AFTER_S = 30.0
WAIT_SLICE_S = 20.0


class _NoActorError(Exception):
    """No actor has the name now. It may be starting."""


# Every call is safe to repeat: a creation carries its id, an owner's call is known by its owner, a lost claim expires.
_ABSENT = (ActorDiedError, ActorUnavailableError, _NoActorError)


def _cause(error: RayTaskError) -> BaseException:
    """Our own error without the remote traceback around it, which must not reach a client."""
    return error.cause if isinstance(error.cause, JobError) else error


class JobsClient(AsyncJobsApi):
    """The jobs actor, asynchronously, from anywhere in the cluster. Picklable.

    Raises what `Jobs` raises, and JobsUnavailable when the actor did not answer for UNAVAILABLE_AFTER_S, in which
    case a write may or may not have happened.
    """

    def __init__(
        self,
        *,
        namespace: str = NAMESPACE,
        unavailable_after_s: float = UNAVAILABLE_AFTER_S,
        reads_directly: bool = False,
    ) -> None:
        """`reads_directly`: ask the database itself where this process can open it; see `storage.direct_reads`."""
        self._namespace = namespace
        self._unavailable_after_s = unavailable_after_s
        self._actor: Any = None
        self._reads = DirectReads(self._url_here) if reads_directly else None

    def __reduce__(self) -> tuple[Callable[..., JobsClient], tuple[str, float, bool]]:
        return _client, (self._namespace, self._unavailable_after_s, self._reads is not None)

    def reads_directly(self) -> bool:
        """Whether reads go past the actor at present."""
        return self._reads is not None and self._reads.is_open

    async def cluster_config(self) -> JobsConfig:
        """The configuration that the actor runs with, storage settings included."""
        config: JobsConfig = await self._send("config", lambda actor: actor.config.remote())
        return config

    async def wait(
        self,
        job_id: str,
        *,
        tenant: str | None,
        timeout_s: float,
        until: Until = "final",
        since: datetime | None = None,
    ) -> JobRecord:
        # In slices: a caller that goes away leaves its place in the actor after one slice and not after minutes.
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        if until == "change" and since is None:
            since = (await self.get(job_id, tenant=tenant)).updated_at
        while True:
            slice_s = max(0.0, min(WAIT_SLICE_S, ends_at - loop.time()))
            record: JobRecord = await self._send(
                "wait", functools.partial(_long_poll, job_id, tenant, slice_s, until, since)
            )
            changed = until == "change" and since is not None and record.updated_at > since
            if record.state.is_terminal or changed or loop.time() >= ends_at:
                return record

    async def call(self, method: Callable[Concatenate[Jobs, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        name = method.__name__
        if self._reads is not None and name in READS:
            try:
                read: T = await self._reads.call(name, args, kwargs)
            except NotReadableError:
                logger.debug("%s is asked of the actor", name)
            else:
                return read
        result: T = await self._send(name, lambda actor: actor.call.remote(name, args, kwargs))
        return result

    async def _url_here(self) -> str | None:
        node_id = ray.get_runtime_context().get_node_id()
        url: str | None = await self._send("url_on", lambda actor: actor.url_on.remote(node_id))
        return url

    async def _send(self, operation: str, send: Callable[[Any], Awaitable[Any]]) -> Any:
        retrying = AsyncRetrying(
            stop=stop_after_delay(self._unavailable_after_s),
            wait=wait_random(multiplier=0.1, max=2.0),
            retry=retry_if_exception_type(_ABSENT),
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._send_once(send)
        except RetryError as error:
            raise JobsUnavailable(operation) from error
        raise AssertionError("tenacity ends with a result or an error")

    async def _send_once(self, send: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._resolve)
            return await send(self._actor)
        except RayTaskError as error:
            raise _cause(error) from None
        except (ActorDiedError, ActorUnavailableError):
            # A handle of an actor that was killed for good never works again; the name may belong to another one.
            self._actor = None
            raise

    def _resolve(self) -> Any:
        try:
            return ray.get_actor(ACTOR_NAME, namespace=self._namespace)
        except ValueError as error:
            raise _NoActorError from error


def _long_poll(
    job_id: str, tenant: str | None, timeout_s: float, until: Until, since: datetime | None, actor: Any
) -> Awaitable[Any]:
    answer: Awaitable[Any] = actor.wait.remote(job_id, tenant, timeout_s, until, since)
    return answer


def _client(namespace: str, unavailable_after_s: float, reads_directly: bool) -> JobsClient:
    return JobsClient(namespace=namespace, unavailable_after_s=unavailable_after_s, reads_directly=reads_directly)
