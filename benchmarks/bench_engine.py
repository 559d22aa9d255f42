"""The engine against stock diffusers and peft: what different LoRAs in one batch cost, and what they save.

    make bench-engine                                        # tiny and mid-size models of random weights
    python benchmarks/bench_engine.py --sizes mid --device cuda --dtype bfloat16
    python benchmarks/bench_engine.py --sizes tiny --parts traffic    # replaces these rows of the machine's result file

Runs without Ray. Every ratio is taken within one run, interleaved; `spread` is that of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from engine_cold import cold_adapter_latencies
from engine_models import SIZES, Size, build_pipeline, write_adapters
from engine_traffic import Served, Workload, by_adapter, draw_workload, engine_traffic, peft_names, stock_one_by_one
from machine import processor

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import Family, load_family

RESULTS = Path(__file__).resolve().parent / "results"
ENGINE = "engine"


@dataclass(frozen=True)
class Row:
    """``ratio`` above 1 is in our favour, unless the name says otherwise."""

    size: str
    name: str
    ours: float
    peer: float
    unit: str
    ratio: float
    spread: float | None
    target: str
    command: str = ""
    load_1min: float = 0.0
    """Of the machine when the row was done: its own threads count."""


class Bench:
    """One size of model: the stock pipeline, the engine on the same weights, and adapters on disk."""

    def __init__(
        self, name: str, size: Size, options: argparse.Namespace, folder: Path, on_row: Callable[[Row], None]
    ) -> None:
        self._on_row = on_row
        self.name, self.size, self.rounds = name, size, options.rounds
        self.graph_requests = options.graph_requests
        self.steps = options.steps or size.steps
        self.requests = options.requests or size.requests
        self.loads, self.traffic_rounds = options.loads, options.traffic_rounds
        dtype = getattr(torch, options.dtype)
        self.folder = folder
        build_pipeline(size).save_pretrained(folder / "model", safe_serialization=True)
        self.family: Family = load_family(folder / "model", device=options.device, dtype=dtype)
        self.stock = build_pipeline(size).to(options.device, dtype)
        self.stock.set_progress_bar_config(disable=True)
        self.paths = write_adapters(self.family, folder, options.adapters, (4, 8, 16, 16, 32))

    def request(self, seed: int, adapter: int | None) -> GenerateRequest:
        loras = () if adapter is None else (LoraRef(self.paths[adapter % len(self.paths)]),)
        return GenerateRequest(
            prompt=f"number {seed % 7}", width=self.size.side_px, height=self.size.side_px, steps=self.steps,
            guidance_scale=5.0, seed=seed, loras=loras,
        )  # fmt: skip

    def compare(
        self, name: str, ours: Callable[[], float], peer: Callable[[], float], unit: str, target: str,
        *, more_is_better: bool,
    ) -> None:  # fmt: skip
        """Alternates the two; the row's ratio is the median of the rounds' ratios."""
        pairs = [(ours(), peer()) for _ in range(self.rounds)]
        ratios = [(a / b if more_is_better else b / a) for a, b in pairs]
        self.add(
            name, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), unit,
            statistics.median(ratios), max(ratios) - min(ratios), target,
        )  # fmt: skip

    def add(
        self, name: str, ours: float, peer: float, unit: str, ratio: float, spread: float | None, target: str
    ) -> None:
        row = Row(self.name, name, ours, peer, unit, ratio, spread, target)
        self._on_row(row)
        shown = "" if spread is None else f" +-{spread / 2:.2f}"
        print(f"{row.size:5} {row.name:58} {row.ours:9.3f} {row.peer:9.3f} {row.unit:11} {row.ratio:8.2f}{shown:7} "
              f"{row.target}", flush=True)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def diversity(bench: Bench, batch: int = 4) -> None:
    """Pictures a second of a batch whose LoRAs all differ, over the same batch without any."""
    engine = Engine(bench.family, batch_max=batch)
    different = [bench.request(i, 2 + 5 * i) for i in range(batch)]  # all of rank 16
    plain = [bench.request(i, None) for i in range(batch)]
    engine.render(different)
    engine.render(plain)
    target = ">= 0.90" if bench.name == "tiny" else ">= 0.95"
    bench.compare(
        f"{batch} different LoRAs over no LoRA, batch {batch}",
        lambda: batch / seconds(lambda: engine.render(different)),
        lambda: batch / seconds(lambda: engine.render(plain)),
        "images/s", target, more_is_better=True,
    )  # fmt: skip
    engine.close()


def single_request(bench: Bench) -> None:
    """One picture with a LoRA live: the engine, and the stock pipeline with the adapter loaded beforehand."""
    engine = Engine(bench.family)
    stock = copy.deepcopy(bench.stock)
    request = bench.request(0, 2)
    stock.load_lora_weights(str(request.loras[0].path), adapter_name="a")

    def stock_run() -> object:
        return stock(
            request.prompt, num_inference_steps=request.steps, guidance_scale=5.0, width=request.width,
            height=request.height, generator=torch.Generator("cpu").manual_seed(0),
        )  # fmt: skip

    engine.generate([request])
    stock_run()
    bench.compare(
        "one request over stock diffusers, LoRA live",
        lambda: seconds(lambda: engine.generate([request])), lambda: seconds(stock_run),
        "s", ">= 1.0", more_is_better=False,
    )  # fmt: skip
    engine.close()


def activation(bench: Bench) -> None:
    """An adapter in memory to its place in a slot, against diffusers loading its file, fresh and as a hotswap."""
    engine = Engine(bench.family)
    leases = [engine.adapters.borrow(bench.paths[2 + 5 * i]) for i in range(2)]
    combos = [((lease.adapter(), 1.0),) for lease in leases]
    engine._slots.arrange("unet", [combos[0]])

    def ours() -> float:
        engine._slots.arrange("unet", [combos[0]])
        return seconds(lambda: engine._slots.arrange("unet", [combos[1]]))

    fresh = copy.deepcopy(bench.stock)

    def load() -> float:
        fresh.unload_lora_weights()
        return seconds(lambda: fresh.load_lora_weights(str(bench.paths[2]), adapter_name="a"))

    swapped = copy.deepcopy(bench.stock)
    swapped.load_lora_weights(str(bench.paths[2]), adapter_name="a")

    def hotswap() -> float:
        return seconds(lambda: swapped.load_lora_weights(str(bench.paths[7]), adapter_name="a", hotswap=True))

    bench.compare("adapter in memory to active over load_lora_weights", ours, load, "s", ">= 100",
                  more_is_better=False)  # fmt: skip
    bench.compare("adapter in memory to active over its hotswap", ours, hotswap, "s", ">= 20", more_is_better=False)
    for lease in leases:
        engine.adapters.release(lease)
    engine.close()


def first_after_change(bench: Bench) -> None:
    """The first picture after an adapter change over the next with the same one; below 1 would be faster."""
    engine = Engine(bench.family)
    a, b = bench.request(0, 2), bench.request(0, 7)
    engine.render([a, b])

    def first() -> float:
        engine.render([a])
        return seconds(lambda: engine.render([b]))

    bench.compare("first picture after an adapter change over steady (time)", first,
                  lambda: seconds(lambda: engine.render([b])), "s", "<= 1.1", more_is_better=True)  # fmt: skip
    engine.close()


def mixed_traffic(bench: Bench) -> None:
    """Poisson arrivals, adapters by Zipf's law; the same workload for every way of serving it.

    A load of 1 is what the engine does when all of its batches are full. Each round draws a workload of its own, and
    begins with another way than the one before, so that a machine that changes meanwhile favours none.
    """
    engine = Engine(bench.family, batch_max=8)
    probe = [bench.request(i, i) for i in range(8)]
    engine.render(probe)
    capacity = 8 / seconds(lambda: engine.render(probe))
    stock, batched, named = (copy.deepcopy(bench.stock) for _ in range(3))
    ways: list[tuple[str, Callable[[Workload], Served]]] = [
        (ENGINE, lambda w: engine_traffic(engine, w)),
        ("stock, one at a time, switching adapters", lambda w: stock_one_by_one(stock, w)),
        ("stock, batched by adapter", lambda w: by_adapter(batched, w)),
        ("peft adapter_names", lambda w: peft_names(named, w)),
    ]
    for load in bench.loads:
        served: defaultdict[str, list[Served]] = defaultdict(list)
        for number in range(bench.traffic_rounds):
            workload = draw_workload(
                count=bench.requests,
                rate=load * capacity,
                adapters=len(bench.paths),
                seed=number + 1,
                request=bench.request,
            )
            first = number % len(ways)
            for name, way in ways[first:] + ways[:first]:
                served[name].append(way(workload))
        _tell_traffic(bench, load, served)
    engine.close()


def _tell_traffic(bench: Bench, load: float, served: Mapping[str, Sequence[Served]]) -> None:
    """Medians of the rounds' ratios."""
    for name in [name for name in served if name != ENGINE]:
        rounds = list(zip(served[ENGINE], served[name], strict=True))
        throughput = {"stock, one at a time, switching adapters": ">= 2.5" if bench.name == "tiny" else ">= 1.3"}
        p99 = {"stock, batched by adapter": ">= 2.0"}
        for title, field, unit, wanted in (
            ("", "images_per_s", "images/s", throughput.get(name, "") if load > 1 else ""),
            (" p50 latency", "p50_s", "s", ""),
            (" p99 latency", "p99_s", "s", p99.get(name, "")),
        ):
            values = [(getattr(ours, field), getattr(other, field)) for ours, other in rounds]
            ratios = [a / b if field == "images_per_s" else b / a for a, b in values]
            bench.add(
                f"mixed traffic, load {load:g},{title} over {name}",
                statistics.median(a for a, _ in values),
                statistics.median(b for _, b in values),
                unit,
                statistics.median(ratios),
                max(ratios) - min(ratios),
                wanted,
            )


