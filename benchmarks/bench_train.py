"""Training speed, memory and losses beside diffusers' own text-to-image LoRA script, on one model and one machine.

    make bench-train BENCH_ARGS="--examples /path/to/diffusers/examples"

`--examples` is the `examples` folder of a diffusers checkout; its script needs `datasets` and `torchvision`, which are
no dependencies here: `--peer-path` names a folder that has them. Both programs run as processes of their own, one
after the other, on a random-weight Stable Diffusion of the given width with the real VAE's and text encoder's sizes,
the same pictures, rank, learning rate, batch, seed and precision (float32 on a CPU). A step's time is taken when its
line of output arrives. Losses are compared as means over windows: the two programs draw different noise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
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

SCRIPT = "text_to_image/train_text_to_image_lora.py"
STEP_OURS = re.compile(r"step (\d+) loss ([0-9.]+)")
STEP_THEIRS = re.compile(r"(\d+)/\d+ \[[^\]]*step_loss=([0-9.e+-]+)")
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
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        folder = Path(scratch)
        # In a process of its own: a child's peak memory begins at its parent's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            model = pool.submit(write_model, folder, args.width).result()
        job = {
            "model": str(model), "data": str(write_pictures(folder / "data", args)),
            "steps": args.steps, "batch": args.batch, "resolution": args.resolution, "output": str(folder / "output"),
        }  # fmt: skip
        ours = measure([sys.executable, __file__, "--run", json.dumps(job)], STEP_OURS, dict(os.environ))
        environment = dict(os.environ)
        if args.peer_path:
            environment["PYTHONPATH"] = os.pathsep.join([str(args.peer_path), environment.get("PYTHONPATH", "")])
        theirs = measure(peer_command(args.examples / SCRIPT, job), STEP_THEIRS, environment)
    report(args, ours, theirs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, help="the examples folder of a diffusers checkout")
    parser.add_argument("--peer-path", type=Path, help="a folder with the script's own requirements")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--width", type=int, default=160, help="of the UNet's first level; SD 1.x has 320")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, width: int) -> Path:
    """Stable Diffusion with SD 1.x's VAE and text encoder, and a UNet of its shape at another width."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusion.testing import write_clip_tokenizer

    torch.manual_seed(SEED)
    tokenizer = write_clip_tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64, block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=768,
            attention_head_dim=8, layers_per_block=2,
        ),
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


def write_pictures(folder: Path, args: argparse.Namespace) -> Path:
    """Square pictures with captions, in both programs' ways of naming them."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(SEED)
    lines = []
    for index in range(args.pictures):
        low = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(low).resize((args.resolution,) * 2).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def peer_command(script: Path, job: dict[str, Any]) -> list[str]:
    options = {
        "pretrained_model_name_or_path": job["model"], "train_data_dir": job["data"], "caption_column": "text",
        "resolution": job["resolution"], "train_batch_size": job["batch"], "max_train_steps": job["steps"],
        "learning_rate": RATE, "lr_scheduler": "constant", "lr_warmup_steps": 0, "rank": RANK, "seed": SEED,
        "mixed_precision": "no", "checkpointing_steps": 10**6, "output_dir": job["output"], "dataloader_num_workers": 0,
    }  # fmt: skip
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
    from train_jobs.spec import DatasetSpec, OptimizeSpec

    def say(progress: Progress) -> None:
        print(f"step {progress.step} loss {progress.loss:.6f}", flush=True)

    family = load_family(job["model"], device="cpu", dtype=torch.float32)
    lora = attach_lora(family, rank=RANK, alpha=RANK, targets="attention", seed=SEED)
    dataset = DatasetSpec(dataset="bench", resolutions_px=(job["resolution"],))
    uses = plan_uses(read_folder(Path(job["data"]), dataset), dataset, size_multiple=family.size_multiple)
    cache = build_cache(family, uses)
    if cache is None:
        raise RuntimeError("nothing was cached")
    spec = OptimizeSpec(
        steps=job["steps"], batch_size=job["batch"], learning_rate=RATE, dtype="fp32", seed=SEED, max_grad_norm=1.0
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


def report(args: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    import diffusers
    import torch

    rows = {name: _figures(found, args.warmup) for name, found in (("raylora", ours), ("diffusers script", theirs))}
    ratio = rows["raylora"]["steps_per_s"] / rows["diffusers script"]["steps_per_s"]
    total = rows["diffusers script"]["total_s"] / rows["raylora"]["total_s"]
    print(
        f"{'':18} {'steps/s':>8} {'step s, p10-p90':>18} {'total s':>8} {'peak MiB':>9} {'loss, first/last half':>24}"
    )
    for name, row in rows.items():
        spread = f"{row['step_s_p10']:.2f}-{row['step_s_p90']:.2f}"
        losses = f"{row['loss_first_half']:.3f} / {row['loss_last_half']:.3f}"
        print(f"{name:18} {row['steps_per_s']:8.3f} {spread:>18} {row['total_s']:8.1f} {row['peak_memory_mib']:9.0f}"
              f" {losses:>24}")  # fmt: skip
    print(f"raylora is {ratio:.2f} times as fast a step, {total:.2f} times in all (loading and caching included)")
    machine = f"cpu{os.cpu_count()}-{platform.machine()}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"train-{machine}.json"
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"name": machine, "cpus": os.cpu_count(), "processor": _processor()},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": sys.version.split()[0]},
        "command": "make bench-train",
        "settings": {k: v for k, v in vars(args).items() if k not in {"examples", "peer_path", "run"}},
        "peer": SCRIPT,
        "rows": rows,
        "speed_ratio": ratio,
        "total_ratio": total,
        "losses": {"raylora": ours["losses"], "diffusers script": theirs["losses"]},
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written to {path}")


def _figures(found: dict[str, Any], warmup: int) -> dict[str, float]:
    times_s, losses = found["times_s"], found["losses"]
    durations_s = [b - a for a, b in zip(times_s[warmup:], times_s[warmup + 1 :], strict=False)]
    tenths = statistics.quantiles(durations_s, n=10)
    half = len(losses) // 2
    return {
        "steps_per_s": 1 / statistics.median(durations_s),
        "step_s_p10": tenths[0],
        "step_s_p90": tenths[-1],
        "total_s": found["total_s"],
        "peak_memory_mib": found["peak_memory_mib"],
        "loss_first_half": statistics.fmean(losses[:half]),
        "loss_last_half": statistics.fmean(losses[half:]),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
