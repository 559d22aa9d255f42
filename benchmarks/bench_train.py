"""Training speed, memory and losses beside diffusers' own LoRA scripts, on one model and one machine.

    make bench-train BENCH_ARGS="--examples /path/to/diffusers/examples"

`--examples` is the `examples` folder of a diffusers checkout; its scripts need `datasets` and `torchvision`, which are
no dependencies here: `--peer-path` names a folder that has them. The programs run as processes of their own, one
after the other, on a model of random weights at about half width (`train_models.py`), with the same captioned
pictures, LoRA layers, rank, learning rate, batch, seed and precision: float32, or bfloat16 with float32 LoRA weights.
A step's time is taken when its line of output arrives. The programs draw different noise: their losses are compared as
means over windows, with the standard error of the difference.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import processor
from train_models import SHAPES, write_model

STEP_OURS = re.compile(r"step (\d+) loss ([0-9.]+)")
STEP_THEIRS = re.compile(r"(\d+)/\d+ \[[^\]]*[ _]loss=([0-9.e+-]+)")
RESULTS = Path(__file__).parent / "results"
RANK, RATE, SEED = 16, 1e-4, 7


def main() -> None:
    args = _arguments()
    if args.run is not None:
        run_ours(json.loads(args.run))
        return
    if args.examples is None:
        print("bench_train measures against the diffusers example scripts: give their folder as --examples. Skipped.")
        return
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
            compare(shape, args, Path(scratch))


def compare(shape: str, args: argparse.Namespace, folder: Path) -> None:
    # In a process of its own: a child's peak memory begins at its parent's.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        model, parameters = pool.submit(write_model, shape, folder).result()
    job = {
        "model": str(model), "data": str(folder / "data"), "peer_data": str(folder / "peer-data"),
        "steps": args.steps, "batch": args.batch, "resolution": args.resolution, "precision": args.precision,
        "output": str(folder / "output"),
    }  # fmt: skip
    write_pictures(folder, args)
    runs = {"raylora": measure([sys.executable, __file__, "--run", json.dumps(job)], STEP_OURS, dict(os.environ))}
    environment = dict(os.environ)
    if args.peer_path:
        environment["PYTHONPATH"] = os.pathsep.join([str(args.peer_path), environment.get("PYTHONPATH", "")])
    for flags in SHAPES[shape].variants:
        shutil.rmtree(job["output"], ignore_errors=True)
        command = [*peer_command(args.examples / SHAPES[shape].script, job), *flags]
        runs[" ".join(["diffusers script", *flags])] = measure(command, STEP_THEIRS, environment)
    report(shape, args, parameters, runs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="the examples folder of a diffusers checkout")
    parser.add_argument("--peer-path", type=Path, help="a folder with the script's own requirements")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which of them, with commas")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--machine", default=f"cpu{os.cpu_count()}-{platform.machine()}", help="names the result files")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_pictures(folder: Path, args: argparse.Namespace) -> None:
    """Square pictures with captions, in both programs' ways: `datasets` takes a folder with text files for texts."""
    import numpy as np
    from PIL import Image

    ours, theirs = folder / "data", folder / "peer-data"
    ours.mkdir()
    theirs.mkdir()
    random = np.random.default_rng(SEED)
    lines = []
    for index in range(args.pictures):
        low = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(low).resize((args.resolution,) * 2)
        for side in (ours, theirs):
            picture.save(side / f"{index}.png")
        (ours / f"{index}.txt").write_text(f"picture {index}")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (theirs / "metadata.jsonl").write_text("\n".join(lines))


def peer_command(script: Path, job: dict[str, Any]) -> list[str]:
    options = {
        "pretrained_model_name_or_path": job["model"], "caption_column": "text", "resolution": job["resolution"],
        "train_batch_size": job["batch"], "max_train_steps": job["steps"], "learning_rate": RATE,
        "lr_scheduler": "constant", "lr_warmup_steps": 0, "rank": RANK, "seed": SEED,
        "mixed_precision": {"fp32": "no", "bf16": "bf16"}[job["precision"]],
        "checkpointing_steps": 10**6, "output_dir": job["output"], "dataloader_num_workers": 0,
    }  # fmt: skip
    if "dreambooth" in script.name:
        # The caption column counts; the script wants an instance prompt all the same.
        options |= {"dataset_name": job["peer_data"], "image_column": "image", "instance_prompt": "picture"}
        options |= {"lora_alpha": RANK} if "flux" in script.name else {}
    else:
        options["train_data_dir"] = job["peer_data"]
    return [sys.executable, str(script), "--center_crop", *(f"--{key}={value}" for key, value in options.items())]


def run_ours(job: dict[str, Any]) -> None:
    """The training itself, as a Ray worker would run it, without the stores around it."""
    import torch

    from diffusion.adapter import attach_lora
    from diffusion.families import load_family
    from diffusion.lora import save_lora
    from train_jobs.cache import build_cache
    from train_jobs.data import plan_uses, read_folder
    from train_jobs.loop import Callbacks, Progress, TrainingLoop
    from train_jobs.spec import DatasetSpec, OptimizeSpec, TimestepSpec

    def say(progress: Progress) -> None:
        print(f"step {progress.step} loss {progress.loss:.6f}", flush=True)

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    family = load_family(job["model"], device="cpu", dtype=dtype)
    lora = attach_lora(family, rank=RANK, alpha=RANK, targets="attention", seed=SEED)
    dataset = DatasetSpec(dataset="bench", resolutions_px=(job["resolution"],))
    uses = plan_uses(read_folder(Path(job["data"]), dataset), dataset, size_multiple=family.size_multiple)
    cache = build_cache(family, uses)
    if cache is None:
        raise RuntimeError("nothing was cached")
    spec = OptimizeSpec(
        steps=job["steps"],
        batch_size=job["batch"],
        learning_rate=RATE,
        dtype=job["precision"],
        seed=SEED,
        max_grad_norm=1.0,
        timesteps=TimestepSpec(kind="linear"),
    )
    loop = TrainingLoop(family, dict(lora.named_parameters()), cache, spec, callbacks=Callbacks(on_progress=say))
    loop.run()
    path = Path(job["output"]) / "adapter.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_lora(path, lora.file_state(), metadata=lora.metadata(title="bench"))


