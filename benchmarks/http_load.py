"""Load on an HTTP server: one request at a time for its latency, many at a time for its throughput."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np

Send = Callable[[aiohttp.ClientSession], Awaitable[None]]


@dataclass(frozen=True)
class Load:
    """Latencies in ms at one request at a time; requests per second at `connections` at a time.

    `spread` is the throughput's standard deviation over its rounds, relative to their mean.
    """

    p50_ms: float
    p99_ms: float
    rps: float
    spread: float
    connections: int
    requests: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def request(method: str, url: str, *, key: str | None = None, body: Any = None) -> Send:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def send(session: aiohttp.ClientSession) -> None:
        async with session.request(method, url, headers=headers, json=body) as reply:
            text = await reply.read()
            if reply.status >= 300:
                raise RuntimeError(f"{method} {url} answered {reply.status}: {text[:200]!r}")

    return send


async def measured(send: Send, *, single: int, connections: int, round_s: float, rounds: int) -> Load:
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector) as session:
        for _ in range(max(20, single // 10)):
            await send(session)
        latencies = [await _timed(send, session) for _ in range(single)]
        rates = [await _rate(send, session, connections, round_s) for _ in range(rounds)]
    p50, p99 = np.percentile(latencies, [50, 99])
    spread = float(np.std(rates) / np.mean(rates))
    return Load(round(p50, 3), round(p99, 3), round(float(np.mean(rates)), 1), round(spread, 3), connections, single)


async def _timed(send: Send, session: aiohttp.ClientSession) -> float:
    began = time.perf_counter()
    await send(session)
    return (time.perf_counter() - began) * 1000


async def _rate(send: Send, session: aiohttp.ClientSession, connections: int, seconds: float) -> float:
    began = time.perf_counter()

    async def repeat() -> int:
        sent = 0
        while time.perf_counter() - began < seconds:
            await send(session)
            sent += 1
        return sent

    sent = sum(await asyncio.gather(*(repeat() for _ in range(connections))))
    return sent / (time.perf_counter() - began)
