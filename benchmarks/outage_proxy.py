"""The fault proxy of `outage.py`, in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

from storage.fault_proxy import Fault, FaultProxy

REFUSED = "refused"
SLOW_S = 3.0


class ProxyProcess:
    """Told what to do over a pipe."""

    def __init__(self, target_url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(target_url, theirs), daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}"

    def tell(self, fault: str | Fault | None, share: float = 1.0) -> int:
        """From now on a `share` of the requests meets `fault`. Returns how many came since the last order."""
        self._pipe.send((fault, share))
        came: int = self._pipe.recv()
        return came

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def _run(target_url: str, pipe: Connection) -> None:
    asyncio.run(_obey(target_url, pipe))


async def _obey(target_url: str, pipe: Connection) -> None:
    proxy = FaultProxy(target_url, slow_s=SLOW_S)
    await proxy.start()
    pipe.send(proxy.port)
    listening = True
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        fault, share = order
        if fault == REFUSED:
            await proxy.stop()
            listening = False
        else:
            if not listening:
                await proxy.start()
                listening = True
            proxy.randomly(fault, share)
        came = sum(proxy.requests.values())
        proxy.requests.clear()
        proxy.recorded.clear()
        pipe.send(came)
    await proxy.stop()
