"""How much memory there is, measured, and how many pictures of a size go into one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

GROW_AFTER_STEPS = 50
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Memory:
    """Bytes. None where the machine does not say."""

    free_bytes: int | None
    total_bytes: int | None


MeasureMemory = Callable[[], Memory]


def device_memory(device: torch.device) -> Memory:
    """Of a CUDA device, what its driver has free and what torch holds unused; of the CPU, what Linux calls available.

    Only reads; nothing of the device is changed.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(free + unused, total)
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return Memory(None, None)  # not Linux
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    free_kb, total_kb = fields.get("MemAvailable"), fields.get("MemTotal")
    return Memory(int(free_kb[0]) * 1024 if free_kb else None, int(total_kb[0]) * 1024 if total_kb else None)


class BatchLimits:
    """How many pictures of each shape go into one call: halved when memory ran out, one more after calls that fit.

    An additive increase and multiplicative decrease, as TCP's (Chiu and Jain 1989), so that a limit set by a passing
    shortage is left again.
    """

    def __init__(self, pictures_max: int) -> None:
        self._pictures_max = pictures_max
        self._limits: dict[Hashable, int] = {}
        self._fitting_steps: dict[Hashable, int] = {}

    def of(self, shape: Hashable) -> int:
        return self._limits.get(shape, self._pictures_max)

    def ran_out(self, shape: Hashable, pictures: int) -> None:
        self._limits[shape] = max(1, pictures // 2)
        self._fitting_steps[shape] = 0

    def fitted(self, shape: Hashable, pictures: int) -> None:
        limit = self._limits.get(shape)
        if limit is None or pictures < limit:
            return
        self._fitting_steps[shape] += 1
        if self._fitting_steps[shape] >= GROW_AFTER_STEPS:
            self._fitting_steps[shape] = 0
            self._limits[shape] = limit + 1
            if limit + 1 >= self._pictures_max:
                del self._limits[shape]
