"""How many pictures go into one call: as many as are expected to fit what is free, before memory runs out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from diffusion.engine.memory import DeviceMemory
from diffusion.errors import InsufficientMemory, OutOfGpuMemory

GROW_AFTER_STEPS = 50
HEADROOM = 1.1
"""Of what is expected: for what an allocator rounds up, and for what is free but in pieces."""
TRIED_EVERY = 4
"""Of so many refusals of a kind one is tried all the same: what was measured may have been taken by others."""
SIZES_MAX = 256
"""Sizes of calls that are remembered of each kind."""


@dataclass(frozen=True)
class Shortage:
    """Why a picture was not worked on: bytes. ``needed_bytes`` is None where that showed only when memory ran out."""

    needed_bytes: int | None
    free_bytes: int | None
    total_bytes: int | None

    def error(self, width: int, height: int) -> OutOfGpuMemory | InsufficientMemory:
        """For a picture of this size, in pixels."""
        if self.needed_bytes is None or self.free_bytes is None:
            return OutOfGpuMemory(1, width, height, self.free_bytes, self.total_bytes)
        return InsufficientMemory(self.needed_bytes, self.free_bytes, f"a picture of {width}x{height}")


class PeakMemory:
    """What calls of one kind took at their peak, by their size in latent elements; what others will take.

    A call's peak is taken to be a fixed part and one in proportion to its size: activations are, with attention that
    does not keep its weights. So a larger call takes at most in proportion more, and at least as much.
    """

    def __init__(self, size: int, peak_bytes: int) -> None:
        self._peaks: dict[int, int] = {}
        self.learn(size, peak_bytes)

    def learn(self, size: int, peak_bytes: int) -> None:
        """The latest counts: what a first call takes once, to choose or to compile its kernels, is forgotten."""
        if size not in self._peaks and len(self._peaks) >= SIZES_MAX:
            del self._peaks[next(iter(self._peaks))]
        self._peaks[size] = peak_bytes
        self._sizes = sorted(self._peaks)

    def most_bytes(self, size: int) -> int:
        """What a call of this size takes at most."""
        at = bisect_left(self._sizes, size)
        above = [self._peaks[self._sizes[at]]] if at < len(self._sizes) else []
        below = [self._peaks[self._sizes[at - 1]] * size // self._sizes[at - 1]] if at else []
        return min([*above, *below])

    def least_bytes(self, size: int) -> int:
        """What a call of this size takes at least; 0 where no call as small has been measured."""
        at = bisect_right(self._sizes, size)
        return self._peaks[self._sizes[at - 1]] if at else 0


class Cost(NamedTuple):
    """Of a call: its size in latent elements, and what stays allocated after it beside what is there already."""

    size: int
    growth_bytes: int = 0


class Admission:
    """Asks the device before each call and learns from each. Where the device tells no peaks, all are admitted."""

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._peaks: dict[Hashable, PeakMemory] = {}
        self._refusals: Counter[Hashable] = Counter()

    def admits(self, kind: Hashable, pictures: int, cost: Callable[[int], Cost]) -> int:
        """How many of the pictures fit one call together, 1 at least. ``cost``: of a call of the first so many.

        One alone is admitted while no call of the kind has been measured.
        """
        if not self.memory.tells_peaks or pictures == 1:
            return pictures
        free_bytes, peaks = self.memory.measure().free_bytes, self._peaks.get(kind)
        if free_bytes is None:
            return pictures
        if peaks is None:
            return 1
        for count in range(pictures, 1, -1):
            size, growth_bytes = cost(count)
            if HEADROOM * peaks.most_bytes(size) + growth_bytes <= free_bytes:
                return count
        return 1

    def refusal(self, kind: Hashable, cost: Callable[[int], Cost]) -> Shortage | None:
        """For one picture: set where even what a smaller or equal one was seen to take is not free.

        An expectation alone refuses nothing: the picture is tried. So is one of several that would be refused.
        """
        peaks = self._peaks.get(kind)
        if not self.memory.tells_peaks or peaks is None:
            return None
        size, growth_bytes = cost(1)
        needed_bytes = peaks.least_bytes(size) + growth_bytes
        now = self.memory.measure()
        if now.free_bytes is None or needed_bytes <= now.free_bytes:
            return None
        self._refusals[kind] += 1
        if self._refusals[kind] % TRIED_EVERY == 0:
            return None
        return Shortage(needed_bytes, now.free_bytes, now.total_bytes)

    def ran_out(self) -> Shortage:
        """For one picture, after its call has failed."""
        now = self.memory.measure()
        return Shortage(None, now.free_bytes, now.total_bytes)

    @contextmanager
    def learning(self, kind: Hashable, size: int) -> Iterator[None]:
        """Around a call. One that fails teaches nothing."""
        if not self.memory.tells_peaks:
            yield
            return
        self.memory.start_peak()
        yield
        peak_bytes = self.memory.peak_bytes()
        if kind in self._peaks:
            self._peaks[kind].learn(size, peak_bytes)
        else:
            self._peaks[kind] = PeakMemory(size, peak_bytes)


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
