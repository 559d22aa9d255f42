"""What keeps an instance from working beside others in a cluster; tests/integration has a real one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.settings import Settings
from serve_app.stack.errors import ProxyUnguarded, RouteTaken, ServeElsewhere, StorageNotShared
from serve_app.stack.instance import Instance
from serve_app.stack.ports import any_free
from serve_app.stack.serving import _check_beside, _check_proxy
from serve_app.stack.supervisor import Supervisor


def serve_of_others(*, host: str = "127.0.0.1", port: int = 8000, **routes: str) -> dict[str, Any]:
    applications = {name: {"route_prefix": route} for name, route in routes.items()}
    return {"http_options": {"host": host, "port": port}, "applications": applications}


def test_others_may_have_paths_of_their_own_and_an_older_run_of_ours_may_have_ours() -> None:
    _check_beside(serve_of_others(neighbour="/neighbour", raylora="/"), Settings())


def test_another_application_at_every_path_is_named() -> None:
    with pytest.raises(RouteTaken, match="'neighbour'"):
        _check_beside(serve_of_others(neighbour="/"), Settings())


@pytest.mark.parametrize("where", [{"port": 8001}, {"host": "0.0.0.0"}])  # noqa: S104 only named
def test_a_port_that_would_not_be_the_one_asked_for_is_told(where: dict[str, Any]) -> None:
    with pytest.raises(ServeElsewhere, match="RAYLORA_HOST and RAYLORA_PORT"):
        _check_beside(serve_of_others(**where), Settings())


@contextmanager
def proxy(*, repeats: bool) -> Iterator[str]:
    """Answers with the request's id, or with one of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("X-Request-ID", self.headers["x-request-id"] if repeats else "0123")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not among the test's output."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_proxy_that_hands_on_what_it_should_strip_is_refused() -> None:
    with proxy(repeats=True) as url, pytest.raises(ProxyUnguarded, match="RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH="):
        _check_proxy(url)
    with proxy(repeats=False) as url:
        _check_proxy(url)


def test_a_node_without_a_proxy_has_none_to_check() -> None:
    _check_proxy(f"http://127.0.0.1:{any_free()}")


@pytest.mark.parametrize(("host", "nodes", "refused"), [("127.0.0.1", 2, True), ("127.0.0.1", 1, False)])
def test_storage_on_loopback_is_refused_where_other_nodes_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, nodes: int, refused: bool
) -> None:
    class Joined(Exception):
        """All that comes before it was well."""

    def join(home: str) -> None:
        raise Joined

    monkeypatch.setattr("ray.init", lambda **_: SimpleNamespace(dashboard_url=""))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr("cluster.membership.nodes_alive", lambda: nodes)
    monkeypatch.setattr("cluster.membership.Membership.join", join)
    settings = Settings(home=tmp_path, s3_host=host, ray_address="10.0.0.1:6379")
    supervisor = Supervisor(settings, Instance(tmp_path))
    supervisor._start_storage()
    try:
        with pytest.raises(StorageNotShared if refused else Joined):
            supervisor._start_ray()
    finally:
        supervisor._stop()
