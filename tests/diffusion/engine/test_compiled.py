"""A compiled denoiser on the threads that drive the engine."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo

from diffusion.engine import Engine, GenerateRequest
from diffusion.families import StableDiffusion1

PLAIN = GenerateRequest(prompt="a red ring", width=64, height=64, steps=1, guidance_scale=1.0, seed=3)


def test_each_size_is_compiled_whatever_thread_drives(family: StableDiffusion1) -> None:
    torch._dynamo.reset()
    engine = Engine(family, compiled="eager")

    def drive() -> int:
        # Such limits belong to a thread. A low one shows with the second size what the default does with the ninth.
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            return len(engine.render([PLAIN]) + engine.render([dataclasses.replace(PLAIN, height=48)]))

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(drive).result() == 2
