"""Opening the database of the job records, and its errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc

from storage.errors import JobError, RecordConflict, RecordsFailed, RecordsMisconfigured, RecordsUnavailable

BUSY_TIMEOUT_S = 30.0
POSTGRES_DRIVER = "postgresql+psycopg"
# Any number that no other program uses in the same database.
WRITERS_LOCK = 0x7261796C
WRITES = "raylora_writes"
"""Execution option of connections that write."""


def map_error(error: sa_exc.SQLAlchemyError, operation: str) -> JobError:
    """The one seam where SQLAlchemy's errors become ours."""
    match error:
        case sa_exc.IntegrityError():
            return RecordConflict(operation)
        case sa_exc.ArgumentError() | sa_exc.NoSuchModuleError():
            return RecordsMisconfigured(type(error).__name__)
        case sa_exc.OperationalError() | sa_exc.InterfaceError() | sa_exc.TimeoutError() | sa_exc.DisconnectionError():
            return RecordsUnavailable(operation)
        case _:
            return RecordsFailed(operation, type(error).__name__)


@contextlib.contextmanager
def mapped_errors(operation: str) -> Iterator[None]:
    """Errors of the database as the class says. Raises JobError."""
    try:
        yield
    except sa_exc.SQLAlchemyError as error:
        raise map_error(error, operation) from error


def open_engine(url: str, *, read_only: bool) -> sa.Engine:
    """Raises RecordsMisconfigured for a URL that is not of a database for this, RecordsUnavailable."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return _open_postgres(parsed)
    if parsed.get_backend_name() != "sqlite":
        raise RecordsMisconfigured("the records are kept in SQLite or PostgreSQL")
    if not parsed.database or parsed.database == ":memory:":
        raise RecordsMisconfigured("an SQLite database needs a file, or its records end with the process")
    if not read_only:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    elif not Path(parsed.database).is_file():
        # SQLite would make an empty one.
        raise RecordsUnavailable("open")
    engine = sa.create_engine(parsed, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite_reader if read_only else _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _open_postgres(url: sa.URL) -> sa.Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername=POSTGRES_DRIVER)
    try:
        engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=True)
    except ModuleNotFoundError:
        raise RecordsMisconfigured("the driver of PostgreSQL is not installed: raylora[postgres]") from None
    sa.event.listen(engine, "begin", _begin_postgres)
    return engine


def _begin_postgres(connection: sa.Connection) -> None:
    # One writer at a time, as with SQLite: what a transaction looked at first is still so when it writes.
    if connection.get_execution_options().get(WRITES):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_TIMEOUT_S:.0f}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS_LOCK}, hashtext(current_schema()))")


def _prepare_sqlite(connection: Any, _: object) -> None:
    # The driver would otherwise begin transactions by itself, deferred, and fail at the upgrade to a write lock.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _prepare_sqlite_reader(connection: Any, _: object) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA query_only=ON").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql(f"BEGIN {'IMMEDIATE' if writes else 'DEFERRED'}")
