"""Preview pictures of an adapter in training, made by the serving engine."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion.adapter import TrainableLora
from diffusion.engine import Engine, GenerateRequest, LoraRef, size_of
from diffusion.engine.memory import UntoldMemory
from diffusion.families import Family
from diffusion.images import (
    CONTENT_TYPES,
    DECODE_ERRORS,
    EXTENSIONS,
    ImageFormat,
    encode_image,
    read_image,
    thumbnail_uri,
)
from diffusion.lora import save_lora
from storage.errors import ObjectNotFound
from train_jobs.artifacts import StoredSample
from train_jobs.spec import PreviewSpec, SampleSpec

logger = logging.getLogger(__name__)

FORMATS: dict[str, ImageFormat] = {"jpg": "jpeg", "png": "png", "webp": "webp"}
StoreSample = Callable[[int, int, str, bytes, str], str]


def store_nowhere(step: int, index: int, extension: str, data: bytes, content_type: str) -> str:
    """For a worker that makes pictures only because another, which stores them, cannot make them alone."""
    return f"{step}-{index}"


class Previews:
    """Makes the pictures of a `SampleSpec` with the adapter as it is at a step, and stores them.

    `store` takes step, index, extension, data and content type, and returns the key. Where the model `is_split` over
    the workers, pictures are made one by one, so that all workers call it in the same order.
    """

    def __init__(
        self, family: Family, lora: TrainableLora, spec: SampleSpec, *, name: str, scratch: Path, store: StoreSample,
        is_split: bool = False,
    ) -> None:  # fmt: skip
        # What one worker finds free must not decide what all of them do.
        self._engine = Engine(family, adapter_bytes_max=0, memory=UntoldMemory() if is_split else None)
        self._is_split = is_split
        self._lora = lora
        self._spec = spec
        self._name = name
        self._scratch = scratch
        self._store = store
        self.made: list[dict[str, Any]] = []
        self.thumbnail: str | None = None
        """Of the newest pictures the first, as `images.thumbnail_uri` makes it."""

    def check(self, family: Family) -> None:
        """Raises SizeNotSupported or SettingNotSupported for pictures that the model cannot make."""
        for index in range(len(self._spec.previews)):
            request = self._request(index, ())
            shape = family.latent_shape(*size_of(request))
            family.make_schedule(request.scheduler, request.steps, shape)

    def due_at(self, step: int, *, total_steps: int) -> bool:
        """Whether pictures are wanted after `step` updates: at the start, every so many steps, and at the end."""
        if not self._spec.previews:
            return False
        if step == 0:
            return self._spec.at_start
        if step == total_steps:
            return True
        return step >= self._spec.start_step and step % self._spec.every_steps == 0

    def remember(self, stored: Sequence[StoredSample], read: Callable[[str], bytes]) -> None:
        """Take over what earlier attempts made and stored, in the order of steps; `read` gets a picture by its key.

        Where the newest is damaged or gone there is no thumbnail until the next are made. Raises StorageError.
        """
        own = [sample for sample in stored if sample.index < len(self._spec.previews)]
        self.made = [self._entry(sample) for sample in own]
        if own:
            newest = min(own, key=lambda sample: (-sample.step, sample.index))
            try:
                self.thumbnail = thumbnail_uri(read_image(io.BytesIO(read(newest.key))))
            except (*DECODE_ERRORS, ObjectNotFound) as error:
                reason = type(error).__name__
                logger.warning("the preview of step %d makes no thumbnail: it cannot be read (%s)", newest.step, reason)

    def are_made(self, step: int) -> bool:
        """Whether every picture of a step is stored."""
        return [entry["step"] for entry in self.made].count(step) == len(self._spec.previews)

    def make(self, step: int, should_stop: Callable[[], bool]) -> None:
        """The adapter and its gradients are left as they were, and the model's memory to the training.

        Raises Cancelled, OutOfGpuMemory, InsufficientMemory and StorageError.
        """
        path = self._scratch / "preview.safetensors"
        save_lora(path, self._lora.file_state(), metadata=self._lora.metadata(title=self._name))
        requests = [self._request(i, (self._ref(path, p),)) for i, p in enumerate(self._spec.previews)]
        calls = [[request] for request in requests] if self._is_split else [requests]
        try:
            images = [image for call in calls for image in self._engine.generate(call, should_stop=should_stop)]
        finally:
            self._engine.clear_loras()
        kind = FORMATS[self._spec.format]
        for index, image in enumerate(images):
            data = encode_image(image.image, kind, settings=image.settings)
            key = self._store(step, index, EXTENSIONS[kind], data, CONTENT_TYPES[kind])
            self.made = [e for e in self.made if e["key"] != key] + [self._entry(StoredSample(step, index, key))]
        self.thumbnail = thumbnail_uri(images[0].image)

    def _entry(self, sample: StoredSample) -> dict[str, Any]:
        request = self._request(sample.index, ())
        told = {"prompt": request.prompt, "seed": request.seed}
        return {"key": sample.key, "step": sample.step, "index": sample.index, **told}

    def _ref(self, path: Path, preview: PreviewSpec) -> LoraRef:
        scale = self._spec.lora_scale if preview.lora_scale is None else preview.lora_scale
        return LoraRef(path, scale, self._name)

    def _request(self, index: int, loras: tuple[LoraRef, ...]) -> GenerateRequest:
        spec, preview = self._spec, self._spec.previews[index]
        walked = spec.seed + index if spec.walk_seed else spec.seed
        negative = spec.negative_prompt if preview.negative_prompt is None else preview.negative_prompt
        guidance = spec.guidance_scale if preview.guidance_scale is None else preview.guidance_scale
        return GenerateRequest(
            prompt=preview.prompt,
            negative_prompt=negative,
            width=preview.width_px or spec.width_px,
            height=preview.height_px or spec.height_px,
            steps=preview.steps or spec.steps,
            guidance_scale=guidance,
            seed=walked if preview.seed is None else preview.seed,
            scheduler=spec.scheduler,
            loras=loras,
        )
