"""Fifty concurrent requests with twenty different LoRAs over HTTP: each picture is the one its request gives alone."""

from __future__ import annotations

import asyncio
import io
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import Family, load_family
from diffusion.images import read_settings
from diffusion.lora import save_lora
from tests.integration.instance import REPOSITORY, Running

LORAS, REQUESTS = 20, 50
PROMPTS = ("a large red star on a blue background", "a small green circle on a white background")


@pytest.fixture(scope="module")
def family() -> Family:
    return load_family(REPOSITORY / "assets" / "tiny" / "model", device="cpu", dtype=torch.float32)


def write_loras(family: Family, folder: Path) -> list[Path]:
    """Of mixed ranks, on mixed layers, every fourth on the text encoder as well."""
    paths = []
    for i in range(LORAS):
        lora = attach_lora(
            family, rank=1 + i % 8, alpha=4, seed=i, targets=("attention", "all")[i % 2],
            components=("unet", "text_encoder") if i % 4 == 0 else ("unet",),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(i)
        state = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in lora.state_dict().items()}
        paths.append(folder / f"lora{i}.safetensors")
        save_lora(paths[-1], state, metadata=lora.metadata(title=f"lora{i}"))
        lora.detach()
    return paths


def import_lora(http: httpx.Client, path: Path) -> str:
    asked = {"name": path.stem, "filename": path.name, "size_bytes": path.stat().st_size}
    started = http.post("/v1/loras/import", json=asked).raise_for_status().json()
    upload = started["upload"]
    httpx.put(upload["url"], content=path.read_bytes(), headers=upload["headers"]).raise_for_status()
    http.post(f"/v1/loras/{started['id']}/finish").raise_for_status()
    return str(started["id"])


def bodies(ids: list[str]) -> list[dict[str, Any]]:
    rng = random.Random(7)
    return [
        {
            "prompt": rng.choice(PROMPTS),
            "width": 64,
            "height": 64,
            "num_inference_steps": rng.randint(2, 5),
            "guidance_scale": rng.choice((1.0, 3.0)),
            "seed": i,
            "loras": [
                {"id": ids[i % LORAS], "scale": 0.5},
                *([{"id": ids[i % 7], "scale": 0.25}] if i % 5 == 0 else []),
            ],
        }
        for i in range(REQUESTS)
    ]


async def generated(running: Running, asked: list[dict[str, Any]]) -> list[bytes]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    async with httpx.AsyncClient(base_url=running.url, headers=headers, timeout=120) as http:

        async def one(body: dict[str, Any]) -> bytes:
            view = (await http.post("/v1/generations", params={"wait": 60}, json=body)).raise_for_status().json()
            while view["state"] in {"QUEUED", "STARTING", "RUNNING"}:
                reply = await http.get(f"/v1/generations/{view['id']}", params={"wait": 60})
                view = reply.raise_for_status().json()
            assert view["state"] == "COMPLETED", view
            async with httpx.AsyncClient() as files:
                return (await files.get(view["images"][0]["url"])).raise_for_status().content

        return list(await asyncio.gather(*map(one, asked)))


async def test_fifty_concurrent_requests_with_twenty_loras_each_get_their_solo_picture(
    running: Running, family: Family, tmp_path: Path
) -> None:
    paths = write_loras(family, tmp_path)
    with httpx.Client(base_url=running.url, headers={"Authorization": f"Bearer {running.api_key}"}, timeout=60) as http:
        ids = [import_lora(http, path) for path in paths]
    asked = bodies(ids)
    files = await generated(running, asked)
    engine = Engine(family)
    path_of = dict(zip(ids, paths, strict=True))
    for body, data in zip(asked, files, strict=True):
        [alone] = engine.generate(
            [
                GenerateRequest(
                    prompt=body["prompt"], width=64, height=64, steps=body["num_inference_steps"],
                    guidance_scale=body["guidance_scale"], seed=body["seed"],
                    loras=tuple(LoraRef(path_of[use["id"]], use["scale"]) for use in body["loras"]),
                )
            ]
        )  # fmt: skip
        served = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        # One level: where rounding to bytes meets the noise of batching.
        assert np.abs(served - np.asarray(alone.image).astype(int)).max() <= 1, body
        settings = read_settings(data)
        assert settings is not None
        assert settings["seed"] == body["seed"]
