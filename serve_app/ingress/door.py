"""The ingress replica's own HTTP server, for HAProxy alone: a Unix socket past Serve's handling of each request.

Serve's part of a request (its log line, metrics, tasks and contexts) costs more than this application's. What of it is
needed here is done for less: a request ends when its client has gone, more than `places` at once are refused, and each
is told to `serve_app.ingress.request_log`. Starting, health and draining stay Serve's.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ServiceUnavailable
from serve_app.ingress.middleware import log_unexpected
from serve_app.ingress.replies import error_response
from serve_app.ingress.request_log import Logged, RequestLog, RouteTemplates
from storage.own_sockets import is_own, listen_at, remove_abandoned

logger = logging.getLogger(__name__)

PATIENCE_S = 1.0
# Longer than HAProxy keeps a connection that nobody uses: were it closed here, a request might be on its way to it.
KEEP_ALIVE_S = 3600
BACKLOG = 2048


class Door:
    """Serves one application on one socket, which only this user may open."""

    def __init__(self, path: Path, *, places: int, drain_s: float, log: RequestLog) -> None:
        """`places`: requests at a time. `drain_s`: what requests under way may still take when the door closes."""
        self._path = path
        self._log = log
        self._logging: asyncio.Task[None] | None = None
        self._places = places
        self._drain_s = drain_s
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it, or its log, ended without having been closed."""
        return any(task is not None and task.done() for task in (self._serving, self._logging))

    async def open(self, app: ASGIApp, routes: Sequence[BaseRoute] = ()) -> None:
        """Connections are taken from now on, where there is the folder: a node without it has no HAProxy.

        `routes` are the application's, by which its requests are told apart.

        Raises PermissionError where others can enter the folder, OSError where the socket cannot be made.
        """
        listening = await asyncio.to_thread(self._listen)
        if listening is None:
            logger.warning("this replica is on another node than HAProxy, which sends it nothing")
            return
        config = uvicorn.Config(
            Logged(WhileWanted(Places(app, self._places)), self._log, RouteTemplates(routes)),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            # Serve's own server sets the same for the process. What escapes the application is logged by WhileWanted.
            log_level=logging.CRITICAL,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, round(self._drain_s)),
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
        )
        config.load()
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        self._logging = asyncio.create_task(self._log.run())

    async def close(self) -> None:
        """Refuse new connections, and let the requests under way end within `drain_s`."""
        if self._server is None or self._serving is None or self._logging is None:
            return
        (serving, self._serving), (logging_, self._logging) = (self._serving, None), (self._logging, None)
        self._server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        self._path.unlink(missing_ok=True)
        logging_.cancel()
        await asyncio.gather(logging_, return_exceptions=True)
        await self._log.close()

    def _listen(self) -> socket.socket | None:
        folder = self._path.parent
        try:
            if not is_own(folder):
                raise PermissionError(f"{folder} is open to other users")
        except FileNotFoundError:
            return None
        remove_abandoned(folder, self._path.suffix)
        return listen_at(self._path, BACKLOG)


class WhileWanted:
    """Cancels a request whose client has gone, once it has taken `patience_s`: before that it is as good as done.

    A client that goes away is only seen by reading on, and the application reads no further than the body, or not at
    all. Where it is the server that ends, the client is told so.
    """

    def __init__(self, app: ASGIApp, patience_s: float = PATIENCE_S) -> None:
        self._app = app
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        exchange = _Exchange(receive, send)
        watching: asyncio.Task[None] | None = None
        gone = False

        async def watch() -> None:
            nonlocal gone
            await exchange.client_has_gone()
            gone = True
            if request is not None:
                request.cancel()

        def begin() -> None:
            nonlocal watching
            watching = loop.create_task(watch())

        request = asyncio.current_task()
        timer = loop.call_later(self._patience_s, begin)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # Nothing stands in front of this but the server, which ends its connections next.
            if not gone and not exchange.is_begun:
                await _unavailable(scope, receive, send)
        except Exception as error:
            log_unexpected(error, "")
            raise
        finally:
            timer.cancel()
            if watching is not None:
                watching.cancel()


class _Exchange:
    """One request's messages, for the application and for whoever waits for its client to go away."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._reading = asyncio.Lock()
        self._held: Message | None = None
        self._is_read = False
        self._has_body = asyncio.Event()
        self.is_begun = self._is_ended = False

    async def receive(self) -> Message:
        if self._has_body.is_set() and self._held is None:
            return await self._receive()
        async with self._reading:
            if self._held is None:
                return await self._next()
            held, self._held = self._held, None
            return held

    async def send(self, message: Message) -> None:
        self.is_begun = True
        self._is_ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def client_has_gone(self) -> None:
        """Returns when it has, not where the reply has ended before."""
        async with self._reading:
            if not self._is_read:
                # One message is held for an application that has not asked for any. More would fill the memory.
                self._held = await self._next()
        await self._has_body.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._is_ended:
            await asyncio.Event().wait()

    async def _next(self) -> Message:
        message = await self._receive()
        self._is_read = True
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._has_body.set()
        return message


class Places:
    """Refuses what is more than `places` requests at a time."""

    def __init__(self, app: ASGIApp, places: int) -> None:
        self._app = app
        self._left = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._left <= 0:
            await _unavailable(scope, receive, send)
            return
        self._left -= 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._left += 1


async def _unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(ServiceUnavailable("ingress"), path=scope["path"], request_id="")(scope, receive, send)
