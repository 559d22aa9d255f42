"""Random requests that join, leave and are cancelled: each picture is the one that its request gives alone.

``--mixes 200`` tries as many; the seeds are the numbers of the mixes, so a failing one can be run again.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.ticket import Ticket
from diffusion.errors import Cancelled
from diffusion.families import StableDiffusion1
from diffusion.families.discrete import SCHEDULERS

TOLERANCE = 1e-4
SIZES = ((64, 64), (64, 64), (64, 64), (32, 48), (72, 40))
RANKS = (1, 2, 3, 5, 8, 12)
WriteLora = Callable[..., Path]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mix" in metafunc.fixturenames:
        metafunc.parametrize("mix", range(metafunc.config.getoption("--mixes")))


@pytest.fixture
def lora_paths(write_lora: WriteLora) -> list[Path]:
    components = (("unet",), ("unet", "text_encoder"), ("text_encoder",))
    return [
        write_lora(f"lora{i}", seed=i, rank=rank, alpha=rank, targets=("attention", "all")[i % 2],
                   components=components[i % 3])
        for i, rank in enumerate(RANKS)
    ]  # fmt: skip


def draw(rng: random.Random, loras: list[Path]) -> GenerateRequest:
    width, height = rng.choice(SIZES)
    chosen = rng.sample(loras, rng.choice((0, 1, 1, 1, 2, 3)))
    # The multistep solvers divide by differences of noise levels; a model of random weights makes them explode.
    scheduler = rng.choice((None, "ddim", "euler", "euler_a", "ddpm", "heun", "pndm"))
    return GenerateRequest(
        prompt=rng.choice(("a red ring", "two blue dots", "x " * 90)),
        negative_prompt=rng.choice(("", "grey")),
        width=width,
        height=height,
        steps=rng.randint(4 if scheduler == "pndm" else 1, 6),
        guidance_scale=rng.choice((1.0, 3.0, 7.5)),
        seed=rng.randrange(2**32),
        loras=tuple(LoraRef(path, round(rng.uniform(-0.6, 0.6), 2)) for path in chosen),
        scheduler=scheduler,
    )


def run_mix(engine: Engine, rng: random.Random, requests: list[GenerateRequest]) -> Iterator[tuple[int, Ticket]]:
    """Submits one request after another while the engine steps, and stops some; yields index and ticket."""
    stopped: set[int] = set()
    tickets: list[Ticket] = []
    while len(tickets) < len(requests) or not all(ticket.finished for ticket in tickets):
        if len(tickets) < len(requests) and rng.random() < 0.6:
            index = len(tickets)
            tickets.append(engine.submit([requests[index]], should_stop=lambda i=index: i in stopped))
        if tickets and rng.random() < 0.05:
            stopped.add(rng.randrange(len(tickets)))
        engine.step()
    yield from enumerate(tickets)


def stock_pixels(pipeline: Any, request: GenerateRequest) -> Tensor:
    """[3, H, W] in 0..1: the stock pipeline with this request's adapters and no others."""
    pipeline.unload_lora_weights()
    for i, lora in enumerate(request.loras):
        pipeline.load_lora_weights(str(lora.path), adapter_name=f"a{i}")
    if request.loras:
        pipeline.set_adapters([f"a{i}" for i in range(len(request.loras))], [lora.scale for lora in request.loras])
    config = pipeline.scheduler.config
    if request.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[request.scheduler]).from_config(config)
    made = pipeline(
        request.prompt, negative_prompt=request.negative_prompt, width=request.width, height=request.height,
        num_inference_steps=request.steps, guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed), output_type="np",
    ).images[0]  # fmt: skip
    return torch.from_numpy(np.asarray(made)).permute(2, 0, 1)


@pytest.mark.usefixtures("kind_of_slot_by_mix")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_every_picture_of_a_random_mix_is_its_solo_picture(
    mix: int, family: StableDiffusion1, stock: Any, lora_paths: list[Path]
) -> None:
    rng = random.Random(mix)
    requests = [draw(rng, lora_paths) for _ in range(rng.randint(3, 8))]
    engine = Engine(family, batch_max=rng.choice((2, 4, 8)), adapter_bytes_max=rng.choice((0, 200_000, 2**30)))
    kept = []
    for index, ticket in run_mix(engine, rng, requests):
        if isinstance(ticket.error, Cancelled):
            continue
        made = ticket.images()[0].pixels_CHW
        alone = engine.render([requests[index]])[0].pixels_CHW
        assert float((made - alone).abs().max()) < TOLERANCE, requests[index]
        kept.append((index, made))
    if not kept:  # all of them were stopped
        return
    index, made = rng.choice(kept)
    stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config)
    assert float((made - stock_pixels(stock, requests[index])).abs().max()) < TOLERANCE, requests[index]


def test_a_mixed_batch_differs_from_solo_runs_no_more_than_batching_alone(
    family: StableDiffusion1, lora_paths: list[Path]
) -> None:
    plain = [
        GenerateRequest(prompt="a red ring", width=64, height=64, steps=6, guidance_scale=5.0, seed=seed)
        for seed in range(6)
    ]
    mixed = [dataclasses.replace(r, loras=(LoraRef(p, 0.5),)) for r, p in zip(plain, lora_paths, strict=True)]
    engine = Engine(family)

    def worst(requests: list[GenerateRequest]) -> float:
        together = engine.render(requests)
        alone = [engine.render([request])[0] for request in requests]
        return max(float((a.pixels_CHW - b.pixels_CHW).abs().max()) for a, b in zip(together, alone, strict=True))

    # Both are rounding noise of some 1e-6; the factor keeps a lucky draw of the first from failing the second.
    assert worst(mixed) <= 5 * max(worst(plain), 1e-6)
