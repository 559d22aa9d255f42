"""Every error this package raises on purpose.

    DiffusionError
    ├── ModelNotFound          no model folder, or a part of it is missing
    ├── UnsupportedModel       a model folder of a kind no family here can run
    ├── LoraInvalid            not a LoRA file that can be read safely
    ├── LoraMismatch           a readable LoRA made for another model
    ├── SizeNotSupported       width or height the model cannot make
    ├── SettingNotSupported    any other setting outside what the model can do
    ├── Cancelled              the caller's should_stop answered True
    ├── OutOfGpuMemory         the accelerator's memory was not enough for a picture under way
    └── InsufficientMemory     not enough is free for a model to be loaded, or for a picture to be worked on

Messages carry no file system path: they may be shown to whoever sent the request. All of them survive pickling,
because the constructor's arguments are exactly ``args``.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DiffusionError(Exception):
    """Base of the tree. ``code`` is stable and meant for machines; ``str()`` is for people."""

    code: ClassVar[str] = "diffusion_error"

    def __reduce__(self) -> tuple[type[DiffusionError], tuple[Any, ...]]:
        return type(self), self.args


class ModelNotFound(DiffusionError):
    """``part`` names what is missing: ``model_index.json`` or a component such as ``unet``."""

    code = "model_not_found"

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part

    def __str__(self) -> str:
        return f"the model folder has no readable {self.part}"


class UnsupportedModel(DiffusionError):
    code = "unsupported_model"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"this model cannot be run: {self.reason}"


class LoraInvalid(DiffusionError):
    code = "lora_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"not a usable LoRA file: {self.reason}"


class LoraMismatch(DiffusionError):
    code = "lora_mismatch"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the LoRA does not fit this model: {self.reason}"


class SizeNotSupported(DiffusionError):
    """Sizes are pixels; both sides must be positive multiples of ``multiple``, and at most ``side_max`` where set."""

    code = "size_not_supported"

    def __init__(self, width: int, height: int, multiple: int, side_max: int | None = None) -> None:
        super().__init__(width, height, multiple, side_max)
        self.width, self.height, self.multiple, self.side_max = width, height, multiple, side_max

    def __str__(self) -> str:
        most = "" if self.side_max is None else f", at most {self.side_max}"
        wanted = f"both sides must be multiples of {self.multiple} pixels{most}"
        return f"{self.width}x{self.height} is not supported: {wanted}"


class SettingNotSupported(DiffusionError):
    code = "setting_not_supported"

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(setting, reason)
        self.setting, self.reason = setting, reason

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


class Cancelled(DiffusionError):
    """Stopped between two steps: ``step`` of ``total`` denoising steps, over all pictures, had been done."""

    code = "cancelled"

    def __init__(self, step: int, total: int) -> None:
        super().__init__(step, total)
        self.step, self.total = step, total

    def __str__(self) -> str:
        return f"cancelled after step {self.step} of {self.total}"


class OutOfGpuMemory(DiffusionError):
    """``free_bytes`` and ``total_bytes`` are the device's at the moment of failure, None where it cannot say."""

    code = "out_of_gpu_memory"

    def __init__(self, pictures: int, width: int, height: int, free_bytes: int | None, total_bytes: int | None) -> None:
        super().__init__(pictures, width, height, free_bytes, total_bytes)
        self.pictures, self.width, self.height = pictures, width, height
        self.free_bytes, self.total_bytes = free_bytes, total_bytes

    def __str__(self) -> str:
        work = f"not enough GPU memory for {self.pictures} picture(s) of {self.width}x{self.height} at once"
        if self.free_bytes is None or self.total_bytes is None:
            return work
        return f"{work}: {self.free_bytes / 2**20:.0f} MiB free of {self.total_bytes / 2**20:.0f} MiB"


class InsufficientMemory(DiffusionError):
    """Measured before a model is loaded or a picture worked on, so nothing has failed; others may give memory back.

    ``work`` is what needs the memory, for people.
    """

    code = "insufficient_gpu_memory"

    def __init__(self, needed_bytes: int, free_bytes: int, work: str = "the model") -> None:
        super().__init__(needed_bytes, free_bytes, work)
        self.needed_bytes, self.free_bytes, self.work = needed_bytes, free_bytes, work

    def __str__(self) -> str:
        return (
            f"insufficient GPU memory: {self.work} needs {self.needed_bytes / 2**20:.0f} MiB, "
            f"{self.free_bytes / 2**20:.0f} MiB are free"
        )
