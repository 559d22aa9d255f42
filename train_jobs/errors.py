"""Every way a training can end badly, as one tree.

    TrainingError
    +-- ConfigInvalid        the request is wrong; nothing was queued
    +-- DatasetNotFound      no finished upload of that dataset
    +-- DatasetEmpty         the dataset has no pictures
    +-- ImageUnreadable      some pictures cannot be decoded
    +-- ModelNotAvailable    the base model is unknown, missing or of a kind not served here
    +-- NonFiniteLoss        the loss became NaN or infinite
    +-- OutOfMemory          the device's memory was not enough
    +-- CheckpointInvalid    a stored checkpoint cannot be continued from
    +-- TrainingCancelled    asked to stop
    +-- TrainingTimedOut     the job's time is up
    +-- TrainingInterrupted  the workers went away; worth another attempt
    +-- StorageFailed        durable storage did not answer; worth another attempt

`code` is stable and public, and so is `public_message`: it never holds a path on the server, an object key, a URL or
another exception's text. Every class survives pickling, so it can cross Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

NAMES_SHOWN_MAX = 10


class TrainingError(Exception):
    """Base of the tree. `retryable`: whether another attempt may end differently."""

    code: ClassVar[str] = "training_failed"
    retryable: ClassVar[bool] = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._args = args

    def __reduce__(self) -> tuple[type[TrainingError], tuple[Any, ...]]:
        return (type(self), self._args)

    @property
    def public_message(self) -> str:
        """What a client may read."""
        return "The training failed."

    def __str__(self) -> str:
        return self.public_message


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a request: where (`config.process[0].train.lr`), what, and a stable code."""

    path: str
    message: str
    code: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


class ConfigInvalid(TrainingError):
    """The request cannot be accepted. Holds all problems found, in the order of the request."""

    code = "config_invalid"

    def __init__(self, problems: Iterable[Problem | Mapping[str, str]]) -> None:
        self.problems: tuple[Problem, ...] = tuple(p if isinstance(p, Problem) else Problem(**p) for p in problems)
        super().__init__(self.problems)

    @property
    def public_message(self) -> str:
        shown = "; ".join(f"{p.path}: {p.message}" if p.path else p.message for p in self.problems[:NAMES_SHOWN_MAX])
        more = len(self.problems) - NAMES_SHOWN_MAX
        return shown + (f"; and {more} more" if more > 0 else "")


class DatasetNotFound(TrainingError):
    code = "dataset_not_found"

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset)
        self.dataset = dataset

    @property
    def public_message(self) -> str:
        return f"Dataset '{self.dataset}' was not found."


class DatasetEmpty(TrainingError):
    code = "dataset_empty"

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset)
        self.dataset = dataset

    @property
    def public_message(self) -> str:
        return f"Dataset '{self.dataset}' has no pictures."


class ImageUnreadable(TrainingError):
    """`names` are the file names as uploaded, never paths."""

    code = "image_unreadable"

    def __init__(self, names: Iterable[str]) -> None:
        self.names: tuple[str, ...] = tuple(names)
        super().__init__(self.names)

    @property
    def public_message(self) -> str:
        more = len(self.names) - NAMES_SHOWN_MAX
        shown = ", ".join(self.names[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
        return f"These pictures cannot be read: {shown}."


class ModelNotAvailable(TrainingError):
    """`reason` is one of our own sentences, never a library's text."""

    code = "model_not_available"

    def __init__(self, model: str, reason: str = "it was not found") -> None:
        super().__init__(model, reason)
        self.model = model
        self.reason = reason

    @property
    def public_message(self) -> str:
        return f"Base model '{self.model}' cannot be used: {self.reason}."


class NonFiniteLoss(TrainingError):
    """`names` are the samples of the step whose loss was NaN or infinite; none where only its update was."""

    code = "non_finite_loss"

    def __init__(self, step: int, names: Iterable[str]) -> None:
        self.step = step
        self.names: tuple[str, ...] = tuple(names)
        super().__init__(step, self.names)

    @property
    def public_message(self) -> str:
        shown = f" (samples: {', '.join(self.names[:NAMES_SHOWN_MAX])})" if self.names else ""
        return f"The loss became NaN or infinite at step {self.step}{shown}. A lower learning rate may help."


class OutOfMemory(TrainingError):
    code = "out_of_memory"

    @property
    def public_message(self) -> str:
        return "The device ran out of memory. A smaller batch size or resolution may help."


class CheckpointInvalid(TrainingError):
    code = "checkpoint_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @property
    def public_message(self) -> str:
        return f"The checkpoint cannot be continued from: {self.reason}."


class TrainingCancelled(TrainingError):
    code = "training_cancelled"

    @property
    def public_message(self) -> str:
        return "The training was cancelled."


class TrainingTimedOut(TrainingError):
    code = "training_timed_out"

    @property
    def public_message(self) -> str:
        return "The training did not end in the time allowed."


class TrainingInterrupted(TrainingError):
    code = "training_interrupted"
    retryable = True

    @property
    def public_message(self) -> str:
        return "The training's workers were lost before it ended."


class StorageFailed(TrainingError):
    """`storage_code` is the code of the storage error behind it."""

    code = "storage_failed"
    retryable = True

    def __init__(self, storage_code: str) -> None:
        super().__init__(storage_code)
        self.storage_code = storage_code

    @property
    def public_message(self) -> str:
        return f"The object storage did not do what the training needed ({self.storage_code})."
