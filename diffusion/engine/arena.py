"""One block of host memory for all adapters: taken in slabs, handed out in pieces, and never pinned piece by piece.

Pinning memory stops the device for as long as it takes, and torch rounds every pinned tensor up to a power of two; a
slab is pinned once and its bytes serve one adapter after another.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 256
"""Of every piece: CUDA's for its own allocations."""
SLAB_BYTES = 128 * 2**20
"""A power of two, which torch does not round."""

Fence = Callable[[], Callable[[], object]]
"""Marks what the device has been given to do; what it returns waits until that is done."""


@dataclass(eq=False)
class _Slab:
    data: Tensor
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of what is free, in order; no two touch."""

    @classmethod
    def of(cls, size: int, *, pinned: bool) -> _Slab:
        return cls(torch.empty(size, dtype=torch.uint8, pin_memory=pinned), [(0, size)])

    @property
    def is_empty(self) -> bool:
        return self.gaps == [(0, len(self.data))]

    def smallest_gap(self, size: int) -> int | None:
        """Of those that are large enough: its size."""
        return min((end - start for start, end in self.gaps if end - start >= size), default=None)

    def take(self, size: int, gap: int) -> int:
        """Where a piece of ``size`` begins, in the first gap of size ``gap``."""
        at = next(i for i, (start, end) in enumerate(self.gaps) if end - start == gap)
        start, end = self.gaps[at]
        self.gaps[at : at + 1] = [(start + size, end)] if gap > size else []
        return start

    def free(self, start: int, end: int) -> None:
        insort(self.gaps, (start, end))
        joined = self.gaps[:1]
        for gap in self.gaps[1:]:
            if joined[-1][1] == gap[0]:
                joined[-1] = (joined[-1][0], gap[1])
            else:
                joined.append(gap)
        self.gaps = joined


@dataclass(frozen=True, eq=False)
class Piece:
    """Bytes for one adapter: ``data [size]``, uint8, until ``Arena.free``."""

    data: Tensor
    slab: _Slab
    start: int
    end: int


class Arena:
    """At most ``bytes_max`` of slabs while ``take`` alone is used. Thread-safe.

    A freed piece is used again only once the device has done what it had been given to do by then: a copy out of pinned
    memory goes on after the call that asked for it. ``take`` and ``grow`` wait for that, ``free`` does not.
    """

    def __init__(self, *, bytes_max: int, pinned: bool = False, fence: Fence | None = None) -> None:
        """``fence``: None where nothing is copied behind the caller's back."""
        self._bytes_max, self._pinned, self._fence = bytes_max, pinned, fence
        self._slabs: list[_Slab] = []
        self._freed: deque[tuple[Callable[[], object], Piece]] = deque()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Of all slabs."""
        return sum(len(slab.data) for slab in self._slabs)

    def take(self, size_bytes: int) -> Piece | None:
        """A piece of at least one byte; None where it does not fit what is free, nor another slab the budget."""
        return self._find(size_bytes, beyond_budget=False)

    def grow(self, size_bytes: int) -> Piece:
        """As ``take``, in a slab of its own beyond the budget where it must be."""
        piece = self._find(size_bytes, beyond_budget=True)
        if piece is None:
            raise RuntimeError("a slab of its own does not hold the piece")
        return piece

    def free(self, piece: Piece) -> None:
        """Once for each piece."""
        with self._lock:
            if self._fence is None:
                self._put_back(piece)
            else:
                self._freed.append((self._fence(), piece))

    def _find(self, size_bytes: int, *, beyond_budget: bool) -> Piece | None:
        size = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        while True:
            with self._lock:
                gap, slab = self._best_gap(size)
                if slab is None and not self._freed:
                    slab = self._new_slab(size, beyond_budget=beyond_budget)
                    gap = 0 if slab is None else len(slab.data)
                if slab is not None:
                    start = slab.take(size, gap)
                    return Piece(slab.data[start : start + size_bytes], slab, start, start + size)
                if not self._freed:
                    return None
                wait, freed = self._freed.popleft()
            wait()  # without the lock, which whoever frees a piece needs at once
            with self._lock:
                self._put_back(freed)

    def _best_gap(self, size: int) -> tuple[int, _Slab | None]:
        """The gap that is filled best, so that others stay large."""
        gaps = [(gap, slab) for slab in self._slabs if (gap := slab.smallest_gap(size)) is not None]
        return min(gaps, key=lambda found: found[0], default=(0, None))

    def _new_slab(self, size: int, *, beyond_budget: bool) -> _Slab | None:
        """Empty ones, which were too small, make way for it."""
        while self.size_bytes + size > self._bytes_max and (empty := self._empty_slab()) is not None:
            self._slabs.remove(empty)
        room = self._bytes_max - self.size_bytes
        if size > room and not beyond_budget:
            return None
        wanted = max(SLAB_BYTES, 1 << (size - 1).bit_length())
        slab = _Slab.of(wanted if wanted <= room else size, pinned=self._pinned)
        self._slabs.append(slab)
        return slab

    def _empty_slab(self) -> _Slab | None:
        return next((slab for slab in self._slabs if slab.is_empty), None)

    def _put_back(self, piece: Piece) -> None:
        slab = piece.slab
        slab.free(piece.start, piece.end)
        if slab.is_empty and self.size_bytes > self._bytes_max:
            self._slabs.remove(slab)


def cuda_fence(device: torch.device) -> Fence:
    """Over the stream on which the engine copies: the device's current one."""

    def fence() -> Callable[[], object]:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event.synchronize

    return fence
