"""What an engine asks of its device's memory: how much is free, and what a call took of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes. None where the machine does not say."""

    free_bytes: int | None
    total_bytes: int | None


MeasureMemory = Callable[[], Memory]


class DeviceMemory(Protocol):
    """One device's memory, asked by one thread at a time."""

    tells_peaks: ClassVar[bool]
    """Whether it can say what a call took. Where it cannot, calls are not planned by memory."""

    def measure(self) -> Memory: ...

    def start_peak(self) -> None:
        """What is held from now on counts for ``peak_bytes``."""

    def peak_bytes(self) -> int:
        """The most that was held at once since ``start_peak``, beyond what was held then."""

    def give_back(self) -> None:
        """Return what is kept for later use to the device; what lay in pieces is whole again."""


class CudaMemory:
    """A CUDA device's, as torch's allocator sees it. Resets the peak that ``torch.cuda.max_memory_allocated`` tells.

    No call waits for the device: the allocator counts when work is queued.
    """

    tells_peaks: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held_bytes = 0

    def measure(self) -> Memory:
        """What the driver has free, and what torch holds unused."""
        free, total = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return Memory(free + unused, total)

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held_bytes = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._held_bytes

    def give_back(self) -> None:
        torch.cuda.empty_cache()


class UntoldMemory:
    """Says nothing: for a device that cannot be asked, or where the answer must not decide anything."""

    tells_peaks: ClassVar[bool] = False

    def measure(self) -> Memory:
        return Memory(None, None)

    def start_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def give_back(self) -> None:
        torch.cuda.empty_cache()  # does nothing where there is no CUDA


class OffloadedMemory(CudaMemory):
    """Of a device on which a model's parts take turns: a call's peak may be a part that came, and another left."""

    tells_peaks: ClassVar[bool] = False


class HostMemory(UntoldMemory):
    """The CPU's. ``measure`` tells what Linux calls available."""

    def measure(self) -> Memory:
        try:
            lines = MEMINFO.read_text().splitlines()
        except OSError:
            return Memory(None, None)  # not Linux
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        free_kb, total_kb = fields.get("MemAvailable"), fields.get("MemTotal")
        return Memory(int(free_kb[0]) * 1024 if free_kb else None, int(total_kb[0]) * 1024 if total_kb else None)


def device_memory(device: torch.device) -> DeviceMemory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()
