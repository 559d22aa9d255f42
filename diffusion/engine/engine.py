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
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from PIL import Image

from diffusion.engine.adapter_cache import AdapterCache, Lease
from diffusion.engine.admission import Admission, BatchLimits, Shortage
from diffusion.engine.arena import Arena, cuda_fence
from diffusion.engine.at_rest import at_rest
from diffusion.engine.decode import Decoder
from diffusion.engine.denoise import Denoiser
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.memory import DeviceMemory, device_memory
from diffusion.engine.order import FairOrder, Group
from diffusion.engine.packed import load_adapter
from diffusion.engine.prompts import Prompts
from diffusion.engine.request import GeneratedImage, GenerateRequest, RenderedImage, size_of
from diffusion.engine.sample import Sample
from diffusion.engine.start import size_near
from diffusion.engine.ticket import OnStep, ShouldStop, Ticket
from diffusion.errors import OutOfGpuMemory, SettingNotSupported
from diffusion.families.base import Family

logger = logging.getLogger(__name__)

SEED_MAX = 2**63 - 1
ADAPTER_BYTES_MAX = 2 * 2**30
GRAPHS_MAX = 128
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
        self._prompts = Prompts(family, self._slots)
        self._denoiser = Denoiser(family, self._slots, self._limits, self._admission, fixed_shapes=compiled is not None)
        self._decoder = Decoder(family, self._admission, pictures_max=decode_max, tiled=tiled)
        if compiled is not None:
            _compile(family, compiled)
        self._first_block_cache = first_block_cache if family.block_lists else 0.0
        self._clock = clock
        self._iteration_began: float | None = None
        self._order = FairOrder()
        self._changed = threading.Condition()
        self._driving = False
        self._inbox: deque[Ticket] = deque()
        self._live: list[Ticket] = []
        on_cuda = family.device.type == "cuda"
        fence = cuda_fence(family.device) if on_cuda else None
        self.adapters = AdapterCache(
            lambda stamp, allocate: load_adapter(stamp, family, allocate),
            arena=Arena(bytes_max=adapter_bytes_max, pinned=on_cuda, fence=fence),
            bytes_max=adapter_bytes_max,
            on_loaded=self._wake,
        )

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> list[GeneratedImage]:
        """One picture per request, in their order. The arguments and errors are those of ``render``."""
        return [_to_image(rendered) for rendered in self.render(requests, on_step=on_step, should_stop=should_stop)]

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
        samples = [self._sample(index, self._sized(request)) for index, request in enumerate(requests)]
        ticket = Ticket(samples, self._borrowed(samples), on_step, should_stop)
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
                with self._turns:
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

    # -- taking requests

    def _sized(self, request: GenerateRequest) -> GenerateRequest:
        """The request with its picture's size, or the model's own, where it names none."""
        width = height = self.family.native_size_px
        if request.init_image is not None:
            multiple = self.family.size_multiple
            width, height = size_near(request.init_image, multiple, request.width, request.height)
        return replace(
            request,
            width=width if request.width is None else request.width,
            height=height if request.height is None else request.height,
            first_block_cache=(
                self._first_block_cache if request.first_block_cache is None else request.first_block_cache
            ),
        )

    def _sample(self, index: int, request: GenerateRequest) -> Sample:
        shape = self.family.latent_shape(*size_of(request))
        if not 0 <= request.seed <= SEED_MAX:
            raise SettingNotSupported("seed", f"must be between 0 and {SEED_MAX}")
        if request.first_block_cache and not self.family.block_lists:
            raise SettingNotSupported("first_block_cache", f"{self.family.name} is a UNet without blocks to leave out")
        return Sample(self.family, request, index, self.family.make_schedule(request.scheduler, request.steps, shape))

    def _borrowed(self, samples: Sequence[Sample]) -> list[list[Lease]]:
        leases: list[list[Lease]] = []
        try:
            for sample in samples:
                leases.append([])
                for lora in sample.request.loras:
                    leases[-1].append(self.adapters.borrow(lora.path))
        except BaseException:
            for lease in (lease for own in leases for lease in own):
                self.adapters.release(lease)
            raise
        return leases

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
        answers = self._denoiser.predict(samples, table=group.shape)
        for sample, answer in zip(samples, answers, strict=True):
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
        ticket.rendered[sample.index] = self._rendered(sample, pixels_CHW)

    def _join(self, group: Group) -> None:
        """Fill the batch up and encode the prompts of those who join."""
        joining: list[tuple[Ticket, Sample]] = []
        while len(group.active) + len(joining) < self._limits.of(group.shape):
            waiting = group.next_waiting()
            if waiting is None:
                break
            joining.append(waiting)
        if not joining:
            return
        tickets = list(dict.fromkeys(ticket for ticket, _ in joining))
        if len(tickets) > 1 and self._attempt([], partial(self._begin, [sample for _, sample in joining])):
            group.active += [sample for _, sample in joining]
            return
        for ticket in tickets:  # one by one, so that an error meets its own request
            own = [sample for t, sample in joining if t is ticket]
            if self._attempt([ticket], partial(self._begin, own)):
                group.active += own

    def _begin(self, samples: Sequence[Sample]) -> None:
        for sample, text in zip(samples, self._prompts.encode(samples), strict=True):
            if sample.text is None:
                sample.begin(text)

    def _attempt(self, tickets: Sequence[Ticket], work: Callable[[], None]) -> bool:
        """Whether ``work`` went well; where it did not, its error ends ``tickets``. Exceptions that are no Exception
        (an interrupt) pass through."""
        try:
            work()
        except torch.OutOfMemoryError:
            error: Exception | None = None
        except Exception as exc:  # noqa: BLE001 - it is raised where the ticket's pictures are asked for
            error = exc
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

    def _rendered(self, sample: Sample, pixels_CHW: torch.Tensor) -> RenderedImage:
        request = sample.request
        texts = {"prompt": request.prompt}
        if sample.uses_negative_prompt:
            texts["negative prompt"] = request.negative_prompt
        cut = {field: self.family.truncated_text(text) for field, text in texts.items()}
        warnings = tuple(f"the {field} is too long; left out: {text}" for field, text in cut.items() if text)
        return RenderedImage(pixels_CHW, request, warnings, sample.blocks.steps_reused if sample.blocks else 0)


def _compile(family: Family, backend: str) -> None:
    """The repeated blocks only: compile time falls several times at the same speed (diffusers' regional compilation).

    Raises SettingNotSupported for a denoiser that names no such blocks.
    """
    compile_blocks = getattr(family.denoiser, "compile_repeated_blocks", None)
    if compile_blocks is None:
        raise SettingNotSupported("compile", "this model's denoiser has no repeated blocks")
    # A block is compiled once for each size of batch and level of the model; past the limit it would silently run
    # uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_MAX)
    compile_blocks(backend=backend, dynamic=False)


def _to_image(rendered: RenderedImage) -> GeneratedImage:
    # [C, H, W] 0..1 -> [H, W, C] bytes, rounded as diffusers does
    pixels_HWC = (rendered.pixels_CHW.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    request = rendered.request
    settings = request.settings()
    if request.first_block_cache:
        settings["steps_reused"] = rendered.steps_reused
    return GeneratedImage(Image.fromarray(pixels_HWC), request.seed, settings, rendered.warnings)
