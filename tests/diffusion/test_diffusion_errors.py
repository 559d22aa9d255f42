from __future__ import annotations

import pickle
from typing import Any

import pytest

from diffusion.errors import (
    Cancelled,
    DiffusionError,
    InsufficientMemory,
    LoraInvalid,
    LoraMismatch,
    ModelNotFound,
    OutOfGpuMemory,
    SettingNotSupported,
    SizeNotSupported,
    UnsupportedModel,
)

ARGUMENTS: dict[type[DiffusionError], tuple[Any, ...]] = {
    ModelNotFound: ("unet",),
    UnsupportedModel: ("reason",),
    LoraInvalid: ("reason",),
    LoraMismatch: ("reason",),
    SizeNotSupported: (60, 64, 8),
    SettingNotSupported: ("steps", "reason"),
    Cancelled: (3, 30),
    OutOfGpuMemory: (4, 1024, 768, 3 * 2**20, 24 * 2**30),
    InsufficientMemory: (8 * 2**30, 3 * 2**20),
}


def test_every_error_is_in_the_table() -> None:
    assert set(ARGUMENTS) == set(DiffusionError.__subclasses__())


@pytest.mark.parametrize("error", list(ARGUMENTS))
def test_an_error_survives_pickle_with_its_fields(error: type[DiffusionError]) -> None:
    first = error(*ARGUMENTS[error])
    again = pickle.loads(pickle.dumps(first))  # noqa: S301 - our own bytes
    assert type(again) is error
    assert (str(again), again.args, vars(again)) == (str(first), first.args, vars(first))


def test_codes_are_distinct() -> None:
    assert len({error.code for error in ARGUMENTS} | {DiffusionError.code}) == len(ARGUMENTS) + 1


def test_memory_is_told_in_mebibytes_where_the_device_knows_it() -> None:
    assert "3 MiB free of 24576 MiB" in str(OutOfGpuMemory(*ARGUMENTS[OutOfGpuMemory]))
    assert str(OutOfGpuMemory(1, 64, 64, None, None)).endswith("1 picture(s) of 64x64 at once")
