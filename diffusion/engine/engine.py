"""Iteration-level batching: samples join and leave between denoiser calls, each with its own steps, seed and guidance.

One denoiser call per iteration covers every active sample, each at its own timestep. Samples share a batch when their
latent shape and their LoRAs agree.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from diffusion.engine.lora_pool import LoraPool
from diffusion.engine.request import GeneratedImage, GenerateRequest, LoraRef, RenderedImage, size_of
from diffusion.engine.sample import Sample
from diffusion.errors import Cancelled, OutOfGpuMemory, SettingNotSupported
from diffusion.families.base import Family, TextEmbeds

SEED_MAX = 2**63 - 1
BatchKey = tuple[tuple[int, ...], tuple[LoraRef, ...]]
OnStep = Callable[[int, int], None]
ShouldStop = Callable[[], bool]


class Engine:
    """Makes pictures with one family. Calls from several threads wait for one another.

    ``batch_max`` bounds the pictures in one denoiser call; the others wait and join as places become free.
    """

    def __init__(self, family: Family, *, batch_max: int = 8, loras_max: int = 4) -> None:
        self.family = family
        self._batch_max = batch_max
        self._loras = LoraPool(family, loras_max)
        self._lock = threading.Lock()

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
        ``should_stop`` are called on this thread between denoiser calls. All requests succeed or none does.

        Raises SizeNotSupported and SettingNotSupported before any work, LoraInvalid, LoraMismatch, Cancelled,
        OutOfGpuMemory.
        """
        requests = [self._sized(request) for request in requests]
        try:
            with self._lock, torch.no_grad(), _eval_mode(self.family):
                batches = self._plan(requests)
                progress = _Progress([s for samples in batches.values() for s in samples], on_step, should_stop)
                finished: dict[int, RenderedImage] = {}
                for (_, loras), samples in batches.items():
                    progress.check()
                    with self._loras.active(loras):
                        finished |= {s.index: self._rendered(s, pixels) for s, pixels in self._run(samples, progress)}
            return [finished[index] for index in range(len(requests))]
        except torch.OutOfMemoryError:
            failure = self._out_of_memory(requests)
        # Outside the except clause: a chained exception would keep the frames, and so the tensors, alive.
        torch.cuda.empty_cache()  # does nothing where there is no CUDA
        raise failure

    def clear_loras(self) -> None:
        """Free every loaded LoRA; the next request that needs one reads its file again."""
        with self._lock:
            self._loras.clear()

    def _sized(self, request: GenerateRequest) -> GenerateRequest:
        """The request with the model's own size where it names none."""
        native = self.family.native_size_px
        return replace(
            request,
            width=native if request.width is None else request.width,
            height=native if request.height is None else request.height,
        )

    def _plan(self, requests: Sequence[GenerateRequest]) -> dict[BatchKey, list[Sample]]:
        """Checked samples by what may share a batch, in order of arrival."""
        batches: dict[BatchKey, list[Sample]] = {}
        for index, request in enumerate(requests):
            shape = self.family.latent_shape(*size_of(request))
            if not 0 <= request.seed <= SEED_MAX:
                raise SettingNotSupported("seed", f"must be between 0 and {SEED_MAX}")
            schedule = self.family.make_schedule(request.scheduler, request.steps, shape)
            sample = Sample(self.family, request, index, schedule)
            batches.setdefault((shape, tuple(request.loras)), []).append(sample)
        return batches

    def _run(self, samples: Sequence[Sample], progress: _Progress) -> Iterator[tuple[Sample, torch.Tensor]]:
        """Drive samples that share shape and LoRAs; yields each with its pixels when it is done."""
        waiting, active = deque(samples), list[Sample]()
        while waiting or active:
            progress.check()
            joining = [waiting.popleft() for _ in range(min(len(waiting), self._batch_max - len(active)))]
            active += joining
            self._begin(joining)
            self._denoise(active)
            leaving = [(sample, self._decode(sample)) for sample in active if sample.done]
            active = [sample for sample in active if not sample.done]
            progress.advance(len(active) + len(leaving))
            yield from leaving

    def _begin(self, samples: Sequence[Sample]) -> None:
        """Encode the prompts of samples that join, each distinct text once."""
        if not samples:
            return
        texts = [_texts(sample) for sample in samples]
        distinct = list(dict.fromkeys(text for pair in texts for text in pair))
        embeds = self.family.encode_prompts(distinct)
        for sample, pair in zip(samples, texts, strict=True):
            sample.begin(embeds.rows([distinct.index(text) for text in pair]))

    def _denoise(self, active: Sequence[Sample]) -> None:
        """One denoiser call for all of them."""
        rows = [sample.rows for sample in active]
        device = self.family.device
        per_sample = torch.tensor([[float(s.timestep), s.request.guidance_scale] for s in active])
        # [B, 2] -> a row per denoiser row, in one transfer
        timesteps_B, guidance_B = per_sample.repeat_interleave(torch.tensor(rows), dim=0).to(device).unbind(1)
        predictions_BCHW = self.family.predict(
            torch.cat([sample.denoiser_input() for sample in active]),
            timesteps_B,
            TextEmbeds.cat([sample.text for sample in active if sample.text is not None]),
            guidance_B=guidance_B,
        )
        for sample, prediction in zip(active, torch.split(predictions_BCHW, rows), strict=True):
            sample.advance(prediction)

    def _decode(self, sample: Sample) -> torch.Tensor:
        # One at a time: the VAE's activations, not the denoiser's, are the peak of memory.
        return self.family.decode(sample.latents)[0].cpu()

    def _out_of_memory(self, requests: Sequence[GenerateRequest]) -> OutOfGpuMemory:
        device, (width, height) = self.family.device, max(map(size_of, requests), key=math.prod)
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
        return OutOfGpuMemory(min(len(requests), self._batch_max), width, height, free, total)

    def _rendered(self, sample: Sample, pixels_CHW: torch.Tensor) -> RenderedImage:
        request = sample.request
        texts = {"prompt": request.prompt}
        if self.family.uses_negative_prompt(request.guidance_scale):
            texts["negative prompt"] = request.negative_prompt
        cut = {field: self.family.truncated_text(text) for field, text in texts.items()}
        warnings = tuple(f"the {field} is too long; left out: {text}" for field, text in cut.items() if text)
        return RenderedImage(pixels_CHW, request, warnings)


class _Progress:
    """Counts denoising steps over all samples, tells the caller, and asks whether to stop."""

    def __init__(self, samples: Sequence[Sample], on_step: OnStep | None, should_stop: ShouldStop | None) -> None:
        self._done, self._total = 0, sum(sample.steps_total for sample in samples)
        self._on_step, self._should_stop = on_step, should_stop

    def check(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise Cancelled(self._done, self._total)

    def advance(self, steps: int) -> None:
        self._done += steps
        if self._on_step is not None:
            self._on_step(self._done, self._total)


@contextmanager
def _eval_mode(family: Family) -> Iterator[None]:
    """Modules in training are put into eval mode (no dropout in a preview) and back."""
    components = family.lora_components.values()
    training = [module for component in components for module in component.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _texts(sample: Sample) -> list[str]:
    negative = [sample.request.negative_prompt] if sample.uses_negative_prompt else []
    return [*negative, sample.request.prompt]


def _to_image(rendered: RenderedImage) -> GeneratedImage:
    # [C, H, W] 0..1 -> [H, W, C] bytes, rounded as diffusers does
    pixels_HWC = (rendered.pixels_CHW.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    request = rendered.request
    return GeneratedImage(Image.fromarray(pixels_HWC), request.seed, request.settings(), rendered.warnings)
