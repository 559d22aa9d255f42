from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator

import pytest

from storage.errors import StorageError

SAMPLES = {
    "str": "a/secret/key",
    "int": 3,
    "float": 2.5,
    "float | None": None,
    "Any": "x",
    "tuple[tuple[str, str], ...]": (("a.png", "storage_timeout"),),
}


def every_error(root: type[StorageError]) -> Iterator[type[StorageError]]:
    yield root
    for child in root.__subclasses__():
        yield from every_error(child)


def sample(error: type[StorageError]) -> StorageError:
    parameters = inspect.signature(error).parameters.values()
    wanted = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return error(*(SAMPLES[p.annotation] for p in wanted))


@pytest.mark.parametrize("error", list(every_error(StorageError)))
def test_every_error_survives_pickle_with_its_attributes(error: type[StorageError]) -> None:
    original = sample(error)

    copy = pickle.loads(pickle.dumps(original))  # noqa: S301

    assert type(copy) is error
    assert str(copy) == str(original)
    assert vars(copy) == vars(original)


@pytest.mark.parametrize("error", [e for e in every_error(StorageError) if "key" in inspect.signature(e).parameters])
def test_a_message_does_not_give_the_key_away(error: type[StorageError]) -> None:
    arguments = {name: "a/secret/key" if name == "key" else "a word" for name in inspect.signature(error).parameters}

    original = error(**arguments)

    assert "secret" not in str(original)
    assert "secret" not in repr(original)


def test_codes_are_unique() -> None:
    # Other tests in this process define subclasses of their own.
    codes = [error.code for error in every_error(StorageError) if error.__module__.startswith("storage.")]

    assert len(codes) == len(set(codes))
