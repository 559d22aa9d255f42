"""One call's pictures on their way through the engine: what they wait for, how far they are, how they ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusion.engine.adapter_cache import AdapterCache, Lease
from diffusion.engine.packed import Adapter
from diffusion.engine.request import RenderedImage
from diffusion.engine.sample import Sample
from diffusion.engine.slot_table import Combo
from diffusion.errors import Cancelled, SettingNotSupported

OnStep = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


@dataclass(eq=False)
class Ticket:
    """All of its pictures are made, or the first error ends it. ``leases``: per sample, one for each LoRA."""

    samples: Sequence[Sample]
    leases: Sequence[Sequence[Lease]]
    on_step: OnStep | None = None
    should_stop: ShouldStop | None = None

    def __post_init__(self) -> None:
        self.error: BaseException | None = None
        self.finished = False
        self.waiting: deque[Sample] = deque(self.samples)
        self.rendered: dict[int, RenderedImage] = {}
        self._steps_done, self._steps_total = 0, sum(sample.steps_total for sample in self.samples)

    @property
    def adapters_ready(self) -> bool:
        return all(lease.ready for leases in self.leases for lease in leases)

    def assign_adapters(self) -> None:
        """Raises what a load raised, LoraInvalid or LoraMismatch; SettingNotSupported for adapters that do not mix."""
        for sample, leases in zip(self.samples, self.leases, strict=True):
            sample.combo = _combo(sample, leases)

    def check_stop(self) -> None:
        """Raises Cancelled where the caller wants no more of it."""
        if self.should_stop is not None and self.should_stop():
            raise Cancelled(self._steps_done, self._steps_total)

    def count(self, steps: int) -> None:
        self._steps_done += steps
        if self.on_step is not None:
            self.on_step(self._steps_done, self._steps_total)

    def release(self, cache: AdapterCache) -> None:
        for leases in self.leases:
            for lease in leases:
                cache.release(lease)
        self.leases = [[] for _ in self.samples]
        for sample in self.samples:
            sample.combo = ()

    def images(self) -> list[RenderedImage]:
        """In the order of the requests. Raises the error that ended it."""
        if self.error is not None:
            raise self.error
        return [self.rendered[index] for index in range(len(self.samples))]


def _combo(sample: Sample, leases: Sequence[Lease]) -> Combo:
    """The same file given twice counts with the sum of its scales. Raises SettingNotSupported."""
    scales: dict[Adapter, float] = {}
    for lora, lease in zip(sample.request.loras, leases, strict=True):
        adapter = lease.adapter()
        if any(adapter.rescales(other) for other in scales if other is not adapter):
            raise SettingNotSupported("loras", "a DoRA cannot come after a LoKr on the same layers: name it first")
        scales[adapter] = scales.get(adapter, 0.0) + lora.scale
    return tuple(scales.items())
