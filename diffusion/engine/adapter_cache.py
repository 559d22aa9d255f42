"""Adapters in memory: each file read and packed once, off the thread that denoises, the oldest unused leaving first."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from diffusion.engine.arena import Arena, Piece, cuda_fence
from diffusion.engine.packed import Adapter, Allocate, FileStamp, load_adapter, stamp_of
from diffusion.families.base import Family

logger = logging.getLogger(__name__)

LOADERS = 2


@dataclass(frozen=True, eq=False)
class Lease:
    """A hold on one adapter: it stays in memory until ``AdapterCache.release``, once per lease."""

    stamp: FileStamp
    loading: Future[Adapter]

    @property
    def ready(self) -> bool:
        return self.loading.done()

    def adapter(self) -> Adapter:
        """Waits for the load. Raises what it raised: LoraInvalid, LoraMismatch."""
        return self.loading.result()


@dataclass(eq=False)
class _Entry:
    loading: Future[Adapter]
    leases: int = 0
    size_bytes: int = 0
    pieces: list[Piece] = field(default_factory=list)


class AdapterCache:
    """At most ``bytes_max`` of adapters that nobody uses; those in use stay whatever they weigh. Thread-safe.

    A failed load is not kept: the next request reads the file again.
    """

    def __init__(
        self, load: Callable[[FileStamp, Allocate], Adapter], *, arena: Arena, bytes_max: int,
        on_loaded: Callable[[], None],
    ) -> None:  # fmt: skip
        """``load`` is given where to put an adapter: bytes of ``arena`` that are its own until it leaves. ``on_loaded``
        is called on the loader's thread whenever a load has ended, however it ended."""
        self._load = load
        self._arena = arena
        self._bytes_max = bytes_max
        self._on_loaded = on_loaded
        self._entries: OrderedDict[FileStamp, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._loaders: ThreadPoolExecutor | None = None
        self.loads_total = 0

    @classmethod
    def for_family(cls, family: Family, *, bytes_max: int, on_loaded: Callable[[], None]) -> AdapterCache:
        """Of adapters fitted to ``family``, in memory from which its device copies fastest."""
        pinned = family.device.type == "cuda"
        fence = cuda_fence(family.device) if pinned else None
        return cls(
            lambda stamp, allocate: load_adapter(stamp, family, allocate),
            arena=Arena(bytes_max=bytes_max, pinned=pinned, fence=fence),
            bytes_max=bytes_max,
            on_loaded=on_loaded,
        )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        with self._lock:
            return sum(entry.size_bytes for entry in self._entries.values())

    def borrow(self, path: Path) -> Lease:
        """Starts the load where nobody has yet, and returns at once. Raises LoraInvalid where there is no file."""
        stamp = stamp_of(path)
        with self._lock:
            entry = self._entries.get(stamp)
            starts = entry is None
            if entry is None:
                entry = self._entries[stamp] = _Entry(Future())
            entry.leases += 1
            self._entries.move_to_end(stamp)
        if starts:
            self._start(stamp, entry)
        return Lease(stamp, entry.loading)

    def release(self, lease: Lease) -> None:
        with self._lock:
            entry = self._entries.get(lease.stamp)
            if entry is not None and entry.loading is lease.loading:
                entry.leases -= 1
            self._evict(self._bytes_max)

    def clear(self) -> None:
        """Forget every adapter that nobody uses."""
        with self._lock:
            self._evict(0)

    def close(self) -> None:
        """Waits for the loads under way."""
        if self._loaders is not None:
            self._loaders.shutdown()

    def _start(self, stamp: FileStamp, entry: _Entry) -> None:
        with self._lock:
            if self._loaders is None:
                self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="adapter")
            self.loads_total += 1
        self._loaders.submit(self._run, stamp, entry)

    def _run(self, stamp: FileStamp, entry: _Entry) -> None:
        try:
            adapter = self._load(stamp, partial(self._allocate, entry))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the waiting requests must hear of it
            logger.info("an adapter could not be loaded: %s", type(error).__name__)
            with self._lock:
                self._forget(stamp)
            entry.loading.set_exception(error)
        else:
            entry.size_bytes = adapter.size_bytes
            entry.loading.set_result(adapter)
        self._on_loaded()

    def _allocate(self, entry: _Entry, size_bytes: int) -> Tensor:
        """The arena's budget is left only where those in use fill it."""
        piece = self._arena.take(size_bytes)
        while piece is None:
            with self._lock:
                left = self._evict_oldest()
            piece = self._arena.grow(size_bytes) if left is None else self._arena.take(size_bytes)
        entry.pieces.append(piece)
        return piece.data

    def _evict(self, bytes_max: int) -> None:
        total_bytes = sum(entry.size_bytes for entry in self._entries.values())
        while total_bytes > bytes_max and (left := self._evict_oldest()) is not None:
            total_bytes -= left.size_bytes

    def _evict_oldest(self) -> _Entry | None:
        """The least recently used that nobody uses leaves. None where there is none."""
        unused = (stamp for stamp, entry in self._entries.items() if entry.leases == 0 and entry.loading.done())
        stamp = next(unused, None)
        return None if stamp is None else self._forget(stamp)

    def _forget(self, stamp: FileStamp) -> _Entry:
        entry = self._entries.pop(stamp)
        for piece in entry.pieces:
            self._arena.free(piece)
        return entry
