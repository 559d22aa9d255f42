"""Where a server could listen, and how it is then reached."""

from __future__ import annotations

import socket

import pytest

from storage.listening import Obstacle, free_port, is_loopback, obstacle_to, url_of
from tests.addresses import needs_ipv6

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 only named


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=needs_ipv6)])
def test_a_port_is_taken_on_the_address_that_was_asked_for(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as server:
        server.bind((host, 0))
        server.listen()
        assert obstacle_to(host, server.getsockname()[1]) is Obstacle.TAKEN
    assert obstacle_to(host, free_port(host)) is None


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.9", "fe80::dead", "127.0.0.1.1"])
def test_an_address_of_another_machine_is_not_taken_for_a_busy_port(host: str) -> None:
    assert obstacle_to(host, 0) is Obstacle.ADDRESS


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        (EVERY_ADDRESS, "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.0.0.7", "http://10.0.0.7:80"),
    ],
)
def test_a_url_can_be_used_on_this_machine(host: str, url: str) -> None:
    assert url_of(host, 80) == url


@pytest.mark.parametrize(
    ("host", "near"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True), (EVERY_ADDRESS, True), ("::", True),
     ("10.0.0.7", False), ("fd00::1", False), ("node-0", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches_is_known(host: str, near: bool) -> None:
    assert is_loopback(host) is near
