"""Requests checked and made ready for the loop, before any work: sizes, settings, schedules, adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusion.engine.adapter_cache import AdapterCache, Lease
from diffusion.engine.request import GenerateRequest, size_of
from diffusion.engine.sample import Sample
from diffusion.engine.start import size_near
from diffusion.engine.ticket import OnStep, ShouldStop, Ticket
from diffusion.errors import SettingNotSupported
from diffusion.families.base import Family

SEED_MAX = 2**63 - 1


class Intake:
    """``first_block_cache`` is for requests that leave theirs open, where the family has blocks to leave out."""

    def __init__(self, family: Family, adapters: AdapterCache, *, first_block_cache: float) -> None:
        self._family, self._adapters = family, adapters
        self._first_block_cache = first_block_cache if family.block_lists else 0.0

    def ticket(
        self, requests: Sequence[GenerateRequest], on_step: OnStep | None, should_stop: ShouldStop | None
    ) -> Ticket:
        """With the loads of its adapters begun. Raises SizeNotSupported, SettingNotSupported, LoraInvalid."""
        samples = [self._sample(index, self._settled(request)) for index, request in enumerate(requests)]
        return Ticket(samples, self._borrowed(samples), on_step, should_stop)

    def _settled(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its picture's size, or the model's own, where it names none."""
        width = height = self._family.native_size_px
        if request.init_image is not None:
            width, height = size_near(request.init_image, self._family.size_multiple, request.width, request.height)
        own_cache = request.first_block_cache
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            first_block_cache=self._first_block_cache if own_cache is None else own_cache,
        )

    def _sample(self, index: int, request: GenerateRequest) -> Sample:
        shape = self._family.latent_shape(*size_of(request))
        if not 0 <= request.seed <= SEED_MAX:
            raise SettingNotSupported("seed", f"must be between 0 and {SEED_MAX}")
        if request.first_block_cache and not self._family.block_lists:
            raise SettingNotSupported("first_block_cache", f"{self._family.name} is a UNet without blocks to leave out")
        schedule = self._family.make_schedule(request.scheduler, request.steps, shape)
        if request.scheduler is None:
            # What the picture's settings tell; as a name it may be one that only the model itself can ask for.
            request = replace(request, scheduler=self._family.scheduler_name(schedule))
        return Sample(self._family, request, index, schedule)

    def _borrowed(self, samples: Sequence[Sample]) -> list[list[Lease]]:
        """By sample. All or none."""
        leases: list[list[Lease]] = []
        try:
            for sample in samples:
                leases.append([])
                for lora in sample.request.loras:
                    leases[-1].append(self._adapters.borrow(lora.path))
        except BaseException:
            for lease in (lease for own in leases for lease in own):
                self._adapters.release(lease)
            raise
        return leases
