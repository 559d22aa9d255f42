"""Places for transfers: uploads, bundles, adapters, pictures by URL. They wait for networks and disks, some of them for
minutes, so they have replicas of their own, and one tenant's fill at most half of these."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from serve_app.errors import TooManyUploads
from serve_app.settings import Settings

PLACES_MIN = 8
RETRY_AFTER_S = 30.0


def places_of_replica(settings: Settings) -> int:
    """Transfers that one replica has at once; together they are at least two for each ingress replica."""
    return max(PLACES_MIN, math.ceil(2 * settings.ingress_replicas / settings.validation_replicas))


def places_of_tenant(settings: Settings) -> int:
    """Transfers of one tenant that one ingress replica has under way: its share of half of all places."""
    return places_of_replica(settings) * settings.validation_replicas // (2 * settings.ingress_replicas)


class TenantPlaces:
    """So many transfers of a tenant at once; its others wait for their turn, in the order in which they came."""

    def __init__(self, of_tenant: int, *, wait_s: float) -> None:
        self._of_tenant = of_tenant
        self._wait_s = wait_s
        # Kept by whoever has a place or waits for one.
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def taken(self, tenant: str) -> AsyncIterator[None]:
        """A place for the length of the block. Raises TooManyUploads where none was free within `wait_s`."""
        places = self._places.setdefault(tenant, asyncio.Semaphore(self._of_tenant))
        try:
            async with asyncio.timeout(self._wait_s):
                await places.acquire()
        except TimeoutError:
            raise TooManyUploads(RETRY_AFTER_S) from None
        try:
            yield
        finally:
            places.release()
