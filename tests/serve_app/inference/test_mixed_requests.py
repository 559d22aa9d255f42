"""A replica with the real engine: fifty generations at once, twenty LoRAs, each picture as its request gives alone."""

from __future__ import annotations

import asyncio
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import Family, load_family
from diffusion.lora import save_lora
from serve_app.inference.engines import DeviceFacts, EngineShelf
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.plan import GenerationRequest, GenerationWork, ResolvedLora
from serve_app.inference.service import InferenceService
from serve_app.settings import TINY_MODEL
from serve_app.testing import keys_of
from storage.testing import InMemoryStore
from train_jobs.generate_spec import GenerateSpec

LORAS, REQUESTS = 20, 50
PREFIX = "raylora/matt/loras"


def write_loras(family: Family, folder: Path) -> list[Path]:
    """Of mixed ranks, every fourth on the text encoder as well."""
    paths = []
    for i in range(LORAS):
        components = ("unet", "text_encoder") if i % 4 == 0 else ("unet",)
        lora = attach_lora(family, rank=1 + i % 8, alpha=4, seed=i, components=components)
        generator = torch.Generator().manual_seed(i)
        state = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in lora.state_dict().items()}
        paths.append(folder / f"lora{i}.safetensors")
        save_lora(paths[-1], state, metadata=lora.metadata(title=f"lora{i}"))
        lora.detach()
    return paths


def drawn(index: int, rng: random.Random) -> GenerationRequest:
    spec = GenerateSpec(
        prompts=(rng.choice(("a large red star on a blue background", "a small green circle")),), model="tiny",
        width=64, height=64, num_inference_steps=rng.randint(1, 3), guidance_scale=rng.choice((1.0, 3.0)), seed=index,
    )  # fmt: skip
    used = {index % LORAS: 0.5, **({rng.randrange(LORAS): 0.25} if index % 5 == 0 else {})}
    loras = tuple(
        ResolvedLora(id=None, key=f"{PREFIX}/lora{i}.safetensors", sha256=None, scale=scale)
        for i, scale in used.items()
    )
    return GenerationRequest(spec=spec, loras=loras)


async def test_fifty_generations_at_once_with_twenty_loras_each_get_their_solo_picture(tmp_path: Path) -> None:
    family = load_family(TINY_MODEL, device="cpu", dtype=torch.float32)
    paths = write_loras(family, tmp_path)
    store = InMemoryStore()
    for path in paths:
        await store.put(f"{PREFIX}/{path.name}", path.read_bytes())
    service = InferenceService(
        store=store, keys_of=keys_of, shelf=EngineShelf({"tiny": "tiny"}, lambda _: Engine(family)),
        loras=LoraCache(store, tmp_path / "cache", bytes_max=10**9), device=lambda: DeviceFacts("cpu"),
    )  # fmt: skip
    batches: list[int] = []
    watch = family.denoiser.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    rng = random.Random(7)
    requests = [drawn(index, rng) for index in range(REQUESTS)]

    async def generated(index: int) -> dict[str, Any]:
        work = GenerationWork(f"gen_{index:012x}", "matt", requests[index].as_json())
        events = [event async for event in service.generate(work)]
        image: dict[str, Any] = events[-1]["output"]["images"][0]
        return image

    images = await asyncio.gather(*map(generated, range(REQUESTS)))
    watch.remove()
    steps = sum(request.spec.num_inference_steps for request in requests)
    assert len(batches) < steps / 2  # most calls were shared
    engine = Engine(family)
    for request, image in zip(requests, images, strict=True):
        spec = request.spec
        [alone] = engine.generate(
            [
                GenerateRequest(
                    prompt=spec.prompts[0], width=64, height=64, steps=spec.num_inference_steps,
                    guidance_scale=spec.guidance_scale, seed=spec.seed or 0,
                    loras=tuple(LoraRef(tmp_path / Path(use.key).name, use.scale) for use in request.loras),
                )
            ]
        )  # fmt: skip
        served = np.asarray(Image.open(io.BytesIO(await store.get(image["key"])))).astype(int)
        # One level: where rounding to bytes meets the noise of batching.
        assert np.abs(served - np.asarray(alone.image).astype(int)).max() <= 1, request
