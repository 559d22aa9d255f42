"""Iteration-level batching: pictures join and leave between denoiser calls, each with its own steps, seed and LoRAs.

Calls from any number of threads share one batch per latent shape. There is no thread of the engine's own: whoever waits
for pictures drives the loop, and hands it on when his own are done.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from diffusion.engine.adapter_cache import AdapterCache
from diffusion.engine.admission import Admission, BatchLimits, Shortage
from diffusion.engine.at_rest import at_rest
from diffusion.engine.compiled import compile_denoiser, many_graphs
from diffusion.engine.decode import Decoder
from diffusion.engine.denoise import Denoiser
from diffusion.engine.intake import Intake
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.memory import DeviceMemory, device_memory
from diffusion.engine.order import FairOrder, Group
from diffusion.engine.prompts import Prompts
from diffusion.engine.request import GeneratedImage, GenerateRequest, RenderedImage, size_of
from diffusion.engine.sample import Sample
from diffusion.engine.ticket import OnStep, ShouldStop, Ticket
from diffusion.errors import OutOfGpuMemory
from diffusion.families.base import Family

logger = logging.getLogger(__name__)

ADAPTER_BYTES_MAX = 2 * 2**30
LOAD_POLL_S = 0.05
"""How often a call that waits only for adapters asks its ``should_stop``."""


class Engine:
    """Makes pictures with one family; thread-safe.

    ``batch_max`` bounds the pictures in one denoiser call, ``decode_max`` those in one call of the VAE; ``tiled``
    decodes in tiles even what would fit whole, as ``Decoder`` says. ``adapter_bytes_max`` bounds the adapters kept in
    memory while nobody uses them. ``first_block_cache`` is for requests that leave theirs open, where the family has
    blocks to leave out. ``compiled`` compiles the denoiser's repeated blocks with this torch.compile backend.
    ``turns`` orders the calls of several engines on one device, whose ``memory`` decides how many pictures fit a call.
    """

    def __init__(
        self,
        family: Family,
        *,
        batch_max: int = 8,
        decode_max: int = 1,
        tiled: bool = False,
        adapter_bytes_max: int = ADAPTER_BYTES_MAX,
        first_block_cache: float = 0.0,
        compiled: str | None = None,
        memory: DeviceMemory | None = None,
        turns: AbstractContextManager[None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.family = family
        self._admission = Admission(memory or device_memory(family.device))
        self._turns = turns or nullcontext()
        self._limits = BatchLimits(batch_max)
        self._slots = LoraSlots(family, fixed_shapes=compiled is not None)
        self._prompts = Prompts(family, self._slots, self._admission)
        self._denoiser = Denoiser(family, self._slots, self._limits, self._admission, fixed_shapes=compiled is not None)
        self._decoder = Decoder(family, self._admission, pictures_max=decode_max, tiled=tiled)
        if compiled is not None:
            compile_denoiser(family, compiled)
        self._calling = nullcontext if compiled is None else many_graphs
        self._clock = clock
        self._iteration_began: float | None = None
        self._order = FairOrder()
        self._changed = threading.Condition()
        self._driving = False
        self._inbox: deque[Ticket] = deque()
        self._live: list[Ticket] = []
        self.adapters = AdapterCache.for_family(family, bytes_max=adapter_bytes_max, on_loaded=self._wake)
        self._intake = Intake(family, self.adapters, first_block_cache=first_block_cache)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[GeneratedImage]:
        """One picture per request, in their order. The arguments and errors are those of ``render``."""
        return [rendered.to_image() for rendered in self.render(requests, on_step=on_step, should_stop=should_stop)]

    def render(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[RenderedImage]:
        """As ``generate``, but float pixels.

        ``on_step(step, total)`` counts denoising steps over all requests, after each denoiser call; it and
        ``should_stop`` are called between denoiser calls, on this thread or on another that waits for pictures. All
        requests of a call succeed or none does; those of other calls are not concerned.

        Raises SizeNotSupported and SettingNotSupported before any work, LoraInvalid, LoraMismatch, Cancelled,
        InsufficientMemory where it is known before a call that a picture does not fit, else OutOfGpuMemory.
        """
        ticket = self.submit(requests, on_step=on_step, should_stop=should_stop)
        self.wait(ticket)
        return ticket.images()

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Ticket:
        """Check the requests, start loading their adapters, and queue them; ``wait`` makes them.

        Raises SizeNotSupported, SettingNotSupported, and LoraInvalid for a file that does not exist.
        """
        ticket = self._intake.ticket(requests, on_step, should_stop)
        with self._changed:
            self._live.append(ticket)
            self._inbox.append(ticket)
            self._changed.notify_all()
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """Until ``ticket`` is finished, driving the engine while nobody else does."""
        while not ticket.finished:
            with self._changed:
                self._changed.wait_for(lambda: ticket.finished or not self._driving)
                if ticket.finished:
                    return
                self._driving = True
            try:
                self._drive(ticket)
            finally:
                with self._changed:
                    self._driving = False
                    self._changed.notify_all()

    def step(self) -> bool:
        """One iteration: admit, join, one denoiser call, leave. False where there was nothing to denoise.

        For callers that drive the engine themselves, from one thread.
        """
        with torch.no_grad():
            self._check_stops()
            self._admit()
            group = self._order.next()
            if group is not None:
                with self._turns, self._calling():
                    self._iteration_began = self._clock()
                    try:
                        self._iterate(group)
                    finally:
                        self._iteration_began = None
        return group is not None

    def iteration_s(self) -> float:
        """How long the iteration under way has lasted; 0 between two. Much longer than any before: the device hangs."""
        began = self._iteration_began
        return 0.0 if began is None else self._clock() - began

    def clear_loras(self) -> None:
        """Free every adapter and every slot; layers are of their own class again. Waits for the pictures under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._driving)
            self._slots.remove()
            self.adapters.clear()

    def close(self) -> None:
        """Free what ``clear_loras`` frees, and the threads that load."""
        self.clear_loras()
        self.adapters.close()

    # -- the loop

    def _drive(self, ticket: Ticket) -> None:
        """Until ``ticket`` is finished. An error that belongs to no ticket ends all of them, and is raised."""
        try:
            with at_rest(self.family):
                try:
                    while not ticket.finished:
                        if not self.step():
                            self._await_adapters()
                finally:
                    self._slots.release()
                    self._denoiser.forget()
        except BaseException as error:
            for live in list(self._live):
                self._finish(live, error)
            raise

    def _await_adapters(self) -> None:
        with self._changed:
            waiting = [ticket for ticket in self._inbox if not ticket.adapters_ready]
            if waiting and len(waiting) == len(self._inbox):
                self._changed.wait(LOAD_POLL_S)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _check_stops(self) -> None:
        for ticket in list(self._live):
            self._attempt([ticket], ticket.check_stop)

    def _admit(self) -> None:
        """Queue the tickets whose adapters are there; the others do not hold them up."""
        for _ in range(len(self._inbox)):
            with self._changed:
                ticket = self._inbox.popleft()
                if not ticket.finished and not ticket.adapters_ready:
                    self._inbox.append(ticket)
                    continue
            if not ticket.finished and self._attempt([ticket], ticket.assign_adapters):
                self._order.add(ticket)
                if not ticket.samples:
                    self._finish(ticket)

    def _iterate(self, group: Group) -> None:
        self._join(group)
        if not group.active:
            return
        samples = list(group.active)
        tickets = {sample: self._ticket_of(sample) for sample in samples}
        self._order.charge(group, sum(sample.rows for sample in samples))
        answers: dict[Sample, torch.Tensor | Shortage] = {}
        self._together(tickets, lambda own: answers.update(self._predicted(own, group)))
        for sample, answer in answers.items():
            if tickets[sample].finished:
                continue
            if isinstance(answer, Shortage):
                self._finish(tickets[sample], answer.error(*size_of(sample.request)))
            else:
                self._attempt([tickets[sample]], partial(sample.advance, answer))
        self._leave(group, {sample: tickets[sample] for sample in samples if sample.done})
        moved = [tickets[sample] for sample in samples if not tickets[sample].finished]
        for ticket in dict.fromkeys(moved):
            self._attempt([ticket], partial(ticket.count, moved.count(ticket)))
            if len(ticket.rendered) == len(ticket.samples):
                self._finish(ticket)

    def _predicted(self, samples: Sequence[Sample], group: Group) -> dict[Sample, torch.Tensor | Shortage]:
        return dict(zip(samples, self._denoiser.predict(samples, table=group.shape), strict=True))

    def _leave(self, group: Group, done: Mapping[Sample, Ticket]) -> None:
        """Those that are done leave the batch as pictures."""
        samples = [sample for sample, ticket in done.items() if not ticket.finished]
        group.leave(set(samples))
        tickets = list(dict.fromkeys(done[sample] for sample in samples))
        pixels: list[torch.Tensor | Shortage] = []
        if not samples or not self._attempt(tickets, lambda: pixels.extend(self._decode(samples))):
            return
        for sample, pixels_CHW in zip(samples, pixels, strict=True):
            ticket = done[sample]
            if isinstance(pixels_CHW, Shortage):
                self._finish(ticket, pixels_CHW.error(*size_of(sample.request)))
            elif not ticket.finished:
                self._attempt([ticket], partial(self._keep, ticket, sample, pixels_CHW))

    def _decode(self, samples: Sequence[Sample]) -> list[torch.Tensor | Shortage]:
        return self._decoder.decode([sample.latents for sample in samples])

    def _keep(self, ticket: Ticket, sample: Sample, pixels_CHW: torch.Tensor) -> None:
        ticket.rendered[sample.index] = sample.rendered(pixels_CHW)

    def _join(self, group: Group) -> None:
        """Fill the batch up and encode the prompts of those who join."""
        joining: list[tuple[Ticket, Sample]] = []
        while len(group.active) + len(joining) < self._limits.of(group.shape):
            waiting = group.next_waiting()
            if waiting is None:
                break
            joining.append(waiting)
        self._together({sample: ticket for ticket, sample in joining}, partial(self._begin, group))

    def _begin(self, group: Group, samples: Sequence[Sample]) -> None:
        for sample, text in zip(samples, self._prompts.encode(samples), strict=True):
            if sample.text is None:
                sample.begin(text)
        group.active += samples

    def _together(self, owners: Mapping[Sample, Ticket], work: Callable[[Sequence[Sample]], None]) -> None:
        """``work`` on all samples; where that fails, on each ticket's own, so that an error meets its own request."""
        tickets = list(dict.fromkeys(owners.values()))
        if len(tickets) > 1 and self._attempt([], partial(work, list(owners))):
            return
        for ticket in tickets:
            self._attempt([ticket], partial(work, [sample for sample, owner in owners.items() if owner is ticket]))

    def _attempt(self, tickets: Sequence[Ticket], work: Callable[[], None]) -> bool:
        """Whether ``work`` went well; where it did not, its error ends ``tickets``. Exceptions that are no Exception
        (an interrupt) pass through."""
        try:
            work()
        except torch.OutOfMemoryError:
            error: Exception | None = None
        except Exception as exc:  # noqa: BLE001 - it is raised where the ticket's pictures are asked for
            error = exc
            if not tickets:
                logger.warning("work on several requests failed (%s): each is tried alone", type(exc).__name__)
        else:
            return True
        if error is None:
            self._admission.memory.give_back()
        for ticket in tickets:
            self._finish(ticket, error or self._out_of_memory(*ticket.samples))
        return False

    def _finish(self, ticket: Ticket, error: BaseException | None = None) -> None:
        if ticket.finished:
            return
        self._order.remove(ticket)
        ticket.error = error
        ticket.release(self.adapters)
        with self._changed:
            self._live.remove(ticket)
            ticket.finished = True
            self._changed.notify_all()

    def _ticket_of(self, sample: Sample) -> Ticket:
        return next(ticket for ticket in self._live if sample in ticket.samples)

    def _out_of_memory(self, *samples: Sample) -> OutOfGpuMemory:
        width, height = max((size_of(sample.request) for sample in samples), key=math.prod)
        memory = self._admission.memory.measure()
        return OutOfGpuMemory(len(samples), width, height, memory.free_bytes, memory.total_bytes)