def measure(command: list[str], pattern: re.Pattern[str], environment: dict[str, str]) -> dict[str, Any]:
    """Arrival times and losses of the steps, the whole time, and the process's peak memory."""
    started_s = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, bufsize=1
    )
    steps: dict[int, tuple[float, float]] = {}
    tail: list[str] = []
    for line in _lines(process):
        tail = [*tail[-40:], line]
        for found in pattern.finditer(line):
            number = int(found.group(1))
            if number > 0:
                steps.setdefault(number, (time.monotonic() - started_s, float(found.group(2))))
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or len(steps) < 2:
        sys.exit("\n".join([*tail, f"{command[1]} ended with {os.waitstatus_to_exitcode(status)}"]))
    return {
        "total_s": time.monotonic() - started_s,
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "times_s": [steps[n][0] for n in sorted(steps)],
        "losses": [steps[n][1] for n in sorted(steps)],
    }


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """Lines, a progress bar's carriage returns counted as ends."""
    text = ""
    while process.stdout is not None and (character := process.stdout.read(1)):
        if character in "\r\n":
            yield text
            text = ""
        else:
            text += character
    yield text


def report(shape: str, args: argparse.Namespace, parameters: int, runs: dict[str, dict[str, Any]]) -> None:
    import diffusers
    import torch

    ours = runs["raylora"]
    rows = {name: _figures(found, args.warmup) for name, found in runs.items()}
    print(f"{shape}, {parameters / 1e6:.0f} M parameters, {args.resolution} px, batch {args.batch}, "
          f"{args.precision}, {args.steps} steps")  # fmt: skip
    print(f"{'':34} {'steps/s':>8} {'step s, p10-p90':>18} {'total s':>8} {'peak MiB':>9} {'mean loss':>9}")
    for name, row in rows.items():
        spread = f"{row['step_s_p10']:.2f}-{row['step_s_p90']:.2f}"
        print(f"{name:34} {row['steps_per_s']:8.3f} {spread:>18} {row['total_s']:8.1f} {row['peak_memory_mib']:9.0f}"
              f" {row['mean_loss']:9.4f}")  # fmt: skip
        if name != "raylora":
            row["speed_ratio"] = rows["raylora"]["steps_per_s"] / row["steps_per_s"]
            row["total_ratio"] = row["total_s"] / rows["raylora"]["total_s"]
            row["loss_difference"], row["loss_difference_error"] = _difference(ours["losses"], runs[name]["losses"])
            print(f"  raylora: {row['speed_ratio']:.2f} times as fast a step, {row['total_ratio']:.2f} times in all "
                  f"(loading, caching and saving included); its mean loss is {row['loss_difference']:+.4f} "
                  f"+- {row['loss_difference_error']:.4f} of theirs")  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    precision = "" if args.precision == "fp32" else f"-{args.precision}"
    path = RESULTS / f"train-{shape}-batch{args.batch}{precision}-{args.machine}.json"
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "name": args.machine,
            "cpus": os.cpu_count(),
            "processor": processor(),
            "load_1min": os.getloadavg()[0],
        },
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": sys.version.split()[0]},
        "command": "make bench-train BENCH_ARGS='--examples EXAMPLES "
        f"--shapes {shape} --steps {args.steps} --batch {args.batch} --precision {args.precision}'",
        "settings": {
            k: v for k, v in vars(args).items() if k not in {"examples", "peer_path", "run", "shapes", "machine"}
        },
        "denoiser_parameters": parameters,
        "peer": SHAPES[shape].script,
        "rows": rows,
        "losses_in_windows": {name: _windows(found["losses"]) for name, found in runs.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")


def _difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Of the means, and its standard error with the steps taken as independent."""
    error = math.sqrt(sum(statistics.variance(losses) / len(losses) for losses in (ours, theirs)))
    return statistics.fmean(ours) - statistics.fmean(theirs), error


def _windows(losses: list[float], count: int = 10) -> list[float]:
    size = max(1, len(losses) // count)
    return [round(statistics.fmean(losses[i : i + size]), 4) for i in range(0, len(losses), size)]


def _figures(found: dict[str, Any], warmup: int) -> dict[str, float]:
    times_s, losses = found["times_s"], found["losses"]
    durations_s = [b - a for a, b in zip(times_s[warmup:], times_s[warmup + 1 :], strict=False)]
    tenths = statistics.quantiles(durations_s, n=10)
    return {
        "steps_per_s": 1 / statistics.median(durations_s),
        "step_s_p10": tenths[0],
        "step_s_p90": tenths[-1],
        "total_s": found["total_s"],
        "peak_memory_mib": found["peak_memory_mib"],
        "mean_loss": statistics.fmean(losses),
    }


if __name__ == "__main__":
    main()
