"""A TCP proxy that delivers what clients send some milliseconds late; runs until its standard input closes.

    python benchmarks/latency_proxy.py --target-port 9000 --latency-ms 30 --mb-per-s 200

Prints the port it listens on. Bytes are delayed one way, so every request takes that much longer. `--mb-per-s` bounds
what each connection brings back; without it the bandwidth stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections import deque


class Delayed(asyncio.Protocol):
    """One direction of a connection: what arrives here is written to `peer`, `delay_s` later."""

    def __init__(self, delay_s: float, bytes_per_s: float = math.inf) -> None:
        self.delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._free_at = 0.0
        self.peer: Delayed | None = None
        self.transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[float, bytes | None]] = deque()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._later(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._later(None)

    def _later(self, data: bytes | None) -> None:
        due = max(self._loop.time() + self.delay_s, self._free_at)
        if data is not None:
            due += len(data) / self._bytes_per_s
            self._free_at = due
        self._waiting.append((due, data))
        if self.delay_s == 0 or len(self._waiting) == 1:
            self._loop.call_at(due, self._deliver)

    def _deliver(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._loop.time() + 1e-4:
            _, data = self._waiting.popleft()
            if self.peer is None or self.peer.transport is None:
                continue
            if data is None:
                self.peer.transport.close()
            else:
                self.peer.transport.write(data)
        if self._waiting:
            self._loop.call_at(self._waiting[0][0], self._deliver)


class Entrance(Delayed):
    """A client's connection, which opens one of its own to the server."""

    def __init__(self, target_port: int, delay_s: float, bytes_per_s: float) -> None:
        super().__init__(delay_s)
        self._target_port, self._back_bytes_per_s = target_port, bytes_per_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.pause_reading()
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        _, back = await self._loop.create_connection(
            lambda: Delayed(0.0, self._back_bytes_per_s), "127.0.0.1", self._target_port
        )
        back.peer, self.peer = self, back
        assert self.transport is not None
        self.transport.resume_reading()


async def serve(target_port: int, delay_s: float, bytes_per_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Entrance(target_port, delay_s, bytes_per_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target-port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, required=True)
    parser.add_argument("--mb-per-s", type=float, default=math.inf, help="of what comes back")
    options = parser.parse_args()
    asyncio.run(serve(options.target_port, options.latency_ms / 1000, options.mb_per_s * 1e6))


if __name__ == "__main__":
    main()
