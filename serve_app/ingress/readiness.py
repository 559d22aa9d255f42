"""`/readyz`: whether a request can be served now, part by part."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve_app.job_types.context import Services
from serve_app.job_types.health import check_services, checked

DISK_FREE_MIN_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class DiskSpace:
    free_bytes: int
    total_bytes: int


def disk_of(folder: Path) -> Callable[[], DiskSpace]:
    """The disk that holds `folder`, or the nearest folder above it that exists on this node."""

    def look() -> DiskSpace:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usage = shutil.disk_usage(existing)
        return DiskSpace(free_bytes=usage.free, total_bytes=usage.total)

    return look


async def check_readiness(services: Services, disk: Callable[[], DiskSpace]) -> dict[str, dict[str, Any]]:
    """`{"storage": {"ok", "breaker", ...}, "jobs", "gpu", "replicas", "disk"}`. Does not raise."""
    parts, replicas, space = await asyncio.gather(
        check_services(services), checked(_replicas(services)), checked(_disk(disk))
    )
    return {**parts, "replicas": replicas, "disk": space}


async def _replicas(services: Services) -> dict[str, Any]:
    counts = await services.workers.counts()
    rests = services.may_rest and counts.unhealthy == 0
    return {"ok": counts.ready > 0 or rests, **asdict(counts)}


async def _disk(disk: Callable[[], DiskSpace]) -> dict[str, Any]:
    space = await asyncio.to_thread(disk)
    return {"ok": space.free_bytes >= DISK_FREE_MIN_BYTES, **asdict(space)}
