"""What is told of each request at the door, which Serve's access log and request metrics never see.

A line of JSON in a file beside the replica's own log, where Ray's dashboard shows it, and metrics that every node
exports to Prometheus. Lines and values are collected and handed on every `FLUSH_S`, in slices that hold up no request;
a replica that is killed takes up to that much of its lines with it. A path is told by its route's template, never
itself, and nothing is told of keys, queries and bodies.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NamedTuple, Protocol

from fastapi.routing import iter_route_contexts
from ray.util import metrics
from starlette.routing import BaseRoute, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.ingress.middleware import NOTE, SLASHES, RequestNote

FLUSH_S = 1.0
SLICE = 64
FILE_BYTES_MAX = 64 * 2**20
FILES_KEPT = 3
# Beyond these nobody looks for a difference, and a client could otherwise make new series without end.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "OTHER"
UNROUTED = "unrouted"
CLIENT_GONE = 499
"""nginx's status for a client that went away before its reply."""
FAILED = 500
LATENCY_BOUNDARIES_MS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000)


class Ended(NamedTuple):
    """A request that was answered, or whose client has gone. `at_s` is its end, in Unix time."""

    at_s: float
    method: str
    route: str
    status: int
    latency_ms: float
    request_id: str
    tenant: str | None

    @property
    def status_class(self) -> str:
        return f"{self.status // 100}xx"

    def as_line(self) -> str:
        fields = {
            "time": datetime.fromtimestamp(self.at_s, UTC).isoformat(timespec="milliseconds"),
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "latency_ms": round(self.latency_ms, 3),
            "request_id": self.request_id,
            "tenant": self.tenant,
        }
        return json.dumps(fields)


Labels = tuple[str, str, str]
"""Method, route's template and class of the status, such as 2xx."""


class Metrics(Protocol):
    def count(self, labels: Labels, requests: int) -> None: ...
    def observe(self, labels: Labels, latency_ms: float) -> None: ...
    def show_in_flight(self, requests: int) -> None: ...


class RayMetrics:
    """Implements `Metrics` where Ray runs. `replica` tells the in-flight requests of one from others'."""

    def __init__(self, replica: str) -> None:
        names = ("method", "route", "status_class")
        self._names = names
        self._replica = {"replica": replica}
        self._requests = metrics.Counter(
            "raylora_http_requests_total", description="Requests that ended at the door.", tag_keys=names
        )
        self._latency = metrics.Histogram(
            "raylora_http_request_latency_ms",
            description="From a request's arrival at the door to the end of its reply, long polls and streams too.",
            boundaries=list(LATENCY_BOUNDARIES_MS),
            tag_keys=names,
        )
        self._in_flight = metrics.Gauge(
            "raylora_http_requests_in_flight", description="Requests under way at the door.", tag_keys=("replica",)
        )

    def count(self, labels: Labels, requests: int) -> None:
        self._requests.inc(requests, tags=self._tags(labels))

    def observe(self, labels: Labels, latency_ms: float) -> None:
        self._latency.observe(latency_ms, tags=self._tags(labels))

    def show_in_flight(self, requests: int) -> None:
        self._in_flight.set(requests, tags=self._replica)

    def _tags(self, labels: Labels) -> dict[str, str]:
        return dict(zip(self._names, labels, strict=True))


class LineFile:
    """Lines in a file that is begun anew when it has grown; what cannot be written is told on stderr."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = RotatingFileHandler(path, maxBytes=FILE_BYTES_MAX, backupCount=FILES_KEPT, delay=True)

    def write(self, lines: Sequence[str]) -> None:
        """Blocks on the disk."""
        self._handler.handle(logging.makeLogRecord({"msg": "\n".join(lines)}))

    def close(self) -> None:
        self._handler.close()


class RequestLog:
    """Collects the ended requests of one replica. Belongs to one event loop."""

    def __init__(self, file: LineFile, told: Metrics) -> None:
        self._file = file
        self._metrics = told
        self._ended: list[Ended] = []
        self._in_flight = 0
        # A replica that is never seen busy is to be seen idle.
        self._shown: int | None = None
        self._flushing = asyncio.Lock()

    def began(self) -> None:
        self._in_flight += 1

    def ended(self, request: Ended) -> None:
        self._in_flight -= 1
        self._ended.append(request)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            # What is being handed on is handed on to its end; `close` waits for it.
            await asyncio.shield(self.flush())

    async def flush(self) -> None:
        """Hand on what has come together."""
        async with self._flushing:
            self._show_in_flight()
            ended, self._ended = self._ended, []
            for start in range(0, len(ended), SLICE):
                some = ended[start : start + SLICE]
                self._measure(some)
                lines = [request.as_line() for request in some]
                await asyncio.to_thread(self._file.write, lines)

    async def close(self) -> None:
        await self.flush()
        self._file.close()

    def _measure(self, some: Sequence[Ended]) -> None:
        counts: Counter[Labels] = Counter()
        for request in some:
            labels = (request.method, request.route, request.status_class)
            counts[labels] += 1
            self._metrics.observe(labels, request.latency_ms)
        for labels, requests in counts.items():
            self._metrics.count(labels, requests)

    def _show_in_flight(self) -> None:
        if self._in_flight != self._shown:
            self._shown = self._in_flight
            self._metrics.show_in_flight(self._shown)


class RouteTemplates:
    """The templates of an application's routes, in its own order."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        paths = dict.fromkeys(context.path for context in iter_route_contexts(routes))
        compiled = [compile_path(path) for path in paths if path]
        self._known = [(pattern.match, template) for pattern, template, _ in compiled]

    def of(self, path: str) -> str:
        """UNROUTED where no route is at that path, whatever its method."""
        if "//" in path:
            path = SLASHES.sub("/", path)
        return next((template for matches, template in self._known if matches(path)), UNROUTED)


class Logged:
    """Tells `log` of each request, as its client sees it: stands in front of everything that may answer."""

    def __init__(
        self, app: ASGIApp, log: RequestLog, templates: RouteTemplates, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._app = app
        self._log = log
        self._templates = templates
        self._clock_s = clock_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note = RequestNote()
        scope["state"] = {**scope.get("state", {}), NOTE: note}
        status = CLIENT_GONE
        began_s = self._clock_s()
        self._log.began()

        async def noted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted_send)
        except Exception:
            # The server answers for it, where nothing was sent yet.
            status = FAILED
            raise
        finally:
            latency_ms = (self._clock_s() - began_s) * 1000
            method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
            route = self._templates.of(scope["path"])
            self._log.ended(Ended(time.time(), method, route, status, latency_ms, note.request_id, note.tenant))
