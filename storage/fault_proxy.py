"""An HTTP proxy for tests and benchmarks: in front of a real S3 server, it spoils requests when told and records all.

Bodies are held in memory. It changes neither paths nor the Host header, so signatures stay good.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum, auto

import aiohttp
import yarl
from aiohttp import web

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
BODY_BYTES_MAX = 2**30
SHUTDOWN_S = 0.1


class Fault(Enum):
    """What happens to a request. Up to GARBLE, it reaches the server."""

    NONE = auto()
    LOSE_ANSWER = auto()
    """The server acts and the connection is cut."""
    SLOW = auto()
    """The server's answer comes `slow_s` late."""
    TRUNCATE = auto()
    """Half of the answer's body comes, then the connection is cut."""
    GARBLE = auto()
    """Other bytes of the right length come."""
    RESET = auto()
    """The connection is cut before the server hears of it."""
    BLACK_HOLE = auto()
    """No answer ever."""
    SLOW_DOWN = auto()
    """503 with S3's code."""
    FORBIDDEN = auto()
    """403 with S3's code."""
    NOT_IMPLEMENTED = auto()
    """501 with S3's code."""


REFUSALS = {
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.FORBIDDEN: (403, "AccessDenied"),
    Fault.NOT_IMPLEMENTED: (501, "NotImplemented"),
}


# By verb, by whether the path names an object, and by what tells calls of the same verb apart.
_METHODS = {
    ("DELETE", "object", ""): "delete_object",
    ("DELETE", "object", "uploadId"): "abort_multipart_upload",
    ("GET", "bucket", "list-type"): "list_objects_v2",
    ("GET", "bucket", "uploads"): "list_multipart_uploads",
    ("GET", "object", ""): "get_object",
    ("HEAD", "bucket", ""): "head_bucket",
    ("HEAD", "object", ""): "head_object",
    ("POST", "bucket", "delete"): "delete_objects",
    ("POST", "object", "uploadId"): "complete_multipart_upload",
    ("POST", "object", "uploads"): "create_multipart_upload",
    ("PUT", "bucket", ""): "create_bucket",
    ("PUT", "object", ""): "put_object",
    ("PUT", "object", "copy"): "copy_object",
    ("PUT", "object", "uploadId"): "upload_part",
}


@dataclass
class Recorded:
    """One request as it came in. `status` None: it has got no answer, or never will."""

    method: str
    path: str
    query: tuple[str, ...]
    user_agent: str
    fault: Fault
    status: int | None = None
    copies: bool = False

    @property
    def is_presigned(self) -> bool:
        return "X-Amz-Signature" in self.query

    @property
    def key(self) -> str:
        """What follows the bucket in the path; "" for calls on the bucket."""
        return self.path.removeprefix("/").partition("/")[2]

    @property
    def s3_method(self) -> str:
        """The client's method that makes such requests, of those in `storage.s3_client.ALLOWED_CALLS`; else ""."""
        operations = (name for name in ("uploads", "uploadId", "list-type", "delete") if name in self.query)
        kind = "copy" if self.copies else next(operations, "")
        return _METHODS.get((self.method, "object" if self.key else "bucket", kind), "")


class FaultProxy:
    """`script` spoils the next requests of a method, in order; `always` all of them; `randomly` a share of them.

    Belongs to the event loop that `start` runs on. `requests` and `forwarded` count by method.
    """

    def __init__(self, target_url: str, *, slow_s: float = 3.0) -> None:
        self.requests: Counter[str] = Counter()
        self.forwarded: Counter[str] = Counter()
        self.recorded: list[Recorded] = []
        self.slow_s = slow_s
        self.port = 0
        self._target_url = target_url
        self._scripts: dict[str, deque[Fault]] = {}
        self._always: Fault | None = None
        self._share = 1.0
        self._random = random.Random(0)
        self._released = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, method: str, *faults: Fault) -> None:
        self._scripts.setdefault(method, deque()).extend(faults)

    def always(self, fault: Fault | None) -> None:
        """Until told otherwise; None ends it, and cuts what hangs in a black hole."""
        self.randomly(fault, 1.0)

    def randomly(self, fault: Fault | None, share: float) -> None:
        """`share` in 0-1 of the requests, by a seeded generator."""
        self._always, self._share = fault, share
        self._released.set()
        self._released = asyncio.Event()

    async def start(self) -> None:
        """Listen on `port`, or on any free one the first time."""
        self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Cut every connection; new ones are refused until `start`."""
        if self._runner is None:
            return
        self._released.set()
        await self._runner.cleanup()
        await self._session.close()
        self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method] += 1
        fault = self._fault(request.method)
        record = _record(request, fault)
        self.recorded.append(record)
        try:
            response = await self._served(request, await request.read(), fault)
        except ConnectionResetError:
            # The client has given up.
            response = None
        if response is None:
            return self._cut(request)
        record.status = response.status
        return response

    def _fault(self, method: str) -> Fault:
        scripted = self._scripts.get(method)
        if self._always is not None and self._random.random() < self._share:
            return self._always
        return scripted.popleft() if scripted else Fault.NONE

    async def _served(self, request: web.Request, body: bytes, fault: Fault) -> web.StreamResponse | None:
        if fault is Fault.BLACK_HOLE:
            await self._released.wait()
        if fault in {Fault.RESET, Fault.BLACK_HOLE}:
            return None
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            return web.Response(status=status, text=f"<Error><Code>{code}</Code></Error>", content_type="text/xml")
        status, headers, answer = await self._forward(request, body)
        if fault is Fault.SLOW:
            await asyncio.sleep(self.slow_s)
        if fault is Fault.LOSE_ANSWER:
            return None
        if fault is Fault.GARBLE:
            answer = bytes(len(answer))
        return await self._answer(request, status, headers, answer, truncated=fault is Fault.TRUNCATE)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self.forwarded[request.method] += 1
        url = yarl.URL(self._target_url + request.raw_path, encoded=True)
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        async with self._session.request(request.method, url, headers=headers, data=io.BytesIO(body)) as answer:
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP]
            return answer.status, kept, await answer.read()

    async def _answer(
        self,
        request: web.Request,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes,
        *,
        truncated: bool,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        response.headers.extend(headers)
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(body[: len(body) // 2] if truncated else body)
        if truncated:
            self._cut(request)
            return response
        await response.write_eof()
        return response

    def _cut(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)


def _record(request: web.Request, fault: Fault) -> Recorded:
    query = tuple(sorted(set(request.query)))
    agent, copies = request.headers.get("User-Agent", ""), "x-amz-copy-source" in request.headers
    return Recorded(request.method, request.path, query, agent, fault, copies=copies)
