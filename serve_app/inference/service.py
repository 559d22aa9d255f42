"""Makes the pictures of one generation: adapters in, engine, files out. Runs without Ray; imports torch."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.engine import GeneratedImage, GenerateRequest, LoraRef
from diffusion.images import CONTENT_TYPES, EXTENSIONS, ImageFormat, encode_image, read_image
from serve_app.collaborators import InferenceHealth
from serve_app.inference.engines import DeviceFacts, EngineShelf
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.plan import GenerationRequest, GenerationWork, StartingPoint, StoredPicture
from serve_app.validation.decoder import FORMATS as FORMATS_READ
from storage.errors import StorageError
from storage.keys import Keys
from storage.objects import ObjectStore, PutItem
from storage.patience import Patience

SEED_LIMIT = 2**63
WAITING = {"progress": {"step": 0, "total_steps": 0, "stage": "waiting for storage"}}
STORING = {"progress": {"step": 1, "total_steps": 1, "stage": "storing"}}
FORMATS: Mapping[str, ImageFormat] = {"png": "png", "jpg": "jpeg", "webp": "webp"}


@dataclass(frozen=True)
class Start:
    """The pictures of a StartingPoint, opened."""

    init_image: Image.Image
    mask: Image.Image | None
    strength: float


@dataclass
class _Inputs:
    paths: Sequence[Path] = ()
    start: Start | None = None


class InferenceService:
    """One replica's work.

    Each generation waits on a thread of its own, and the engine makes what all of them ask in shared batches; the event
    loop stays free for files and progress.
    """

    def __init__(
        self,
        *,
        store: ObjectStore,
        keys_of: Callable[[str], Keys],
        shelf: EngineShelf,
        loras: LoraCache,
        device: Callable[[], DeviceFacts],
        threads: int = 16,
        stuck_after_s: float = 600.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        self._store = store
        self._keys_of = keys_of
        self._shelf = shelf
        self._loras = loras
        self._device = device
        self._stuck_after_s = stuck_after_s
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="engine")

    async def load(self, model: str) -> None:
        """Load a model ahead of the first request. Raises DiffusionError, KeyError for an unknown alias."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self._shelf.load, model)

    async def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        """Yields `{"progress": {"step", "total_steps", "stage"}}`, then `{"output": {"images": [...]}}` once.

        Raises DiffusionError and StorageError. While the object storage is away it waits, before and after the engine's
        work. Closing the iterator, or cancelling the task that reads it, stops the engine before its next step; nothing
        is stored then.
        """
        request = GenerationRequest.model_validate(work.request)
        async with AsyncExitStack() as borrowed:
            inputs, images = _Inputs(), list[GeneratedImage]()

            async def fetch() -> None:
                inputs.paths = await borrowed.enter_async_context(self._loras.borrow(request.loras))
                inputs.start = await self._opened(request.start)

            async with aclosing(self._patiently(fetch)) as waits:
                async for waiting in waits:
                    yield waiting
            pictures = requested_pictures(request, inputs.paths, inputs.start)
            async with aclosing(self._rendered(str(request.spec.model), pictures)) as events:
                async for event in events:
                    if isinstance(event, list):
                        images = event
                    else:
                        yield {"progress": event}
        yield STORING
        entries: list[dict[str, Any]] = []

        async def store() -> None:
            entries[:] = await self._stored(work, request, images)

        has_waited = False
        async with aclosing(self._patiently(store)) as waits:
            async for waiting in waits:
                has_waited = True
                yield waiting
        if has_waited:
            # The last that is told of a job should not be that it waits.
            yield STORING
        yield {"output": {"images": entries}}

    async def health(self) -> InferenceHealth:
        """Not ok while one iteration of an engine lasts for `stuck_after_s`: its device hangs."""
        facts = await asyncio.to_thread(self._device)
        return InferenceHealth(
            ok=self._shelf.longest_iteration_s() < self._stuck_after_s,
            device=facts.device,
            gpu_name=facts.gpu_name,
            models_loaded=self._shelf.loaded,
            gpu_memory_total_bytes=facts.memory_total_bytes,
            gpu_memory_used_bytes=facts.memory_used_bytes,
        )

    async def _patiently(self, work: Callable[[], Awaitable[None]]) -> AsyncGenerator[dict[str, Any], None]:
        """Do the work, again when the object storage has been away. Yields an event whenever it waits."""
        patience = Patience(self._store)
        while True:
            try:
                await work()
            except StorageError as error:
                wait_s = await patience.wait_s(error)
            else:
                return
            yield WAITING
            await self._sleep(wait_s)

    async def _opened(self, start: StartingPoint | None) -> Start | None:
        """Raises StorageError."""
        if start is None:
            return None
        init_image = await self._picture(start.init_image)
        return Start(init_image, None if start.mask is None else await self._picture(start.mask), start.strength)

    async def _picture(self, stored: StoredPicture) -> Image.Image:
        data = await self._store.get(stored.key, expected_sha256=stored.sha256)
        return await asyncio.to_thread(_upright, data)

    async def _rendered(
        self, model: str, pictures: Sequence[GenerateRequest]
    ) -> AsyncGenerator[dict[str, Any] | list[GeneratedImage], None]:
        """Progress while the engine runs, then its pictures. The engine has let go of its inputs when this ends."""
        loop = asyncio.get_running_loop()
        stop = threading.Event()
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def on_step(step: int, total: int) -> None:
            progress = {"step": step, "total_steps": total, "stage": "denoising"}
            loop.call_soon_threadsafe(events.put_nowait, progress)

        def run() -> list[GeneratedImage]:
            if stop.is_set():
                return []
            with self._shelf.using(model) as engine:
                return engine.generate(pictures, on_step=on_step, should_stop=stop.is_set)

        running = loop.run_in_executor(self._threads, run)
        running.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (progress := await events.get()) is not None:
                yield progress
            yield running.result()
        finally:
            stop.set()
            # The adapters' files must outlive the thread that reads them.
            await asyncio.wait({running})
            if not running.cancelled():
                # Marks an error that nobody reads any more, once the reader has gone, as seen.
                running.exception()

    async def _stored(
        self, work: GenerationWork, request: GenerationRequest, images: Sequence[GeneratedImage]
    ) -> list[dict[str, Any]]:
        """Encode, store and verify every picture; returns one entry each. Raises StorageError if any was not stored."""
        keys = self._keys_of(work.tenant)
        kind = FORMATS[request.spec.output_format]
        encoded = await asyncio.to_thread(
            lambda: [encode_image(image.image, kind, settings=image.settings) for image in images]
        )
        entries, items = [], []
        for index, (image, data) in enumerate(zip(images, encoded, strict=True)):
            sha256 = hashlib.sha256(data).hexdigest()
            key = keys.image(work.process_id, index, sha256, EXTENSIONS[kind])
            items.append(PutItem(key, data, CONTENT_TYPES[kind]))
            entries.append(_entry(work.process_id, index, key, sha256, len(data), kind, image))
        for outcome in await self._store.put_many(items):
            if outcome.error is not None:
                raise outcome.error
        return entries


