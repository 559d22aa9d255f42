"""The Serve application of an instance: alone in its own Ray, or beside others' in a cluster that it joined."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve.context import _get_global_client

from serve_app.app import APPLICATION, build
from serve_app.ingress.middleware import PROXY_ENVIRONMENT, REQUEST_ID_HEADER
from serve_app.settings import Settings
from serve_app.shutdown import application_s
from serve_app.stack.checks import check_port
from serve_app.stack.errors import ProxyUnguarded, RouteTaken, ServeElsewhere
from serve_app.stack.haproxy import LOOPBACK
from storage.listening import url_of

logger = logging.getLogger(__name__)

ROUTE = "/"
# What EdgeHeaders replaces and Serve's proxy by itself repeats.
NO_REQUEST_ID = "?"
PROXY_PATH = "/-/healthz"
PROXY_WITHIN_S = 10.0
POLL_S = 0.2


class Serving:
    """`doors` is the folder of `serve_app.stack.haproxy`, where that is used. With `shared`, Serve may run already and
    have applications of others, which stay as they are."""

    def __init__(self, settings: Settings, *, doors: Path | None, shared: bool) -> None:
        self._settings = settings
        self._doors = doors
        self._shared = shared
        self._is_ours = not shared
        self._began = False

    def start(self) -> None:
        """Return when the application runs. Raises InstanceError; `stop` is to follow in any case."""
        settings = self._settings
        if self._shared:
            self._prepare_shared()
        # HAProxy alone listens on the host; what Serve opens for it need not be reached from elsewhere.
        host = settings.host if self._doors is None else LOOPBACK
        # Nodes that somebody else started need not have the variable in their environment; the proxies take it from
        # the controller.
        options = {"runtime_env": {"env_vars": PROXY_ENVIRONMENT}} if self._shared and self._is_ours else None
        self._began = True
        serve.start(http_options={"host": host, "port": settings.port}, controller_options=options)
        serve.run(build(settings, doors=self._doors), name=APPLICATION, route_prefix=ROUTE, blocking=False)
        if self._shared:
            _check_proxy(url_of(settings.host, settings.port))

    def stop(self) -> None:
        """End the application, and Serve where nobody else uses what this instance started."""
        if not self._began or not _serve_runs():
            return
        # Not by `serve.shutdown` alone, which gives up after 30 s, whatever the application may take.
        serve.delete(APPLICATION, _blocking=False)
        if not _wait_until_deleted(application_s(self._settings.drain_s)):
            logger.warning("the application did not end in time")
        others = _others(_details())
        if self._is_ours and (not self._shared or not others):
            serve.shutdown()
        elif others:
            logger.info("Serve stays for %s", ", ".join(sorted(others)))

    def _prepare_shared(self) -> None:
        """Refuse what would not work beside others. Raises ServeElsewhere, RouteTaken, PortTaken, AddressUnusable."""
        settings = self._settings
        if _serve_runs():
            details = _details()
            if APPLICATION in details["applications"] and not _others(details):
                logger.warning("ending Serve, which an earlier run of an instance left behind")
                serve.shutdown()
            else:
                _check_beside(details, settings)
                return
        self._is_ours = True
        check_port(settings.port, "RAYLORA_PORT", settings.host, "RAYLORA_HOST")


def _check_beside(details: Mapping[str, Any], settings: Settings) -> None:
    found = details["http_options"]
    if (found["host"], found["port"]) != (settings.host, settings.port):
        raise ServeElsewhere(found["host"], found["port"])
    for name, application in _others(details).items():
        if application["route_prefix"] == ROUTE:
            raise RouteTaken(name)


def _check_proxy(url: str) -> None:
    """Whether the proxy of this node strips what no client may set. Raises ProxyUnguarded."""
    try:
        answer = httpx.get(f"{url}{PROXY_PATH}", headers={REQUEST_ID_HEADER: NO_REQUEST_ID}, timeout=PROXY_WITHIN_S)
    except httpx.TransportError as error:
        # Serve has proxies on nodes with replicas only.
        logger.info("this node's proxy was not checked (%s)", type(error).__name__)
        return
    if answer.headers.get(REQUEST_ID_HEADER) == NO_REQUEST_ID:
        raise ProxyUnguarded(*next(iter(PROXY_ENVIRONMENT.items())))


def _serve_runs() -> bool:
    return _get_global_client(raise_if_no_controller_running=False) is not None


def _details() -> dict[str, Any]:
    client = _get_global_client(raise_if_no_controller_running=False)
    return {"applications": {}} if client is None else client.get_serve_details()


def _others(details: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in details["applications"].items() if name != APPLICATION}


def _wait_until_deleted(timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while APPLICATION in serve.status().applications:
        if time.monotonic() >= until:
            return False
        time.sleep(POLL_S)
    return True
