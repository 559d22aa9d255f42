"""`health`: every internal part is really asked, at the same time and within a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any

from serve_app.ingress.errors import describe
from serve_app.job_types.context import Finished, JobContext, Services

CHECK_TIMEOUT_S = 5.0


async def health(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """The reply says `unhealthy` rather than fail: asking about the state is no error."""
    checks = await check_services(services)
    ok = all(check["ok"] for check in checks.values())
    return Finished(
        {
            "status": "healthy" if ok else "unhealthy",
            "services": checks,
            "worker_id": services.worker_id,
            "environment": services.environment,
        }
    )


async def check_services(services: Services) -> dict[str, dict[str, Any]]:
    """`{"storage": {"ok", ...}, "jobs": {...}, "gpu": {...}}`, each with `error` where it is not ok. Does not raise."""
    storage, jobs, inference = await asyncio.gather(
        checked(_storage(services)), checked(_jobs(services)), checked(_inference(services))
    )
    return {"storage": storage, "jobs": jobs, "gpu": inference}


async def checked(probe: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The probe's answer, or `{"ok": False, "error"}` where it fails or takes over CHECK_TIMEOUT_S. Does not raise."""
    try:
        return await asyncio.wait_for(probe, CHECK_TIMEOUT_S)
    except TimeoutError:
        return {"ok": False, "error": "timeout"}
    except Exception as error:  # noqa: BLE001 a part that fails in whatever way is what this reports
        return {"ok": False, "error": describe(error).code}


async def _storage(services: Services) -> dict[str, Any]:
    state = await services.store.health()
    return {**asdict(state), "error": state.detail} if not state.ok else asdict(state)


async def _jobs(services: Services) -> dict[str, Any]:
    counts, health = await asyncio.gather(services.jobs.counts(), services.jobs.health())
    active = sum(number for state, number in counts.items() if not state.is_terminal)
    return {"ok": True, "active": active, **health.model_dump()}


async def _inference(services: Services) -> dict[str, Any]:
    return asdict(await services.inference.health())
