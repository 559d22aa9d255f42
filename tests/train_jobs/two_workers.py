"""Two processes that train together over gloo, without Ray; started by test_two_workers.py with a folder.

The folder holds `model/`, `pictures/` and `runs.json`: a list of specs. Each run leaves `<index>-<rank>.json` and the
objects that its rank 0 stored under `<index>/`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from diffusion.families.sd1 import StableDiffusion1
from storage.datasets import write_dataset
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.settings import BreakerSettings, S3Settings
from storage.testing import InMemoryStore
from train_jobs.artifacts import Artifacts
from train_jobs.peers import Alone, Peers, TorchPeers
from train_jobs.reporting import Quiet
from train_jobs.training import Training
from train_jobs.worker import WorkerConfig

JOB = "train_0123456789ab"
KEYS = Keys("raylora", "default")


class Counted(StableDiffusion1):
    """Counts what it is asked to encode, and what the denoiser holds of its weights."""

    pictures = prompts = 0

    def encode_image_moments(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Counted.pictures += len(images_BCHW)
        return super().encode_image_moments(images_BCHW)

    def encode_prompts(self, prompts: Any) -> Any:
        Counted.prompts += len(prompts)
        return super().encode_prompts(prompts)


def held(module: torch.nn.Module) -> int:
    """Elements of the frozen weights that lie in this process."""
    whole = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters() if not p.requires_grad)
    return sum(p.numel() for p in whole)


def train(
    folder: Path,
    spec: dict[str, Any],
    peers: Peers,
    name: str,
    store: InMemoryStore,
    runner: LoopThread,
    **config_fields: Any,
) -> dict[str, Any]:
    """One run of one worker; the texts and pictures it encoded, the weights it held, and its result."""
    scratch = folder / name
    scratch.mkdir()
    Counted.pictures = Counted.prompts = 0
    config = WorkerConfig(
        process_id=JOB, tenant="default", spec=spec, models={"tiny": str(folder / "model")}, paths_allowed=False,
        s3=S3Settings(), breaker=BreakerSettings(), use_gpu=False, workers=2, **config_fields,
    )  # fmt: skip
    weights: list[int] = []
    training = Training(
        config, Artifacts(store, runner, KEYS, JOB, scratch), scratch, torch.device("cpu"), peers, Quiet(),
        agree=lambda value: peers.gather(value)[0], report_to_train=lambda _: None,
    )  # fmt: skip
    original = training._train

    def watched(prepared: Any) -> dict[str, Any]:
        # The previews at step 0 and the sampler count prompts too; here only what the preparation encoded counts.
        seen.update(pictures=Counted.pictures, prompts=Counted.prompts)
        weights.append(held(prepared.family.denoiser))
        return original(prepared)

    seen: dict[str, int] = {}
    training._train = watched  # type: ignore[method-assign]
    result = training.run()
    return {"result": result, "held": weights, **seen}


def dataset(folder: Path, runner: LoopThread) -> InMemoryStore:
    store = InMemoryStore()
    files = [(path.name, path, None) for path in sorted((folder / "pictures").iterdir())]
    runner.run_blocking(write_dataset(store, KEYS, "cats", files, now=datetime(2026, 11, 21, tzinfo=UTC)))
    return store


def worker(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size
        )
    peers: Peers = Alone() if world_size == 1 else TorchPeers(rank, world_size)
    runner = LoopThread("test")
    for index, spec in enumerate(json.loads((folder / "runs.json").read_text())):
        store = dataset(folder, runner)
        told = train(folder, spec, peers, f"scratch-{index}-{rank}", store, runner)
        (folder / f"{index}-{rank}.json").write_text(json.dumps(told))
        for key in [key for key in list(store.keys()) if f"/{JOB}/" in key] if rank == 0 else []:
            path = folder / str(index) / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(asyncio.run(store.get(key)))
    runner.stop()
    if world_size > 1:
        torch.distributed.destroy_process_group()


def main() -> int:
    from diffusion.families import FAMILIES

    FAMILIES["StableDiffusionPipeline"] = Counted
    folder, world_size = Path(sys.argv[1]), 2
    # Forked after the imports, which are most of what a process costs, and before torch has any threads.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker, args=(folder, rank, world_size)) for rank in range(world_size)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    return max(abs(process.exitcode or 0) for process in workers)


if __name__ == "__main__":
    sys.exit(main())
