"""Whole status objects, with their outputs as clients see them."""

from __future__ import annotations

import copy
from typing import Any

from serve_app.dispatch.reply import Reply
from serve_app.ingress.runpod_view import execution_ms, record_view, reply_view, stamped
from serve_app.job_types.context import Services, public_runpod_id
from serve_app.job_types.results import Presenting, presented_output
from serve_app.links import PLACED_LINKS, put_back, signed, taken_out
from storage.job_record import JobRecord

LINKS = "links"
"""In a noted status object, beside what clients see: the links of its output."""


async def status_object(services: Presenting, record: JobRecord, request_id: str) -> dict[str, Any]:
    """Raises StorageError where URLs cannot be made."""
    now = services.clock()
    output = await presented_output(services, record)
    if output is not None:
        output = stamped(
            output,
            request_id=request_id,
            worker_id=record.worker_id,
            runpod_id=public_runpod_id(record),
            duration_ms=execution_ms(record, now),
            timestamp=record.finished_at or now,
        )
    return record_view(record, now, output)


async def reply_status(services: Services, runpod_id: str, reply: Reply) -> dict[str, Any]:
    """Of a job without a record. Raises StorageError where URLs cannot be made."""
    return await _with_urls(services, reply_view(runpod_id, reply, services.clock(), services.worker_id))


def noted_status(view: dict[str, Any]) -> dict[str, Any]:
    """A status object with links as plain JSON, for `told_status`."""
    if view.get("output") is None:
        return view
    output, links = taken_out(view["output"])
    return {**view, "output": output, LINKS: PLACED_LINKS.dump_python(links, mode="json")}


async def told_status(services: Presenting, noted: dict[str, Any]) -> dict[str, Any]:
    """The status object that was noted, with URLs made now. Raises StorageError."""
    view = {name: value for name, value in noted.items() if name != LINKS}
    if noted.get(LINKS):
        output = copy.deepcopy(view["output"])
        put_back(output, PLACED_LINKS.validate_python(noted[LINKS]))
        view["output"] = output
    return await _with_urls(services, view)


async def _with_urls(services: Presenting, view: dict[str, Any]) -> dict[str, Any]:
    if view.get("output") is None:
        return view
    return {**view, "output": await signed(services.store, view["output"], expires_s=services.limits.url_expires_s)}
