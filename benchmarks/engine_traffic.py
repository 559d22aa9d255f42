"""One workload, served in four ways: by the engine, and as one would with stock diffusers and peft."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusion.engine import Engine, GenerateRequest
from diffusion.engine.ticket import Ticket

BATCH_MAX = 8
RESIDENT_MAX = 8


@dataclass(frozen=True)
class Arrival:
    at_s: float
    request: GenerateRequest


Workload = list[Arrival]


@dataclass(frozen=True)
class Served:
    images_per_s: float
    p50_s: float
    p99_s: float


def draw_workload(
    *, count: int, rate: float, adapters: int, seed: int, request: Callable[[int, int | None], GenerateRequest]
) -> Workload:
    """Poisson arrivals at ``rate`` a second; adapter ``k`` is asked for in proportion to ``1 / k`` (Zipf)."""
    rng = random.Random(seed)
    weights = [1 / (k + 1) for k in range(adapters)]
    at_s, workload = 0.0, []
    for i in range(count):
        at_s += rng.expovariate(rate)
        [adapter] = rng.choices(range(adapters), weights)
        workload.append(Arrival(at_s, request(i, adapter)))
    return workload


def _summary(latencies: Sequence[float], span_s: float) -> Served:
    ordered = sorted(latencies)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
    return Served(len(ordered) / span_s, statistics.median(ordered), p99)


def engine_traffic(engine: Engine, workload: Workload) -> Served:
    """Requests are submitted when they arrive, between two denoising steps."""
    start = time.perf_counter()
    waiting = list(workload)
    running: list[tuple[Arrival, Ticket]] = []
    latencies: list[float] = []
    while waiting or running:
        now = time.perf_counter() - start
        while waiting and waiting[0].at_s <= now:
            arrival = waiting.pop(0)
            running.append((arrival, engine.submit([arrival.request])))
        if not engine.step() and waiting and not running:
            time.sleep(max(0.0, waiting[0].at_s - (time.perf_counter() - start)))
        for arrival, ticket in [entry for entry in running if entry[1].finished]:
            ticket.images()
            latencies.append(time.perf_counter() - start - arrival.at_s)
            running.remove((arrival, ticket))
    return _summary(latencies, time.perf_counter() - start)


Serve = Callable[[list[Arrival]], None]
Pick = Callable[[list[Arrival]], list[Arrival]]


def _queue(workload: Workload, pick: Pick, serve: Serve) -> Served:
    """``pick`` chooses what is served next among those that have arrived."""
    start = time.perf_counter()
    waiting, arrived, latencies = list(workload), list[Arrival](), list[float]()
    while waiting or arrived:
        now = time.perf_counter() - start
        while waiting and waiting[0].at_s <= now:
            arrived.append(waiting.pop(0))
        if not arrived:
            time.sleep(max(0.0, waiting[0].at_s - now))
            continue
        batch = pick(arrived)
        arrived = [arrival for arrival in arrived if arrival not in batch]
        serve(batch)
        done = time.perf_counter() - start
        latencies += [done - arrival.at_s for arrival in batch]
    return _summary(latencies, time.perf_counter() - start)


class Resident:
    """A stock pipeline that keeps the last few adapters loaded, as a server of its kind would."""

    def __init__(self, pipeline: Any) -> None:
        # Those of the round before.
        if pipeline.get_list_adapters():
            pipeline.unload_lora_weights()
        self._pipeline, self._names = pipeline, list[str]()

    def ensure(self, requests: Sequence[GenerateRequest]) -> list[str]:
        names = [request.loras[0].path.stem for request in requests]
        for request, name in zip(requests, names, strict=True):
            if name not in self._names:
                self._pipeline.load_lora_weights(str(request.loras[0].path), adapter_name=name)
            else:
                self._names.remove(name)
            self._names.append(name)
        while len(self._names) > RESIDENT_MAX:
            self._pipeline.delete_adapters(self._names.pop(0))
        return names


def _run(pipeline: Any, requests: Sequence[GenerateRequest]) -> None:
    first = requests[0]
    pipeline(
        [request.prompt for request in requests], num_inference_steps=first.steps, guidance_scale=first.guidance_scale,
        width=first.width, height=first.height,
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
    )  # fmt: skip


def stock_one_by_one(pipeline: Any, workload: Workload) -> Served:
    """In order of arrival; the adapter of each request is loaded or switched to before it."""
    resident = Resident(pipeline)

    def serve(batch: list[Arrival]) -> None:
        [name] = resident.ensure([batch[0].request])
        pipeline.set_adapters([name])
        _run(pipeline, [batch[0].request])

    return _queue(workload, lambda arrived: arrived[:1], serve)


def by_adapter(pipeline: Any, workload: Workload) -> Served:
    """The oldest request, and all others with its adapter."""
    resident = Resident(pipeline)

    def pick(arrived: list[Arrival]) -> list[Arrival]:
        adapter = arrived[0].request.loras[0].path
        return [arrival for arrival in arrived if arrival.request.loras[0].path == adapter][:BATCH_MAX]

    def serve(batch: list[Arrival]) -> None:
        [name, *_] = resident.ensure([batch[0].request])
        pipeline.set_adapters([name])
        _run(pipeline, [arrival.request for arrival in batch])

    return _queue(workload, pick, serve)


def peft_names(pipeline: Any, workload: Workload) -> Served:
    """The oldest requests whatever their adapters; peft's ``adapter_names`` gives each row its own.

    diffusers exposes it nowhere, so it is handed to peft's layers by hooks, as peft itself does.
    """
    resident = Resident(pipeline)

    def serve(batch: list[Arrival]) -> None:
        requests = [arrival.request for arrival in batch]
        names = resident.ensure(requests)
        pipeline.set_adapters(sorted(set(names)))
        with ExitStack() as hooks:
            for layer in pipeline.unet.modules():
                if isinstance(layer, BaseTunerLayer):
                    hook = layer.register_forward_pre_hook(
                        lambda _, args, kwargs: (args, {**kwargs, "adapter_names": [*names, *names]}), with_kwargs=True
                    )
                    hooks.callback(hook.remove)
            _run(pipeline, requests)

    return _queue(workload, lambda arrived: arrived[:BATCH_MAX], serve)
