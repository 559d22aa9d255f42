"""A generation asked for by one of the surfaces that wait for its pictures. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from serve_app.errors import GenerationFailed, GenerationRefused, ServiceUnavailable
from serve_app.ingress.errors import describe, status_of_code
from serve_app.job_types.context import JobContext, Services
from serve_app.job_types.generate import generate
from serve_app.job_types.process_object import error_text
from storage.errors import JobError
from storage.job_record import JobRecord
from storage.job_state import JobState

logger = logging.getLogger(__name__)


async def start_generation(services: Services, context: JobContext, payload: dict[str, Any]) -> JobRecord:
    """The queued record of a job type `generate`. Raises what that raises."""
    record = (await generate(services, context, payload)).record
    try:
        await services.dispatch.wake()
    except ServiceUnavailable:
        # It is queued; the dispatcher finds it at its next look.
        logger.warning("the dispatcher could not be woken for %s", record.id)
    return record


async def drawn(services: Services, context: JobContext, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """The stored pictures of a generation, once it has ended: its output's entries, each with a key.

    A caller that goes away cancels the generation. Raises what `generate` raises, and GenerationRefused or
    GenerationFailed where there are no pictures.
    """
    record = await start_generation(services, context, payload)
    timeout_s = services.defaults.generation_timeout_s
    try:
        record = await services.jobs.wait(record.id, tenant=record.tenant, timeout_s=timeout_s)
    except asyncio.CancelledError:
        await asyncio.shield(_stop(services, record))
        raise
    if record.state is not JobState.COMPLETED:
        await _stop(services, record)
        raise _failure(record)
    return [item for item in (record.output or {}).get("images", []) if item.get("key")]


def _failure(record: JobRecord) -> GenerationRefused | GenerationFailed:
    if record.state is JobState.CANCELLED:
        return GenerationRefused("The generation was cancelled")
    message = error_text(record) or "The generation did not end in time"
    refused = record.error is not None and status_of_code(record.error.code) < 500
    return GenerationRefused(message) if refused else GenerationFailed(message)


async def _stop(services: Services, record: JobRecord) -> None:
    if record.state.is_terminal:
        return
    try:
        await services.jobs.request_cancel(record.id, tenant=record.tenant)
    except JobError as error:
        # Its own time limit ends it then.
        logger.warning("%s could not be cancelled: %s", record.id, describe(error).code)
