"""Single rows of the job records in SQLite, past SQLAlchemy: making a result of one row costs it several times as much
as the database needs to find it.

The statements and the conversion of values are still SQLAlchemy's own, of the same tables.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from storage.errors import RecordsFailed, RecordsUnavailable
from storage.job_record import JobRecord
from storage.records_tables import NOT_OF_RECORDS, jobs

_DIALECT = sqlite.dialect(paramstyle="named")
_FIELDS = tuple(column for column in jobs.columns if column.name not in NOT_OF_RECORDS)

Convert = Callable[[Any], Any]


def _selecting(*wanted: sa.ColumnElement[bool]) -> str:
    return str(sa.select(*_FIELDS).where(*wanted).compile(dialect=_DIALECT))


def _converting(column: sa.Column[Any]) -> Convert | None:
    kind = column.type.dialect_impl(_DIALECT)
    return kind.result_processor(_DIALECT, None)


_BY_ID = _selecting(jobs.c.id == sa.bindparam("job_id"))
_BY_RUNPOD_ID = _selecting(jobs.c.tenant == sa.bindparam("tenant_name"), jobs.c.runpod_id == sa.bindparam("known_as"))
_CONVERSIONS = tuple((column.name, _converting(column)) for column in _FIELDS)


class RowLookups:
    """Belongs to one thread. Each statement sees what was committed before it and waits for no lock.

    `read` names what is asked, as `Records.read` does; within it, raises RecordsUnavailable where it would have to
    wait, and RecordsFailed for every other error of the database.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._connection: sqlite3.Connection | None = None
        self._operation = ""

    def read(self, operation: str) -> Self:
        self._operation = operation
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not isinstance(error, sqlite3.Error):
            return
        # What it is in is not known; the next one opens the database anew.
        self.close()
        if isinstance(error, (sqlite3.OperationalError, sqlite3.InterfaceError)):
            raise RecordsUnavailable(self._operation) from error
        raise RecordsFailed(self._operation, type(error).__name__) from error

    def get(self, job_id: str) -> JobRecord | None:
        return self._one(_BY_ID, {"job_id": job_id})

    def by_runpod_id(self, tenant: str, runpod_id: str) -> JobRecord | None:
        return self._one(_BY_RUNPOD_ID, {"tenant_name": tenant, "known_as": runpod_id})

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _one(self, statement: str, values: Mapping[str, Any]) -> JobRecord | None:
        if self._connection is None:
            self._connection = self._opened()
        # Reads to the end of the result: a statement that is not at its end keeps its view of the database open.
        rows = self._connection.execute(statement, values).fetchall()
        if not rows:
            return None
        fields = {
            name: value if convert is None or value is None else convert(value)
            for (name, convert), value in zip(_CONVERSIONS, rows[0], strict=True)
        }
        return JobRecord.model_validate(fields)

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(self._file))}?mode=rw", uri=True, isolation_level=None, timeout=0.0
        )
        connection.execute("PRAGMA query_only=ON").close()
        return connection
