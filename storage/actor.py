"""The way to the storage actors: one on each node, one breaker for all of them.

`StorageClient` is what other code holds. It can be pickled, and finds (or creates) the actor of the node that it is
used on, so that bulk bytes stay on the node. Actors are named in a namespace that is always given explicitly.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from storage.actor_shell import HEALTH_GROUP, ActorIdentity, StorageShell, fingerprint, packed, unpacked
from storage.blocking import BlockingStorage
from storage.breaker import BreakerMode, BreakerSnapshot
from storage.channel_connection import ChannelClosedError
from storage.counters import Counts
from storage.errors import StorageError, StorageMisconfigured, StorageTimeout, StorageUnavailable
from storage.node_channel import ChannelClient, ChannelMissingError
from storage.objects import (
    Capabilities,
    ObjectInfo,
    PendingUpload,
    PutItem,
    PutOutcome,
    StorageHealth,
)
from storage.settings import BreakerSettings, S3Settings

logger = logging.getLogger(__name__)

__all__ = ["NAMESPACE", "BlockingStorage", "StorageClient", "storage_actor_name"]

NAMESPACE = "raylora"
TASK_RETRIES_MAX = 3
RESOLVE_ATTEMPTS_MAX = 5
REPEAT_WITHIN_S = 1.0
HEALTH_GRACE_S = 5.0
# For the way to the actor and back, and a busy machine.
DEADLINE_GRACE_S = 10.0
PULSE_WITHIN_S = 10.0
HEALTH_CALLS_MAX = 4

# How long they may take is only known to the actor.
OF_UNKNOWN_SIZE = frozenset(
    {"get", "put_many", "copy", "list", "list_uploads", "delete_many", "upload_file", "download_file"}
)
REPEATED = (ActorDiedError, ActorUnavailableError, ChannelClosedError, ChannelMissingError)


@dataclass(frozen=True)
class _Actor:
    handle: Any
    channel: ChannelClient | None


class StorageClient:
    """Implements `ObjectStore` and `StoreMaintenance` over this node's storage actor.

    Use it where Ray is initialised, from any event loop. A call whose actor died is repeated on its successor;
    every operation is safe to repeat. Raises StorageUnavailable when no actor answers, StorageMisconfigured when
    this node's actor was created with other settings.
    """

    def __init__(
        self, settings: S3Settings, breaker: BreakerSettings | None = None, *, namespace: str = NAMESPACE
    ) -> None:
        self._settings = settings
        self._breaker = breaker or BreakerSettings()
        self._namespace = namespace
        self._found: _Actor | None = None
        self._unreachable: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _client, (self._settings, self._breaker, self._namespace)

    async def put(self, key: str, data: bytes, *, content_type: str | None = None) -> ObjectInfo:
        info: ObjectInfo = await self._call("put", key, data, content_type=content_type)
        return info

    async def put_many(self, items: Sequence[PutItem]) -> list[PutOutcome]:
        try:
            outcomes: list[PutOutcome] = await self._call("put_many", items)
        except StorageError as error:
            return [PutOutcome(item.key, error=error) for item in items]
        return outcomes

    async def get(self, key: str, *, expected_sha256: str | None = None) -> bytes:
        data: bytes = await self._call("get", key, expected_sha256=expected_sha256)
        return data

    async def head(self, key: str) -> ObjectInfo:
        info: ObjectInfo = await self._call("head", key)
        return info

    async def exists(self, key: str) -> bool:
        return bool(await self._call("exists", key))

    async def delete(self, key: str) -> None:
        await self._call("delete", key)

    async def delete_many(self, keys: Sequence[str]) -> int:
        return int(await self._call("delete_many", list(keys)))

    async def copy(self, source: str, target: str) -> ObjectInfo:
        info: ObjectInfo = await self._call("copy", source, target)
        return info

    async def upload_file(self, path: Path, key: str, *, content_type: str | None = None) -> ObjectInfo:
        """`path` is read by the actor, which shares this node's file system."""
        info: ObjectInfo = await self._call("upload_file", _absolute(path), key, content_type=content_type)
        return info

    async def download_file(self, key: str, path: Path, *, expected_sha256: str | None = None) -> ObjectInfo:
        """`path` is written by the actor, which shares this node's file system."""
        info: ObjectInfo = await self._call("download_file", key, _absolute(path), expected_sha256=expected_sha256)
        return info

    async def presign_get(self, key: str, *, expires_s: int = 3600, filename: str | None = None) -> str:
        return str(await self._call("presign_get", key, expires_s=expires_s, filename=filename))

    async def presign_put(self, key: str, *, expires_s: int = 3600, content_type: str | None = None) -> str:
        return str(await self._call("presign_put", key, expires_s=expires_s, content_type=content_type))

    async def health(self) -> StorageHealth:
        try:
            async with asyncio.timeout(self._settings.health_deadline_s + HEALTH_GRACE_S):
                health: StorageHealth = await self._call_actor("health")
                return health
        except StorageError as error:
            return StorageHealth(False, "unknown", self._settings.backend, detail=error.code)
        except TimeoutError:
            return StorageHealth(False, "unknown", self._settings.backend, detail="storage_timeout")

    async def ensure_bucket(self) -> None:
        await self._call("ensure_bucket")

    async def list_uploads(self, prefix: str) -> list[PendingUpload]:
        found: list[PendingUpload] = await self._call("list_uploads", prefix)
        return found

    async def abort_upload(self, key: str, upload_id: str) -> None:
        await self._call("abort_upload", key, upload_id)

    async def capabilities(self) -> Capabilities:
        found: Capabilities = await self._call("capabilities")
        return found

    async def set_breaker(self, mode: BreakerMode) -> BreakerSnapshot:
        snapshot: BreakerSnapshot = await self._call_actor("set_breaker", mode)
        return snapshot

    async def counts(self) -> Counts:
        """Of this node's actor."""
        counts: Counts = await self._call_actor("counts")
        return counts

    async def list(self, prefix: str, *, start_after: str | None = None, limit: int | None = None) -> list[ObjectInfo]:
        found: Any = await self._call("list", prefix, start_after=start_after, limit=limit)
        return found  # type: ignore[no-any-return]

    async def _call(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Over the socket of this node's actor, or as an actor call where that cannot be reached."""

        async def once() -> Any:
            actor = await self._actor()
            if actor.channel is not None:
                try:
                    return await actor.channel.call(operation, arguments, keywords)
                except ChannelMissingError as error:
                    # Its actor may have a successor with another one.
                    self._unreachable = actor.channel.path
                    logger.warning("the socket of the storage actor is missing", extra={"errno": error.errno})
                    raise
            sent = [packed(argument) for argument in arguments]
            return unpacked(await _answer(actor.handle.perform.remote(operation, sent, keywords)))

        sent_bytes = sum(len(argument) for argument in arguments if isinstance(argument, bytes))
        return await self._in_time(operation, sent_bytes, self._until_answered(operation, once))

    async def _in_time(self, operation: str, sent_bytes: int, work: Coroutine[Any, Any, Any]) -> Any:
        """The actor keeps the deadlines of its operations; this is for an actor that hangs. Raises StorageTimeout."""
        settings = self._settings
        bound_s = settings.deadline_s + DEADLINE_GRACE_S + sent_bytes / settings.throughput_min_bytes_per_s
        answer = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({answer}, timeout=bound_s))[0]:
                if operation not in OF_UNKNOWN_SIZE or not await self._is_alive():
                    raise StorageTimeout(operation, bound_s)
            return answer.result()
        finally:
            answer.cancel()
            await asyncio.wait({answer})

    async def _is_alive(self) -> bool:
        try:
            async with asyncio.timeout(PULSE_WITHIN_S):
                await self._call_actor("pulse")
        except (StorageError, TimeoutError):
            return False
        return True

    async def _call_actor(self, method: str, *arguments: Any) -> Any:
        async def once() -> Any:
            actor = await self._actor()
            return await _answer(getattr(actor.handle, method).remote(*arguments))

        return await self._until_answered(method, once)

    async def _until_answered(self, operation: str, once: Callable[[], Awaitable[Any]]) -> Any:
        """Repeats what its actor's death cut short, or did not reach it. Raises StorageUnavailable."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + self._settings.deadline_s
        for left in reversed(range(RESOLVE_ATTEMPTS_MAX)):
            try:
                return await once()
            except (RayActorError, ChannelClosedError, ChannelMissingError) as error:
                self._found = None
                if left == 0 or clock() >= until_s or not isinstance(error, REPEATED):
                    raise StorageUnavailable(operation, 1.0) from error
                logger.info("a storage call is repeated", extra={"operation": operation, "kind": type(error).__name__})
            await asyncio.sleep(random.uniform(0, REPEAT_WITHIN_S))
        raise AssertionError("the last attempt raises")

    async def _actor(self) -> _Actor:
        found = self._found
        if found is None:
            handle = await asyncio.to_thread(self._get_or_create)
            identity: ActorIdentity = await _answer(handle.identify.remote())
            if identity.fingerprint != fingerprint(self._settings, self._breaker):
                raise StorageMisconfigured("this node's storage actor was created with other settings")
            path = None if identity.socket == self._unreachable else identity.socket
            channel = None if path is None else ChannelClient(path)
            found = self._found = _Actor(handle, channel)
        return found

    def _get_or_create(self) -> Any:
        node_id = ray.get_runtime_context().get_node_id()
        return (
            ray.remote(concurrency_groups={HEALTH_GROUP: HEALTH_CALLS_MAX})(StorageShell)
            .options(
                name=storage_actor_name(node_id),
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                max_task_retries=TASK_RETRIES_MAX,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
                max_concurrency=self._settings.max_concurrency,
            )
            .remote(self._settings, self._breaker, self._namespace)
        )


def storage_actor_name(node_id: str) -> str:
    return f"storage@{node_id}"


async def _answer(ref: Any) -> Any:
    """The result of a call, our errors as they were raised. Cancelling cancels the call."""
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


def _client(settings: S3Settings, breaker: BreakerSettings, namespace: str) -> StorageClient:
    return StorageClient(settings, breaker, namespace=namespace)


def _absolute(path: Path) -> Path:
    """The actor's working directory is another one."""
    return path.absolute()
