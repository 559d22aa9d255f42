from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest
import torch

from diffusion.errors import LoraInvalid, ModelNotFound, OutOfGpuMemory, SizeNotSupported, UnsupportedModel
from storage.datasets import DatasetNotFound as StoredDatasetNotFound
from storage.errors import StorageTimeout
from train_jobs import errors
from train_jobs.failures import as_training_error, find_training_error

EXAMPLES: dict[type[errors.TrainingError], errors.TrainingError] = {
    type(example): example
    for example in (
        errors.TrainingError(),
        errors.ConfigInvalid([errors.Problem("a.b", "is wrong", "invalid_value")]),
        errors.DatasetNotFound("cats"),
        errors.DatasetEmpty("cats"),
        errors.ImageUnreadable(["a.png", "b.png"]),
        errors.ModelNotAvailable("tiny"),
        errors.NonFiniteLoss(12, ["a.png"]),
        errors.OutOfMemory(),
        errors.CheckpointInvalid("it is damaged"),
        errors.TrainingCancelled(),
        errors.TrainingTimedOut(),
        errors.TrainingInterrupted(),
        errors.StorageFailed("storage_timeout"),
    )
}


def _tree(root: type[errors.TrainingError] = errors.TrainingError) -> Iterator[type[errors.TrainingError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


@pytest.mark.parametrize("kind", list(_tree()))
def test_every_error_survives_pickling(kind: type[errors.TrainingError]) -> None:
    error = EXAMPLES[kind]
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is kind
    assert str(copy) == str(error) == error.public_message
    assert vars(copy) == vars(error)


def test_every_code_is_its_own() -> None:
    codes = [kind.code for kind in _tree()]
    assert len(set(codes)) == len(codes)


def test_a_long_list_of_names_is_cut() -> None:
    message = errors.ImageUnreadable([f"{i}.png" for i in range(15)]).public_message
    assert "9.png and 5 more" in message
    assert "10.png" not in message


def test_a_long_list_of_problems_is_cut() -> None:
    problems = [errors.Problem(f"p{i}", "is wrong", "invalid_value") for i in range(12)]
    assert errors.ConfigInvalid(problems).public_message.endswith("and 2 more")


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        (StoredDatasetNotFound("cats"), errors.DatasetNotFound),
        (StorageTimeout("get", 1.0), errors.StorageFailed),
        (torch.OutOfMemoryError("of a device"), errors.OutOfMemory),
        (OutOfGpuMemory(1, 8, 8, None, None), errors.OutOfMemory),
        (MemoryError(), errors.OutOfMemory),
        (ModelNotFound("unet"), errors.ModelNotAvailable),
        (UnsupportedModel("a path"), errors.ModelNotAvailable),
        (SizeNotSupported(3, 3, 8), errors.ConfigInvalid),
        (LoraInvalid("not one"), errors.ConfigInvalid),
        (errors.DatasetEmpty("cats"), errors.DatasetEmpty),
    ],
)
def test_a_foreign_error_becomes_one_of_ours(foreign: Exception, expected: type[errors.TrainingError]) -> None:
    assert type(as_training_error(foreign, model="tiny")) is expected


def test_a_machine_that_has_not_the_memory_says_what_to_change() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    found = as_training_error(caught.value)
    assert isinstance(found, errors.OutOfMemory)
    assert "batch size" in found.public_message
    assert as_training_error(RuntimeError("shapes cannot be multiplied")) is None


def test_an_unknown_error_is_not_given_a_meaning() -> None:
    assert as_training_error(ZeroDivisionError()) is None


def test_the_known_error_among_the_workers_is_found() -> None:
    class Wrapped(Exception):
        _base_exc = errors.DatasetEmpty("cats")

    found = find_training_error([ZeroDivisionError(), Wrapped()])
    assert isinstance(found, errors.DatasetEmpty)
