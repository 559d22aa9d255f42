"""A job record as server-sent events (WHATWG HTML, section 9.2). An event's id is the record's version.

A reconnecting client names the last id that it saw and misses no state; progress that came and went meanwhile is not
repeated, because a record keeps only the latest.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from serve_app.ingress.errors import describe
from serve_app.ingress.replies import problem_head
from serve_app.job_types.context import Services
from storage.errors import JobError
from storage.job_record import JobRecord
from storage.job_state import JobState

HEARTBEAT_S = 15.0
RECONNECT_MS = 2000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ID_DIGITS_MAX = 18


def version_of(record: JobRecord) -> int:
    """Microseconds since 1970 of its last change: grows strictly with every change."""
    return (record.updated_at - _EPOCH) // _MICROSECOND


def last_event_id(request: Request) -> int | None:
    """The version in `Last-Event-ID`, None where there is none or it is none of ours."""
    text = request.headers.get("last-event-id", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _ID_DIGITS_MAX else None


class EventStream:
    """`view` makes an event's data of a record."""

    def __init__(
        self, services: Services, view: Callable[[JobRecord], BaseModel], *, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._services = services
        self._view = view
        self._heartbeat_s = heartbeat_s

    def response(self, record: JobRecord, seen: int | None) -> StreamingResponse:
        # An intermediary that stores or collects the stream would hold its events back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(self.events(record, seen), media_type="text/event-stream", headers=headers)

    async def events(self, record: JobRecord, seen: int | None) -> AsyncIterator[str]:
        """From `record` on, or from behind the version `seen`, until a final state was sent.

        A comment every `heartbeat_s` keeps the connection. Where the records cannot be reached, an `error` event ends
        the stream; the client then reconnects with the last id.
        """
        yield f"retry: {RECONNECT_MS}\n\n"
        state: JobState | None = None
        if seen is None or version_of(record) > seen:
            yield self._event(record, state)
            state = record.state
        since = record.updated_at
        while not record.state.is_terminal:
            try:
                record = await self._services.jobs.wait(
                    record.id, tenant=record.tenant, timeout_s=self._heartbeat_s, until="change", since=since
                )
            except JobError as error:
                yield f"event: error\ndata: {json.dumps(problem_head(describe(error)))}\n\n"
                return
            if record.updated_at > since:
                yield self._event(record, state)
                state, since = record.state, record.updated_at
            else:
                yield ": heartbeat\n\n"

    def _event(self, record: JobRecord, before: JobState | None) -> str:
        name = "progress" if record.state is before else "state"
        return f"id: {version_of(record)}\nevent: {name}\ndata: {self._view(record).model_dump_json()}\n\n"
