import inspect
import pickle
from collections.abc import Iterator

import pytest
import sqlalchemy.exc as sa_exc

from storage.errors import (
    JobError,
    RecordConflict,
    RecordsError,
    RecordsFailed,
    RecordsMisconfigured,
    RecordsUnavailable,
)
from storage.records_engine import map_error


def _tree(root: type[JobError]) -> Iterator[type[JobError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def _sample(cls: type[JobError]) -> JobError:
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return cls(*[f"text-{parameter.name}" for parameter in parameters])


@pytest.mark.parametrize("cls", sorted(set(_tree(JobError)), key=lambda cls: cls.__name__))
def test_every_job_error_survives_pickle_with_its_attributes(cls: type[JobError]):
    error = _sample(cls)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def test_codes_are_unique_and_stable_words():
    codes = [cls.code for cls in set(_tree(JobError))]
    assert len(set(codes)) == len(codes)
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


MAPPED = {
    "IntegrityError": RecordConflict,
    "ArgumentError": RecordsMisconfigured,
    "NoSuchModuleError": RecordsMisconfigured,
    "OperationalError": RecordsUnavailable,
    "InterfaceError": RecordsUnavailable,
    "TimeoutError": RecordsUnavailable,
    "DisconnectionError": RecordsUnavailable,
    "InvalidatePoolError": RecordsUnavailable,
}


def _all_sqlalchemy_errors() -> list[type[sa_exc.SQLAlchemyError]]:
    members = vars(sa_exc).values()
    return [cls for cls in members if isinstance(cls, type) and issubclass(cls, sa_exc.SQLAlchemyError)]


@pytest.mark.parametrize("cls", _all_sqlalchemy_errors())
def test_every_error_of_the_library_is_mapped_and_its_text_stays_behind(cls: type[sa_exc.SQLAlchemyError]):
    foreign = cls.__new__(cls)
    foreign.args = ("SELECT secret",)
    mapped = map_error(foreign, "create")
    assert isinstance(mapped, RecordsError)
    if not issubclass(cls, sa_exc.ArgumentError):
        assert type(mapped) is MAPPED.get(cls.__name__, RecordsFailed)
    assert "secret" not in str(mapped)