def _upright(data: bytes) -> Image.Image:
    """As cameras mean it to be seen. Validation has decoded these very bytes, within its limits."""
    return read_image(BytesIO(data), FORMATS_READ)


def requested_pictures(
    request: GenerationRequest, paths: Sequence[Path], start: Start | None = None
) -> list[GenerateRequest]:
    """One engine request per picture: all prompts, `num_images` each; picture `i` uses seed `seed + i`."""
    spec = request.spec
    loras = tuple(LoraRef(path, lora.scale, lora.name) for path, lora in zip(paths, request.loras, strict=True))
    prompts = [prompt for prompt in spec.prompts for _ in range(spec.num_images)]
    pictures = [
        GenerateRequest(
            prompt=prompt,
            negative_prompt=spec.negative_prompt,
            width=spec.width,
            height=spec.height,
            steps=spec.num_inference_steps,
            guidance_scale=spec.guidance_scale,
            seed=((spec.seed or 0) + index) % SEED_LIMIT,
            loras=loras,
            scheduler=spec.scheduler,
            first_block_cache=spec.first_block_cache,
        )
        for index, prompt in enumerate(prompts)
    ]
    if start is None:
        return pictures
    return [
        replace(picture, init_image=start.init_image, mask=start.mask, strength=start.strength) for picture in pictures
    ]


def _entry(
    process_id: str, index: int, key: str, sha256: str, size_bytes: int, kind: ImageFormat, image: GeneratedImage
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "key": key,
        "filename": f"{process_id}_{index:04d}.{EXTENSIONS[kind]}",
        "sha256": sha256,
        "size_bytes": size_bytes,
        "content_type": CONTENT_TYPES[kind],
        "seed": image.seed,
        "width": image.image.width,
        "height": image.image.height,
        "prompt": image.settings.get("prompt", ""),
        "settings": image.settings,
    }
    if image.warnings:
        entry["warnings"] = list(image.warnings)
    return entry
