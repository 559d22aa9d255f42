"""Preview pictures of an adapter in training, made by the serving engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion.adapter import TrainableLora
from diffusion.engine import Engine, GenerateRequest, LoraRef, size_of
from diffusion.engine.memory import UntoldMemory
from diffusion.families import Family
from diffusion.images import CONTENT_TYPES, EXTENSIONS, ImageFormat, encode_image
from diffusion.lora import save_lora
from train_jobs.spec import PreviewSpec, SampleSpec

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

    def make(self, step: int, should_stop: Callable[[], bool]) -> None:
        """The adapter and its gradients are left as they were.

        Raises Cancelled, OutOfGpuMemory, InsufficientMemory and StorageError.
        """
        path = self._scratch / "preview.safetensors"
        save_lora(path, self._lora.file_state(), metadata=self._lora.metadata(title=self._name))
        requests = [self._request(i, (self._ref(path, p),)) for i, p in enumerate(self._spec.previews)]
        calls = [[request] for request in requests] if self._is_split else [requests]
        images = [image for call in calls for image in self._engine.generate(call, should_stop=should_stop)]
        kind = FORMATS[self._spec.format]
        for index, image in enumerate(images):
            data = encode_image(image.image, kind, settings=image.settings)
            key = self._store(step, index, EXTENSIONS[kind], data, CONTENT_TYPES[kind])
            entry = {"key": key, "step": step, "index": index, "prompt": requests[index].prompt, "seed": image.seed}
            self.made = [e for e in self.made if e["key"] != key] + [entry]

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
