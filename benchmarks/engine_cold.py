"""A generation whose adapter is only in S3, beside one whose adapter the replica has: the whole replica without Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path

from diffusion.engine import Engine
from diffusion.families import Family
from serve_app.inference.engines import DeviceFacts, EngineShelf
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.plan import GenerationRequest, GenerationWork, ResolvedLora
from serve_app.inference.service import InferenceService
from storage.embedded import EmbeddedS3
from storage.keys import Keys
from storage.s3 import S3Store
from storage.settings import S3Settings
from train_jobs.generate_spec import GenerateSpec

LATENCY_MS, MB_PER_S = 30.0, 200.0
OTHERS = 12
"""Generations that are there before: a full batch, and half a batch that waits."""


@contextmanager
def far(settings: S3Settings) -> Iterator[S3Settings]:
    """The same server behind the proxy."""
    script = Path(__file__).with_name("latency_proxy.py")
    port = str(settings.endpoint_url).rpartition(":")[2]
    proxy = subprocess.Popen(
        [sys.executable, script, "--target-port", port, "--latency-ms", str(LATENCY_MS), "--mb-per-s", str(MB_PER_S)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert proxy.stdout is not None
    try:
        yield settings.model_copy(update={"endpoint_url": f"http://127.0.0.1:{proxy.stdout.readline().strip()}"})
    finally:
        proxy.communicate()


@asynccontextmanager
async def replica(family: Family, settings: S3Settings, folder: Path) -> AsyncIterator[tuple[InferenceService, Engine]]:
    async with S3Store(settings) as store:
        engine = Engine(family, batch_max=8)
        shelf = EngineShelf({"model": ""}, lambda _: engine)
        service = InferenceService(
            store=store,
            keys_of=lambda tenant: Keys(settings.prefix, tenant),
            shelf=shelf,
            loras=LoraCache(store, folder / "loras", bytes_max=2**34),
            device=lambda: DeviceFacts("cpu"),
            threads=OTHERS + 4,
        )
        yield service, engine
        engine.close()


def cold_adapter_latencies(
    family: Family, paths: Sequence[Path], *, folder: Path, rounds: int, side_px: int, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds from asking to the stored picture, cold and warm, alternating."""

    async def run(near: S3Settings, settings: S3Settings) -> tuple[list[float], list[float]]:
        async with S3Store(near) as store:
            await store.ensure_bucket()

        async def upload(path: Path, name: str) -> ResolvedLora:
            # Under a key of its own: nothing in the replica knows this adapter.
            async with S3Store(near) as store:
                data = await asyncio.to_thread(path.read_bytes)
                await store.put(f"{near.prefix}/bench/{name}", data)
            return ResolvedLora(id=None, key=f"{near.prefix}/bench/{name}", sha256=sha256(data).hexdigest(), scale=1.0)

        def work(seed: int, lora: ResolvedLora) -> GenerationWork:
            spec = GenerateSpec(
                prompts=(f"number {seed % 7}",), model="model", width=side_px, height=side_px,
                num_inference_steps=steps, guidance_scale=5.0, seed=seed,
            )  # fmt: skip
            return GenerationWork(f"gen_{seed}", "bench", GenerationRequest(spec=spec, loras=(lora,)).as_json())

        async with replica(family, settings, folder) as (service, engine):

            async def generate(seed: int, lora: ResolvedLora) -> float:
                start = time.perf_counter()
                async for _ in service.generate(work(seed, lora)):
                    pass
                return time.perf_counter() - start

            async def behind_others(lora: ResolvedLora) -> float:
                others = [asyncio.create_task(generate(100 + i, known[i % len(known)])) for i in range(OTHERS)]
                while len(engine._live) < OTHERS:  # noqa: ASYNC110 - the engine tells nobody
                    await asyncio.sleep(0.001)
                taken = await generate(0, lora)
                await asyncio.gather(*others)
                return taken

            known = [await upload(path, f"known{i}") for i, path in enumerate(paths[:5])]
            await asyncio.gather(*(generate(i, lora) for i, lora in enumerate(known)))
            cold, warm = [], []
            for index in range(rounds):
                cold.append(await behind_others(await upload(paths[2], f"cold{index}")))
                warm.append(await behind_others(known[2]))
            return cold, warm

    with EmbeddedS3(folder / "s3", 0) as server, far(server.settings()) as settings:
        return asyncio.run(run(server.settings(), settings))
