"""Models of this replica, by alias, and the device they run on. Imports torch."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusion.engine import Engine
from diffusion.engine.memory import MeasureMemory, device_memory
from diffusion.engine.order import Turns
from diffusion.errors import InsufficientMemory
from diffusion.families import load_family

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHT_PATTERNS = ("*.safetensors", "*/*.safetensors")
MIB = 2**20


@dataclass(frozen=True)
class DeviceFacts:
    """`device`: cpu or cuda. Memory in bytes, None on the CPU."""

    device: str
    gpu_name: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None


@dataclass(eq=False)
class _Shelved:
    loading: threading.Lock = field(default_factory=threading.Lock)
    engine: Engine | None = None
    users: int = 0


class EngineShelf:
    """Loaded engines, the least recently used making room: for the count, and for the memory that is measured.

    Thread-safe. A model is loaded once however many ask for it, and never leaves while somebody uses it.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        load: Callable[[str], Engine],
        *,
        loaded_max: int = 1,
        memory: MeasureMemory | None = None,
        needed_bytes: Callable[[str], int] = lambda folder: 0,
    ) -> None:
        """`models`: alias to the folder that `load` takes. `needed_bytes`: what must be free before it is loaded."""
        self._models = dict(models)
        self._load = load
        self._loaded_max = loaded_max
        self._memory = memory
        self._needed_bytes = needed_bytes
        self._shelf: OrderedDict[str, _Shelved] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def loaded(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(alias for alias, shelved in self._shelf.items() if shelved.engine is not None)

    def longest_iteration_s(self) -> float:
        """Of the engines' iterations under way."""
        with self._lock:
            engines = [shelved.engine for shelved in self._shelf.values()]
        return max((engine.iteration_s() for engine in engines if engine is not None), default=0.0)

    @contextmanager
    def using(self, alias: str) -> Iterator[Engine]:
        """Loads on first use. Raises KeyError for an unknown alias, DiffusionError for a folder that cannot be run,
        InsufficientMemory where it does not fit beside what is in use."""
        folder = self._models[alias]
        with self._lock:
            shelved = self._shelf.setdefault(alias, _Shelved())
            self._shelf.move_to_end(alias)
            shelved.users += 1
        try:
            with shelved.loading:
                if shelved.engine is None:
                    # Before loading, so that two models never have to fit at once.
                    self._make_room(folder)
                    shelved.engine = self._load(folder)
            yield shelved.engine
        finally:
            with self._lock:
                shelved.users -= 1
                if shelved.users == 0 and shelved.engine is None:
                    del self._shelf[alias]

    def load(self, alias: str) -> None:
        """Ahead of the first use. Raises what `using` raises."""
        with self.using(alias):
            pass

    def _make_room(self, folder: str) -> None:
        while len(self.loaded) >= self._loaded_max and self._evict():
            pass
        needed_bytes = self._needed_bytes(folder)
        while (free_bytes := self._free_bytes()) is not None and free_bytes < needed_bytes:
            if not self._evict():
                raise InsufficientMemory(needed_bytes, free_bytes)

    def _evict(self) -> bool:
        """The least recently used model that nobody uses leaves. False where there is none."""
        with self._lock:
            alias = next((a for a, s in self._shelf.items() if s.users == 0 and s.engine is not None), None)
            if alias is None:
                return False
            shelved = self._shelf.pop(alias)
        if shelved.engine is not None:
            shelved.engine.close()
        shelved.engine = None
        gc.collect()  # modules refer to one another in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True

    def _free_bytes(self) -> int | None:
        return None if self._memory is None else self._memory().free_bytes


@dataclass(frozen=True)
class EngineOptions:
    """What `Settings` says about engines, for `engine_loader`."""

    device: str
    dtype: str
    batch_max: int
    adapter_bytes_max: int
    compiled: bool


def engine_loader(options: EngineOptions) -> Callable[[str], Engine]:
    """How this replica loads a model folder. `auto` takes the GPU if there is one, and bf16 there, fp32 on the CPU."""
    device = torch.device(chosen_device(options.device))
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if options.dtype == "auto" else DTYPES[options.dtype]
    turns = Turns()  # one for all: the engines of a replica share its device

    def load(folder: str) -> Engine:
        family = load_family(Path(folder).expanduser(), device=device, dtype=dtype)
        if device.type == "cuda":
            family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Engine(
            family,
            batch_max=options.batch_max,
            adapter_bytes_max=options.adapter_bytes_max,
            compiled="inductor" if options.compiled else None,
            turns=turns,
        )

    return load


def memory_of(device: str) -> MeasureMemory:
    chosen = torch.device(chosen_device(device))
    return lambda: device_memory(chosen)


def needed_bytes(headroom_mb: int) -> Callable[[str], int]:
    """The size of a folder's weight files, and room for its work. An estimate: the files may be of another dtype."""

    def needed(folder: str) -> int:
        path = Path(folder).expanduser()
        files = {file for pattern in WEIGHT_PATTERNS for file in path.glob(pattern)}
        return sum(file.stat().st_size for file in files) + headroom_mb * MIB

    return needed


def device_facts(device: str) -> Callable[[], DeviceFacts]:
    chosen = chosen_device(device)

    def facts() -> DeviceFacts:
        if chosen != "cuda":
            return DeviceFacts(chosen)
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return DeviceFacts(chosen, torch.cuda.get_device_name(), total_bytes, total_bytes - free_bytes)

    return facts


def chosen_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
