"""Models of this replica, by alias, and the device they run on. Imports torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion.engine import Engine
from diffusion.families import load_family

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DeviceFacts:
    """`device`: cpu or cuda. Memory in bytes, None on the CPU."""

    device: str
    gpu_name: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None


class EngineShelf:
    """Loaded engines, the least recently used making room. For one thread."""

    def __init__(self, models: Mapping[str, str], load: Callable[[str], Engine], *, loaded_max: int = 1) -> None:
        """`models`: alias to the folder that `load` takes."""
        self._models = dict(models)
        self._load = load
        self._loaded_max = loaded_max
        self._engines: OrderedDict[str, Engine] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        return tuple(self._engines)

    def engine(self, alias: str) -> Engine:
        """Loads on first use. Raises KeyError for an unknown alias, DiffusionError for a folder that cannot be run."""
        if alias in self._engines:
            self._engines.move_to_end(alias)
            return self._engines[alias]
        folder = self._models[alias]
        while len(self._engines) >= self._loaded_max:
            # Before loading, so that two models never have to fit at once.
            self._engines.popitem(last=False)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._engines[alias] = self._load(folder)
        return self._engines[alias]


def engine_loader(device: str, dtype: str) -> Callable[[str], Engine]:
    """How this replica loads a model folder. `auto` takes the GPU if there is one, and bf16 there, fp32 on the CPU."""
    chosen = _device(device)
    kind = DTYPES[dtype] if dtype != "auto" else (torch.bfloat16 if chosen == "cuda" else torch.float32)
    return lambda folder: Engine(load_family(Path(folder).expanduser(), device=torch.device(chosen), dtype=kind))


def device_facts(device: str) -> Callable[[], DeviceFacts]:
    chosen = _device(device)

    def facts() -> DeviceFacts:
        if chosen != "cuda":
            return DeviceFacts(chosen)
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return DeviceFacts(chosen, torch.cuda.get_device_name(), total_bytes, total_bytes - free_bytes)

    return facts


def _device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