def cold_adapter(bench: Bench) -> None:
    """A picture whose adapter comes from S3 behind 30 ms and 200 MB/s, over one whose adapter is there; the engine's
    batch is full and others wait, so what counts is whether the download hides behind them."""
    cold, warm = cold_adapter_latencies(
        bench.family, bench.paths, folder=bench.folder, rounds=bench.rounds, side_px=bench.size.side_px,
        steps=bench.steps,
    )  # fmt: skip
    ratios = [a / b for a, b in zip(cold, warm, strict=True)]
    bench.add(
        "first picture with a cold adapter from S3 over warm (time)", statistics.median(cold), statistics.median(warm),
        "s", statistics.median(ratios), max(ratios) - min(ratios), "<= 1.05",
    )  # fmt: skip


def compiled_graphs(bench: Bench, requests: int) -> None:
    """Graphs compiled while many requests with adapters of mixed ranks pass, after every batch size was seen once."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    engine = Engine(bench.family, batch_max=4, compiled="eager")
    highest = next(i for i in range(len(bench.paths)) if i % 5 == 4)
    for size in (4, 2, 1):
        engine.render([bench.request(i, highest) for i in range(size)])
    before = counters["stats"]["unique_graphs"]
    for first in range(0, requests, 50):
        engine.render([replace(bench.request(i, i), steps=2) for i in range(first, min(first + 50, requests))])
    new = counters["stats"]["unique_graphs"] - before
    bench.add(f"new graphs over {requests} requests, {len(bench.paths)} LoRAs", new, before, "graphs", new, None, "0")
    torch._dynamo.reset()


PARTS: dict[str, Callable[[Bench], None]] = {
    "diversity": diversity,
    "single": single_request,
    "activation": activation,
    "change": first_after_change,
    "cold": cold_adapter,
    "graphs": lambda bench: compiled_graphs(bench, bench.graph_requests),
    "traffic": mixed_traffic,
}
ONLY_TINY = {"graphs"}
"""What a larger model would only make slower."""


class Results:
    """The file of one machine. A row takes the place of an earlier one of its size and name."""

    def __init__(self, path: Path, facts: dict[str, Any], command: str) -> None:
        self.path, self._facts, self._command = path, facts, command
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def keep(self, row: Row) -> None:
        """Written after every row, so that a run that is ended early leaves what it has measured."""
        others = [old for old in self._rows if (old["size"], old["name"]) != (row.size, row.name)]
        new = asdict(replace(row, command=self._command, load_1min=round(os.getloadavg()[0], 2)))
        self._rows = sorted([*others, new], key=lambda r: list(SIZES).index(r["size"]))
        self.path.write_text(json.dumps({**self._facts, "rows": self._rows}, indent=1) + "\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "mid"], choices=list(SIZES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--requests", type=int, help="of the mixed traffic")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.9, 1.5], help="of the mixed traffic")
    parser.add_argument("--traffic-rounds", type=int, default=3)
    parser.add_argument("--graph-requests", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--machine", help="names the result file; the default is the GPU, or the CPU and its threads")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    # The peers warn at every adapter they load.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    machine = machine_facts(options)
    print(json.dumps(machine))
    print(f"{'size':5} {'measured':58} {'ours':>9} {'peer':>9} {'unit':11} {'ratio':>8} {'target':>13}")
    command = " ".join(["bench_engine.py", *arguments])
    results = Results(options.out / f"engine-{machine['name']}.json", machine, command)
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(name, SIZES[name], options, Path(folder), results.keep)
            for part in PARTS:
                if part in options.parts and (name == "tiny" or part not in ONLY_TINY):
                    PARTS[part](bench)
    print(f"written to {results.path}")


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    cpu = processor()
    return {
        "name": (options.machine or gpu or f"{cpu}-{torch.get_num_threads()}-threads").replace(" ", "-").lower(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "dtype": options.dtype,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


if __name__ == "__main__":
    main(sys.argv[1:])
