"""LoKr with whole matrices on a wide linear layer: served beside pairs, and trained beside peft's layer.

    make bench-lokr [BENCH_ARGS="--width 3072 --rows 512 --machine NAME"]

Serving: one layer with another LoKr for each of four pictures, against the layer alone and against pairs of the widest
rank that is served. Training: forward and back through four layers, against peft's own. All take turns in one process;
a ratio is of medians, with the spread of the times beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name, processor
from peft import inject_adapter_in_model
from torch import nn

from diffusion.engine.slot_layers import give_slot
from diffusion.lycoris import RANK_MAX
from diffusion.lycoris_layers import Lycoris, use_products

RESULTS = Path(__file__).parent / "results"
SLOTS, LAYERS = 4, 4


def served(width: int, rows: int, device: str) -> dict[str, Callable[[], object]]:
    """The layer on its own is the base."""
    x = torch.randn(SLOTS, rows, width, device=device)
    plain, whole, paired = (nn.Linear(width, width, device=device) for _ in range(3))
    side = next(side for side in range(int(width**0.5), 0, -1) if width % side == 0)
    matrices = [torch.randn(SLOTS, n, n, device=device) for n in (side, width // side)]
    give_slot(whole).products = ((matrices[0], matrices[1]),)
    slot = give_slot(paired)
    slot.A, slot.B = (torch.randn(SLOTS, *shape, device=device) for shape in ((width, RANK_MAX), (RANK_MAX, width)))
    return {"layer alone": lambda: plain(x), "whole LoKr": lambda: whole(x), f"pair {RANK_MAX}": lambda: paired(x)}


def trained(width: int, rows: int, device: str) -> dict[str, Callable[[], object]]:
    """peft's own is the base."""
    x = torch.randn(1, rows, width, device=device)

    def steps(*, ours: bool) -> Callable[[], object]:
        model = nn.Sequential(*(nn.Linear(width, width, device=device) for _ in range(LAYERS))).requires_grad_(False)
        config = Lycoris("lokr", full_rank=True).config(
            rank=1, alpha=1.0, targets=[str(i) for i in range(LAYERS)], patterns={}
        )
        inject_adapter_in_model(config, model, adapter_name="a")
        if ours:
            use_products(model)
        return lambda: torch.autograd.backward(model(x).square().mean())

    return {"peft": steps(ours=False), "raylora": steps(ours=True)}


def compare(ways: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, Any]:
    """Times in ms, and how many times the base's each takes."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            if number > 0:
                took[name].append((time.perf_counter() - started) * 1000)
    median = {name: statistics.median(times) for name, times in took.items()}
    base = next(iter(ways))
    for name, times in took.items():
        spread = f"{min(times):.0f}-{max(times):.0f} ms"
        print(f"  {name:12} median {median[name]:7.0f} ms ({spread}), {median[name] / median[base]:5.2f} of {base}")
    return {"ms": took, "of_base": {name: value / median[base] for name, value in median.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rows", type=int, default=512, help="of each picture")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", default=cpu_name(), help="names the result file")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with torch.no_grad():
        print(f"served: {options.width} x {options.width}, {SLOTS} pictures of {options.rows} rows")
        ways = served(options.width, options.rows, options.device)
        results["served"] = compare(ways, options.rounds, options.device)
    print(f"trained: forward and back through {LAYERS} layers, {options.rows} rows")
    results["trained"] = compare(trained(options.width, options.rows, options.device), options.rounds, options.device)
    about = {
        "cpu": processor(), "gpu": torch.cuda.get_device_name() if options.device != "cpu" else None,
        "cores": os.cpu_count(), "torch": torch.__version__, "command": " ".join(sys.argv),
        "at": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    file = RESULTS / f"lokr-{options.machine}.json"
    file.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
