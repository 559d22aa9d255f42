"""The one seam where other packages' errors become ours.

Their text is not passed on: a library's message may hold a path or a URL. It is logged where it is caught.
"""

from __future__ import annotations

import torch

from diffusion.errors import (
    DiffusionError,
    InsufficientMemory,
    ModelNotFound,
    OutOfGpuMemory,
    SizeNotSupported,
    UnsupportedModel,
)
from storage.datasets import DatasetNotFound as StoredDatasetNotFound
from storage.errors import StorageError
from train_jobs.errors import (
    ConfigInvalid,
    DatasetNotFound,
    ModelNotAvailable,
    OutOfMemory,
    Problem,
    StorageFailed,
    TrainingError,
)

CPU_ALLOCATOR = "DefaultCPUAllocator"


def as_training_error(error: BaseException, *, model: str = "") -> TrainingError | None:
    """`error` as one of ours, or None when it is unknown and so a fault of this program.

    `model` is the base model's name as asked for, for the messages about it.
    """
    if isinstance(error, TrainingError):
        return error
    if isinstance(error, StoredDatasetNotFound):
        return DatasetNotFound(error.folder)
    if isinstance(error, StorageError):
        return StorageFailed(error.code)
    if is_out_of_memory(error):
        return OutOfMemory()
    if isinstance(error, ModelNotFound):
        return ModelNotAvailable(model, f"it has no readable {error.part}")
    if isinstance(error, UnsupportedModel):
        return ModelNotAvailable(model, "it is of a kind that is not supported here")
    if isinstance(error, SizeNotSupported):
        return ConfigInvalid([Problem("sample", str(error), "size_not_supported")])
    if isinstance(error, DiffusionError):
        return ConfigInvalid([Problem("", str(error), error.code)])
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of this machine: torch has no class for the latter, only the name of its allocator in the message."""
    if isinstance(error, torch.OutOfMemoryError | OutOfGpuMemory | InsufficientMemory | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def find_training_error(errors: list[BaseException], *, model: str = "") -> TrainingError | None:
    """The first known one among several workers' errors, with Ray's wrappers taken off."""
    for error in errors:
        inner = getattr(error, "_base_exc", error)
        known = as_training_error(inner, model=model)
        if known is not None:
            return known
    return None
