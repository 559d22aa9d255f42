"""The storage actor of one node: a Ray shell around the store, which other processes call through `storage.actor`."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from storage.breaker import BreakerMode, BreakerSnapshot
from storage.breaker_actor import RemoteBreaker
from storage.byte_budget import ByteBudget
from storage.counters import HELD, Counts
from storage.loop_thread import LoopThread
from storage.node_channel import ChannelServer
from storage.objects import ObjectStore, StorageHealth, StoreMaintenance
from storage.ray_counters import RayCounters
from storage.s3 import S3Store, local_breaker
from storage.settings import MIB, BreakerSettings, S3Settings
from storage.shared_breaker import Remote, SharedGate

HEALTH_GROUP = "health"
"""The concurrency group of the calls that must not wait behind the node's work."""

# Ray copies bytes into its messages, but shares the memory of an array with every process on the node.
ARRAY_FROM_BYTES = MIB

# Of `storage.objects`, what is asked for a node's own work; the rest is about the actor itself.
PERFORMED = frozenset(
    name
    for protocol in (ObjectStore, StoreMaintenance)
    for name in vars(protocol)
    if not name.startswith("_") and name not in {"health", "set_breaker", "counts"}
)


@dataclass(frozen=True)
class ActorIdentity:
    """`fingerprint` is of the settings, `socket` where the actor listens on its node."""

    fingerprint: str
    socket: Path | None


class StorageShell:
    """The store of one node, as an actor.

    Ray gives each concurrency group an event loop of its own, but the store belongs to one loop: it lives on a
    thread of ours, and every method runs there. What this node's processes ask for comes over a socket, and as actor
    calls where they cannot reach that.
    """

    def __init__(self, settings: S3Settings, breaker: BreakerSettings, namespace: str) -> None:
        self._thread = LoopThread("storage")
        remote = RemoteBreaker(breaker, namespace) if breaker.shared else None
        self._store, self._reporting = self._thread.run_blocking(_open(settings, breaker, remote))
        self._channel = ChannelServer(self._perform, bytes_max=settings.bytes_in_flight_max)
        path = self._thread.run_blocking(self._channel.start())
        self._copied = ByteBudget(settings.bytes_in_flight_max)
        self._identity = ActorIdentity(fingerprint(settings, breaker), path)
        # What is loaded by now stays. Every call would wait while a full collection looks at it, for 80 ms or so.
        gc.collect()
        gc.freeze()

    @ray.method(concurrency_group=HEALTH_GROUP)  # type: ignore[untyped-decorator]
    async def identify(self) -> ActorIdentity:
        return self._identity

    @ray.method(concurrency_group=HEALTH_GROUP)  # type: ignore[untyped-decorator]
    async def pulse(self) -> None:
        """Answers where the thread of the store does its work."""
        await self._thread.run(asyncio.sleep(0))

    @ray.method(concurrency_group=HEALTH_GROUP)  # type: ignore[untyped-decorator]
    async def health(self) -> StorageHealth:
        return await self._thread.run(self._store.health())

    @ray.method(concurrency_group=HEALTH_GROUP)  # type: ignore[untyped-decorator]
    async def set_breaker(self, mode: BreakerMode) -> BreakerSnapshot:
        return await self._thread.run(self._store.set_breaker(mode))

    @ray.method(concurrency_group=HEALTH_GROUP)  # type: ignore[untyped-decorator]
    async def counts(self) -> Counts:
        return await self._thread.run(self._counts())

    async def perform(self, operation: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """One of `PERFORMED` by the store."""
        result = await self._thread.run(self._perform_call(operation, arguments, keywords))
        return packed(bytes(result) if isinstance(result, memoryview) else result)

    async def _counts(self) -> Counts:
        counts, connections = await self._store.counts(), self._channel.connections
        requests = self._channel.request_bytes + self._copied.held_bytes
        tasks = len(asyncio.all_tasks()) - connections
        counts[HELD] |= {"request_bytes": requests, "connections": connections, "tasks": tasks}
        return counts

    async def _perform_call(self, operation: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """What is large stays in Ray's memory until there is room for a copy."""
        size_bytes = sum(argument.nbytes for argument in arguments if isinstance(argument, np.ndarray))
        async with self._copied.hold(size_bytes):
            return await self._perform(operation, [unpacked(argument) for argument in arguments], keywords)

    async def _perform(self, operation: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        if operation not in PERFORMED:
            raise ValueError(f"storage has no operation {operation}")
        if operation == "get":
            # What is sent on need not be copied before.
            return await self._store.get_view(*arguments, **keywords)
        return await getattr(self._store, operation)(*arguments, **keywords)


def fingerprint(settings: S3Settings, breaker: BreakerSettings) -> str:
    """Tells settings apart without giving away the secrets in them."""
    parts = (settings.model_dump_json(), breaker.model_dump_json())
    keys = (settings.access_key_id, settings.secret_access_key)
    revealed = "\n".join((*parts, *("" if key is None else key.get_secret_value() for key in keys)))
    return hashlib.sha256(revealed.encode()).hexdigest()


def packed(value: Any) -> Any:
    """An argument or result as it goes through Ray: large bytes as an array."""
    is_large = isinstance(value, bytes) and len(value) >= ARRAY_FROM_BYTES
    return np.frombuffer(value, dtype=np.uint8) if is_large else value


def unpacked(value: Any) -> Any:
    """The reverse of `packed`."""
    return value.tobytes() if isinstance(value, np.ndarray) else value


async def _open(
    settings: S3Settings, breaker: BreakerSettings, remote: Remote | None
) -> tuple[S3Store, asyncio.Task[None] | None]:
    """On the loop that the store is to live on. The task reports to the shared breaker and has to be kept."""
    if remote is None:
        return S3Store(settings, breaker, tally=RayCounters()), None
    gate = SharedGate(
        local_breaker(breaker),
        remote,
        sync_interval_s=breaker.sync_interval_s,
        probe_timeout_s=breaker.probe_timeout_s,
    )
    return S3Store(settings, breaker, gate=gate, tally=RayCounters()), asyncio.create_task(gate.run())
