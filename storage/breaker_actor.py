"""The Ray shell around the shared breaker: one actor for the whole cluster."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from storage.s3 import local_breaker
from storage.settings import BreakerSettings
from storage.shared_breaker import (
    OperatorSetting,
    RemoteUnreachableError,
    Report,
    SharedBreaker,
    SharedPermit,
    SharedState,
)

BREAKER_NAME = "breaker"


class BreakerShell:
    """The breaker of the cluster, as an actor."""

    def __init__(self, settings: BreakerSettings) -> None:
        self._breaker = SharedBreaker(local_breaker(settings), secrets.token_hex(8))

    async def report(self, reports: Sequence[Report], setting: OperatorSetting | None = None) -> SharedState:
        return self._breaker.report(reports, setting)

    async def admit(self) -> SharedPermit | SharedState:
        return self._breaker.admit()


class RemoteBreaker:
    """Implements `storage.shared_breaker.Remote` over the breaker actor, which it creates when it is missing."""

    def __init__(self, settings: BreakerSettings, namespace: str) -> None:
        self._settings = settings
        self._namespace = namespace
        self._handle: Any = None

    async def report(self, reports: Sequence[Report], setting: OperatorSetting | None = None) -> SharedState:
        state: SharedState = await self._call("report", reports, setting)
        return state

    async def admit(self) -> SharedPermit | SharedState:
        answer: SharedPermit | SharedState = await self._call("admit")
        return answer

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(self._resolve)
            return await getattr(self._handle, method).remote(*arguments)
        except (RayError, ValueError) as error:
            self._handle = None
            raise RemoteUnreachableError from error

    def _resolve(self) -> Any:
        return (
            ray.remote(BreakerShell)
            .options(
                name=BREAKER_NAME,
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=-1,
                num_cpus=0,
            )
            .remote(self._settings)
        )
