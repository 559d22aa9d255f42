"""A proxy in front of a real S3 server that spoils the requests it is told to spoil."""

from __future__ import annotations

import asyncio
import io
from collections import Counter, deque
from enum import Enum, auto

import aiohttp
import yarl
from aiohttp import web

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


class Fault(Enum):
    NONE = auto()
    SLOW_DOWN = auto()
    LOSE_REQUEST = auto()
    LOSE_ANSWER = auto()
    TRUNCATE = auto()
    GARBLE = auto()
    SILENCE = auto()


class FaultProxy:
    """`script` spoils the next requests of a method, in order; `always` all of them."""

    def __init__(self, target_url: str) -> None:
        self.requests: Counter[str] = Counter()
        self.forwarded: Counter[str] = Counter()
        self._target_url = target_url
        self._scripts: dict[str, deque[Fault]] = {}
        self._always: Fault | None = None
        self._released = asyncio.Event()

    def script(self, method: str, *faults: Fault) -> None:
        self._scripts.setdefault(method, deque()).extend(faults)

    def always(self, fault: Fault | None) -> None:
        self._always = fault

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self._released.set()
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.method] += 1
        scripted = self._scripts.get(request.method)
        fault = self._always or (scripted.popleft() if scripted else Fault.NONE)
        body = await request.read()
        if fault is Fault.SILENCE:
            await self._released.wait()
        if fault in {Fault.LOSE_REQUEST, Fault.SILENCE}:
            return self._cut(request)
        if fault is Fault.SLOW_DOWN:
            return web.Response(status=503, body=b"<Error><Code>SlowDown</Code></Error>", content_type="text/xml")
        status, headers, answer = await self._forward(request, body)
        if fault is Fault.LOSE_ANSWER:
            return self._cut(request)
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
            return self._cut(request, response)
        await response.write_eof()
        return response

    def _cut(self, request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return response or web.Response(status=500)
