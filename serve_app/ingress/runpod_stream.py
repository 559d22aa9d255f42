"""`/stream`: what a job reported since the last call, each report given out once.

The clients set the rules. The JavaScript one asks again without a pause, so an empty answer waits; the Python ones
stop only at a final status with an empty `stream`, so the output comes once; they never stop at CANCELLED, so that
becomes a 404 once it was told.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from serve_app.errors import RunpodJobNotFound
from serve_app.ingress.runpod_status import status_object
from serve_app.ingress.runpod_view import RUNPOD_STATUS, runpod_status
from serve_app.job_types.context import Services, is_accepted_only
from serve_app.job_types.results import presented_event
from storage.job_record import Drained, JobRecord
from storage.job_state import JobState

CHUNK_BYTES_MAX = 1024 * 1024
STILL_AT_WORK = RUNPOD_STATUS[JobState.RUNNING]


def reply_stream(told: dict[str, Any], *, is_first: bool) -> dict[str, Any]:
    """Of a job without a record, which reports nothing but its end; `told` is its status object. `is_first`: that end
    was not told yet.

    Raises RunpodJobNotFound.
    """
    if told["status"] == "CANCELLED" and not is_first:
        raise RunpodJobNotFound
    return {"status": told["status"], "stream": _chunks([told["output"]] if is_first and "output" in told else [])}


async def record_stream(services: Services, record: JobRecord, request_id: str, *, wait_s: float) -> dict[str, Any]:
    """Answers when there is something to tell, at the latest after `wait_s`. Raises RunpodJobNotFound, StorageError."""
    if is_accepted_only(record):
        # Told when it was accepted; what its process reports is not part of that job.
        return {"status": runpod_status(record), "stream": []}
    drained = await _drained(services, record, wait_s)
    outputs = [await presented_event(services, event.data) for event in drained.events]
    if not drained.is_end:
        # Final only with the reply that holds the last chunk.
        status = STILL_AT_WORK if drained.record.state.is_terminal else runpod_status(drained.record)
        return {"status": status, "stream": _chunks(outputs)}
    if drained.was_ended and drained.record.state is JobState.CANCELLED:
        raise RunpodJobNotFound
    if not drained.was_ended:
        outputs.append((await status_object(services, drained.record, request_id))["output"])
    return {"status": runpod_status(drained.record), "stream": _chunks(outputs)}


async def _drained(services: Services, record: JobRecord, wait_s: float) -> Drained:
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    while True:
        drained = await services.jobs.drain(record.id, tenant=record.tenant)
        remaining_s = until - loop.time()
        if drained.events or drained.is_end or remaining_s <= 0:
            return drained
        await services.jobs.wait(
            record.id,
            tenant=record.tenant,
            timeout_s=remaining_s,
            until="change",
            since=drained.record.updated_at,
        )


def _chunks(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"output": output if _fits(output) else _told_elsewhere(output)} for output in outputs]


def _fits(output: dict[str, Any]) -> bool:
    return len(json.dumps(output)) <= CHUNK_BYTES_MAX


def _told_elsewhere(output: dict[str, Any]) -> dict[str, Any]:
    """A chunk may hold CHUNK_BYTES_MAX; /status may hold more."""
    kept: dict[str, Any] = {
        name: output[name] for name in ("process_id", "status", "step", "total_steps") if name in output
    }
    return {**kept, "message": "The output is larger than a chunk of a stream may be; ask /status for it"}
