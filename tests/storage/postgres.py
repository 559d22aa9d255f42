"""A real PostgreSQL server: the one that RAYLORA_TEST_POSTGRES_URL names, or one on this machine without a password."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

VARIABLE = "RAYLORA_TEST_POSTGRES_URL"
ADDRESS = "127.0.0.1:5432/test"
USERS = ("postgres", "root")
REASON = f"no PostgreSQL server runs here, and {VARIABLE} names none"


@functools.cache
def server() -> str | None:
    """The URL of a database to test in, None where there is no server. One that is named must be there."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        psycopg.connect(named, connect_timeout=5).close()
        return named
    for user in USERS:
        url = f"postgresql://{user}@{ADDRESS}"
        try:
            psycopg.connect(url, connect_timeout=2).close()
        except psycopg.OperationalError:
            continue
        return url
    return None


@contextmanager
def own_schema() -> Iterator[str]:
    """The URL of an empty schema, which is removed at the end of the block."""
    url, name = server(), f"raylora_{secrets.token_hex(6)}"
    assert url is not None
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")  # type: ignore[call-overload]
        try:
            yield f"{url}?options=-csearch_path%3D{name}"
        finally:
            connection.execute(f"DROP SCHEMA {name} CASCADE")  # type: ignore[call-overload]


@contextmanager
def database(kind: str) -> Iterator[str | None]:
    """The URL for `JobsWorld`: None is its own SQLite. Skips the test where it needs a server and none runs."""
    if kind == "sqlite":
        yield None
        return
    if server() is None:
        pytest.skip(REASON)
    with own_schema() as url:
        yield url
