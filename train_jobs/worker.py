"""One Ray Train worker: a shell around `training.Training`, and what the driver gives to it."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
from pydantic import SecretStr

from storage.actor import StorageClient
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.patience import PatientStore
from storage.ray_counters import note_cleanup_failure
from storage.settings import BreakerSettings, S3Settings
from train_jobs.reporting import BoardReporter, Quiet, Reporter


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver gives to every worker. `s3` hides its secrets when printed.

    `workers` is how many workers a step's samples are for, however many there are at a time. `kept_folder` is where a
    node keeps what later trainings can use again; None for the object store alone. `reads_older`: adapters of the
    system before this one are the tenant's to begin from.
    """

    process_id: str
    tenant: str
    spec: dict[str, Any]
    models: dict[str, str]
    paths_allowed: bool
    s3: S3Settings
    breaker: BreakerSettings
    use_gpu: bool
    workers: int = 1
    wandb_api_key: SecretStr | None = None
    kept_folder: str | None = None
    reads_older: bool = False


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's per-worker function; `payload` holds a WorkerConfig and the board's actor handle.

    Rank 0's return value reaches the driver: `{"failure": {...}}` for an error that another try would meet again,
    else the outcome. Any other error is raised, and Ray Train starts the workers again.
    """
    # Here, not above: the driver and Ray Train's controller import this module too, and train nothing.
    import ray.train.torch
    import torch

    from train_jobs.artifacts import Artifacts
    from train_jobs.peers import Alone, Peers, TorchPeers
    from train_jobs.training import Training

    config: WorkerConfig = payload["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    board = payload["board"]
    telling = (
        BoardReporter(lambda progress: ray.get(board.report.remote(progress), timeout=20.0)) if rank == 0 else None
    )
    reporter: Reporter = telling or Quiet()
    scratch = Path(tempfile.mkdtemp(prefix="raylora-train-"))
    runner = LoopThread("training-storage")
    try:
        if telling is not None:
            telling.start()
        store = PatientStore(
            StorageClient(config.s3, config.breaker),
            should_stop=lambda: reporter.stop_reason is not None,
            tell=reporter.waiting,
        )
        keys = Keys(config.s3.prefix, config.tenant, reads_older=config.reads_older)
        artifacts = Artifacts(store, runner, keys, config.process_id, scratch, continues=config.spec.get("continues"))
        device = ray.train.torch.get_device() if config.use_gpu else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(threads_of_worker(context.get_local_world_size()))
        peers: Peers = Alone() if world_size == 1 else TorchPeers(rank, world_size)
        training = Training(config, artifacts, scratch, device, peers, reporter, agree=_agree)
        return training.run()
    finally:
        if telling is not None:
            telling.close()
        runner.stop()
        _remove(scratch)


def threads_of_worker(workers_on_node: int) -> int:
    """An equal share of the CPUs that this process may use, at least one.

    Ray allows each worker as many threads as it holds CPUs, which on a laptop is one. Workers on other nodes have no
    say: they use other CPUs, and with the number of threads the rounding of every sum would change when one is lost.
    """
    return max(1, len(os.sched_getaffinity(0)) // workers_on_node)


def _remove(scratch: Path) -> None:
    """What is left of it costs the training nothing but disk."""
    try:
        shutil.rmtree(scratch)
    except OSError as error:
        note_cleanup_failure("training_scratch", type(error).__name__)


def _agree(value: bool) -> bool:
    """Rank 0's value, on every worker."""
    agreed: bool = ray.train.collective.broadcast_from_rank_zero(value)
    return agreed
