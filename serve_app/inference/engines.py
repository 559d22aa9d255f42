"""Models of this replica, by alias, and the device they run on. Imports torch."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion.engine import Engine
from diffusion.engine.memory import MeasureMemory, OffloadedMemory, device_memory
from diffusion.engine.offload import offload
from diffusion.engine.order import Turns
from diffusion.errors import InsufficientMemory
from diffusion.families import load_family
from diffusion.quantized import Quantization

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class DeviceFacts:
    """`device`: cpu or cuda. Memory in bytes, None on the CPU."""

    device: str
    gpu_name: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None


@dataclass(eq=False)
class _Shelved:
    engine: Engine | None = None
    users: int = 0


@dataclass(frozen=True)
class LastResort:
    """How to load a model that does not fit: `needed_bytes` of a folder must be free for it."""

    load: Callable[[str], Engine]
    needed_bytes: Callable[[str], int]


class EngineShelf:
    """Loaded engines, the least recently used making room: for the count, and for the memory that is measured.

    Thread-safe. A model is loaded once however many ask for it, one model at a time, and never leaves while somebody
    uses it.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        load: Callable[[str], Engine],
        *,
        loaded_max: int = 1,
        memory: MeasureMemory | None = None,
        needed_bytes: Callable[[str], int] = lambda folder: 0,
        last_resort: LastResort | None = None,
        turns: AbstractContextManager[None] | None = None,
        prepare: Callable[[str], None] = lambda folder: None,
    ) -> None:
        """`models`: alias to the folder that `load` takes, and before it `prepare`, beside the other models' work.
        `needed_bytes`: what must be free before it is loaded; a model for which that much is not free, with all others
        gone that nobody uses, is loaded by `last_resort`. `turns`: the engines' own. A model is loaded in one of them,
        for what a call takes of the device is measured."""
        self._prepare = prepare
        self._models = dict(models)
        self._load = load
        self._loaded_max = loaded_max
        self._memory = memory
        self._needed_bytes = needed_bytes
        self._last_resort = last_resort
        self._turns = turns or Turns()
        self._shelf: OrderedDict[str, _Shelved] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()

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
            if shelved.engine is None:
                with self._loading:
                    if shelved.engine is None:
                        self._prepare(folder)
                        with self._turns:
                            shelved.engine = self._loaded(folder)
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

    def _loaded(self, folder: str) -> Engine:
        # Room is made before loading, so that two models never have to fit at once.
        try:
            self._make_room(self._needed_bytes(folder))
        except InsufficientMemory:
            if self._last_resort is None:
                raise
        else:
            return self._load(folder)
        self._make_room(self._last_resort.needed_bytes(folder))
        logger.warning("a model does not fit whole; its parts will take turns on the device")
        return self._last_resort.load(folder)

    def _make_room(self, needed_bytes: int) -> None:
        while len(self.loaded) >= self._loaded_max and self._evict():
            pass
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
    decode_max: int
    tiled: bool
    adapter_bytes_max: int
    compiled: bool
    quantization: Quantization | None = None
    first_block_cache: float = 0.0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(chosen_device(self.device))

    @property
    def torch_dtype(self) -> torch.dtype:
        """`auto` is bf16 on a GPU and fp32 on the CPU."""
        auto = torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32
        return auto if self.dtype == "auto" else DTYPES[self.dtype]


def engine_loader(options: EngineOptions, turns: Turns, *, offloaded: bool = False) -> Callable[[str], Engine]:
    """How this replica loads a model folder. Raises SettingNotSupported for weights that this device cannot have.

    `turns`: one for all engines of a replica, which share its device. With `offloaded`, the model's parts take turns on
    the device too, and are not compiled.
    """
    device = options.torch_device
    if options.quantization is not None:
        options.quantization.check(device)

    def load(folder: str) -> Engine:
        first_device = torch.device("cpu") if offloaded else device
        family = load_family(
            Path(folder).expanduser(), device=first_device, dtype=options.torch_dtype, quantization=options.quantization
        )
        if offloaded:
            offload(family, device)
        if device.type == "cuda":
            family.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Engine(
            family,
            batch_max=options.batch_max,
            decode_max=options.decode_max,
            tiled=options.tiled,
            adapter_bytes_max=options.adapter_bytes_max,
            first_block_cache=options.first_block_cache,
            memory=OffloadedMemory(device) if offloaded else device_memory(device),
            compiled="inductor" if options.compiled and not offloaded else None,
            turns=turns,
        )

    return load


def memory_of(device: str) -> MeasureMemory:
    chosen = torch.device(chosen_device(device))
    return device_memory(chosen).measure


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
