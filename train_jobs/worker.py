"""One Ray Train worker: from a job's spec to stored checkpoints, previews and the finished adapter.

Every worker reads the data and trains; rank 0 also reports, stores and makes previews. Nothing durable is kept on the
worker's disk, so a worker that starts again on another node continues from the newest stored checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from torch import Tensor

from diffusion.adapter import TrainableLora, attach_lora
from diffusion.errors import Cancelled, OutOfGpuMemory
from diffusion.families import Family, load_family
from diffusion.lora import save_lora
from storage.actor import StorageClient
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.settings import BreakerSettings, S3Settings
from train_jobs.artifacts import Artifacts, pinned_uploads
from train_jobs.board import StopReason
from train_jobs.cache import TrainingCache, build_cache
from train_jobs.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from train_jobs.data import Use, plan_uses, read_folder
from train_jobs.errors import OutOfMemory, TrainingError
from train_jobs.failures import as_training_error
from train_jobs.loop import Alone, Callbacks, Outcome, Peers, Progress, TrainingLoop
from train_jobs.models import resolve_model
from train_jobs.previews import Previews
from train_jobs.spec import TrainSpec

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
EXPORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOSS_LOG = "loss.json"
# In a report: the step of the checkpoint that this attempt went on from, absent where it began at the beginning.
RESUMED_FROM = "resumed_from_step"
# In a report: the newest previews, each with the key of its picture.
PREVIEWS = "previews"
PREVIEWS_REPORTED_MAX = 16
KEPT_IN_REPORTS = frozenset({RESUMED_FROM, PREVIEWS})


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver gives to every worker. `s3` hides its secrets when printed."""

    process_id: str
    tenant: str
    spec: dict[str, Any]
    models: dict[str, str]
    paths_allowed: bool
    s3: S3Settings
    breaker: BreakerSettings
    use_gpu: bool


class Reporter(Protocol):
    """Where a worker says how far it is, and learns whether to stop."""

    def stage(self, name: str, **details: Any) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    @property
    def stop_reason(self) -> StopReason | None: ...


class Quiet:
    """For ranks other than 0, which learn of a stop from rank 0 through the loop."""

    stop_reason: StopReason | None = None

    def stage(self, name: str, **details: Any) -> None:
        """Nobody is told."""

    def progress(self, progress: Progress) -> None:
        """Nobody is told."""


class BoardReporter:
    """Tells the driver's board from a thread of its own, so that a slow driver slows no step.

    `exchange` sends a report and returns a reason to stop. A board that is dead went with its driver, and so did the
    work's purpose, which reads as "interrupted"; one that is only slow is asked again.
    """

    def __init__(
        self, exchange: Callable[[dict[str, Any]], StopReason | None], *, interval_s: float = REPORT_INTERVAL_S
    ) -> None:
        self._exchange = exchange
        self._interval_s = interval_s
        self._latest: dict[str, Any] = {"stage": "starting"}
        self._ended = threading.Event()
        self.stop_reason: StopReason | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> BoardReporter:
        self._thread.start()
        return self

    def stage(self, name: str, **details: Any) -> None:
        numbers = {k: v for k, v in self._latest.items() if k not in {"stage", "done", "of"}}
        self._latest = numbers | {"stage": name, **details}

    def progress(self, progress: Progress) -> None:
        kept = {k: v for k, v in self._latest.items() if k in KEPT_IN_REPORTS}
        self._latest = {"stage": "training", **asdict(progress), **kept}

    def close(self) -> None:
        """Send the last report and end the thread."""
        self._ended.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(self._interval_s)
            try:
                self.stop_reason = self._exchange(self._latest) or self.stop_reason
            except ray.exceptions.RayActorError:
                logger.warning("the training's driver is gone")
                self.stop_reason = self.stop_reason or "interrupted"
            except ray.exceptions.RayError as error:
                logger.warning("the training's driver does not answer: %s", type(error).__name__)


class TorchPeers:
    """The other workers, over the process group that Ray Train set up."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def sum_(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's per-worker function; `payload` holds a WorkerConfig and the board's actor handle.

    Rank 0's return value reaches the driver: `{"failure": {...}}` for an error that another try would meet again,
    else the outcome. Any other error is raised, and Ray Train starts the workers again.
    """
    config: WorkerConfig = payload["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    board = payload["board"]
    reporter = (
        BoardReporter(lambda progress: ray.get(board.report.remote(progress), timeout=20.0)) if rank == 0 else None
    )
    scratch = Path(tempfile.mkdtemp(prefix="raylora-train-"))
    runner = LoopThread("training-storage")
    try:
        if reporter is not None:
            reporter.start()
        store = StorageClient(config.s3, config.breaker)
        keys = Keys(config.s3.prefix, config.tenant)
        artifacts = Artifacts(store, runner, keys, config.process_id, scratch)
        device = ray.train.torch.get_device() if config.use_gpu else torch.device("cpu")
        if device.type == "cpu":
            # Ray allows each worker as many threads as it holds CPUs, which on a laptop is one.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
        peers: Peers = Alone() if world_size == 1 else TorchPeers(rank, world_size)
        training = Training(config, artifacts, scratch, device, peers, reporter or Quiet(), agree=_agree)
        return training.run()
    finally:
        if reporter is not None:
            reporter.close()
        runner.stop()
        shutil.rmtree(scratch, ignore_errors=True)


def _agree(value: bool) -> bool:
    """Rank 0's value, on every worker."""
    agreed: bool = ray.train.collective.broadcast_from_rank_zero(value)
    return agreed


@dataclass
class _Prepared:
    family: Family
    lora: TrainableLora
    cache: TrainingCache
    checkpoint: Checkpoint | None
    uploads: dict[str, str]
    previews: Previews


class Training:
    """What a worker does, given its surroundings."""

    def __init__(
        self,
        config: WorkerConfig,
        artifacts: Artifacts,
        scratch: Path,
        device: torch.device,
        peers: Peers,
        reporter: Reporter,
        *,
        agree: Callable[[bool], bool],
        report_to_train: Callable[[dict[str, Any]], None] = lambda metrics: ray.train.report(metrics),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = TrainSpec.model_validate(config.spec)
        self._config = config
        self._artifacts = artifacts
        self._scratch = scratch
        self._device = device
        self._peers = peers
        self._reporter = reporter
        self._agree = agree
        self._report_to_train = report_to_train
        self._clock_s = clock_s
        self._warnings: list[str] = []

    def run(self) -> dict[str, Any]:
        """Prepare, train, export. Returns what the driver settles the record with."""
        failure: TrainingError | None = None
        prepared: _Prepared | None = None
        try:
            prepared = self._prepare()
        except Exception as error:
            failure = as_training_error(error, model=self._spec.model)
            if failure is None or failure.retryable:
                raise
            logger.info("the training cannot start: %s", failure.code)
        # A worker alone in failing must not return: the others would wait for it in the first step.
        if self._agree(failure is not None):
            return {"failure": _failure(failure)} if failure is not None else {}
        if failure is not None:
            raise failure
        if self._agree(prepared is None):
            return self._stopped(0)
        if prepared is None:
            raise RuntimeError("a worker stopped while rank 0 did not")
        return self._train(prepared)

    def _prepare(self) -> _Prepared | None:
        """Everything before the first step; None when asked to stop."""
        spec, reporter = self._spec, self._reporter
        reporter.stage("dataset")
        checkpoint_folder = self._newest_checkpoint()
        pins = pinned_uploads(_facts_of(checkpoint_folder))
        folders, uploads = [], {}
        for index, dataset in enumerate(spec.datasets):
            folder, manifest = self._artifacts.dataset(dataset, index, pins.get(dataset.label))
            folders.append(read_folder(folder, dataset))
            uploads[dataset.label] = manifest.upload_id
        reporter.stage("model")
        family, lora = self._load_model()
        previews = Previews(
            family,
            lora,
            spec.sample,
            name=spec.name,
            scratch=self._scratch,
            store=self._artifacts.store_sample,
        )
        previews.check(family)
        uses: list[Use] = []
        for pictures, dataset in zip(folders, spec.datasets, strict=True):
            uses += plan_uses(pictures, dataset, size_multiple=family.size_multiple)
        checkpoint = None
        if checkpoint_folder is not None:
            checkpoint = read_checkpoint(checkpoint_folder, expected=dict(lora.named_parameters()))
        cache = build_cache(
            family,
            uses,
            on_progress=lambda done, total: reporter.stage("caching", done=done, of=total),
            should_stop=self._should_stop if self._peers.world_size == 1 else None,
        )
        if cache is None or self._should_stop():
            return None
        return _Prepared(family, lora, cache, checkpoint, uploads, previews)

    def _newest_checkpoint(self) -> Path | None:
        steps = self._artifacts.checkpoint_steps()
        return self._artifacts.fetch_checkpoint(steps[-1]) if steps else None

    def _load_model(self) -> tuple[Family, TrainableLora]:
        """The CPU computes in float32: bf16 is slower there, and no better."""
        spec, config = self._spec, self._config
        is_half = spec.train.dtype == "bf16" and self._device.type != "cpu"
        folder = resolve_model(spec.model, config.models, paths_allowed=config.paths_allowed)
        family = load_family(folder, device=self._device, dtype=torch.bfloat16 if is_half else torch.float32)
        network = spec.network
        lora = attach_lora(
            family, rank=network.rank, alpha=network.alpha_effective, targets=network.targets, seed=spec.train.seed
        )
        return family, lora

    def _train(self, prepared: _Prepared) -> dict[str, Any]:
        loop = TrainingLoop(
            prepared.family,
            dict(prepared.lora.named_parameters()),
            prepared.cache,
            self._spec.train,
            peers=self._peers,
            callbacks=Callbacks(
                on_progress=self._reporter.progress,
                after_step=lambda loop, is_last: self._after_step(loop, prepared, is_last=is_last),
                should_stop=self._should_stop,
                clock_s=self._clock_s,
            ),
        )
        resumed: dict[str, Any] = {}
        if prepared.checkpoint is not None:
            loop.load(prepared.checkpoint.state)
            logger.info("continuing %s at step %d", self._config.process_id, loop.step)
            resumed = {RESUMED_FROM: loop.step}
        elif prepared.previews.due_at(0, total_steps=self._spec.train.steps):
            self._make_previews(prepared, 0)
        self._reporter.stage("training", step=loop.step, total_steps=self._spec.train.steps, **resumed)
        try:
            outcome = loop.run()
        except Exception as error:
            failure = as_training_error(error, model=self._spec.model)
            # With several workers only an error that all of them meet may be returned; the rest is raised.
            is_shared = self._peers.world_size == 1 or not isinstance(failure, OutOfMemory)
            if failure is None or failure.retryable or not is_shared:
                raise
            logger.warning("the training ended at step %d: %s", loop.step, failure.code)
            return {"failure": _failure(failure)}
        return self._finish(prepared, loop, outcome)

    def _after_step(self, loop: TrainingLoop, prepared: _Prepared, *, is_last: bool) -> None:
        step, total = loop.step, self._spec.train.steps
        if is_last or step % self._spec.save.every_steps == 0:
            self._save(loop, prepared)
        is_stopping = is_last and step < total
        if not is_stopping and prepared.previews.due_at(step, total_steps=total):
            self._make_previews(prepared, step)

    def _save(self, loop: TrainingLoop, prepared: _Prepared) -> None:
        if self._peers.rank == 0:
            folder = self._scratch / f"saving-{loop.step}"
            paths = write_checkpoint(folder, loop.state(), facts={"uploads": prepared.uploads})
            self._artifacts.store_checkpoint(loop.step, paths, keep=self._spec.save.keep)
            shutil.rmtree(folder)
        # A barrier: every worker comes here at the same steps.
        self._report_to_train({"step": loop.step, "loss": loop.smoothed_loss})

    def _make_previews(self, prepared: _Prepared, step: int) -> None:
        """A preview that cannot be made does not end the training; it is noted in the output."""
        if self._peers.rank != 0:
            return
        self._reporter.stage("sampling", step=step)
        try:
            prepared.previews.make(step, self._should_stop)
        except Cancelled:
            logger.info("previews at step %d were left out: the training is to stop", step)
        except OutOfGpuMemory:
            logger.warning("not enough memory for the previews at step %d", step)
            self._warnings.append(f"There was not enough memory for the previews at step {step}.")
        self._reporter.stage("training", step=step, **{PREVIEWS: prepared.previews.made[-PREVIEWS_REPORTED_MAX:]})

    def _finish(self, prepared: _Prepared, loop: TrainingLoop, outcome: Outcome) -> dict[str, Any]:
        if self._peers.rank != 0:
            return {}
        if outcome.is_stopped:
            return self._stopped(outcome.step, samples=prepared.previews.made)
        self._reporter.stage("saving")
        path = self._scratch / f"{self._spec.name}.safetensors"
        save_lora(
            path,
            prepared.lora.state_dict(),
            metadata=self._metadata(prepared, outcome.step),
            dtype=EXPORT_DTYPES[self._spec.save.dtype],
        )
        lora = self._artifacts.store_lora(path, step=outcome.step)
        loss_key = self._artifacts.store_log(LOSS_LOG, json.dumps(loop.history).encode())
        return {
            "output": {
                "loras": [lora],
                "samples": prepared.previews.made,
                "checkpoints": self._artifacts.checkpoints(),
                "loss_key": loss_key,
                "base_model": self._base_model(),
                "trigger_word": self._spec.trigger_word,
                "subject_id": self._spec.subject_id,
                "steps": outcome.step,
                "final_loss": outcome.final_loss,
                "warnings": self._warnings,
            }
        }

    def _metadata(self, prepared: _Prepared, step: int) -> dict[str, str]:
        spec = self._spec
        return prepared.lora.metadata(
            title=spec.name,
            steps=step,
            base_model=self._base_model(),
            trigger_word=spec.trigger_word,
            resolution=max(r for dataset in spec.datasets for r in dataset.resolutions_px),
            created_at=datetime.now(UTC),
            extra={"ss_learning_rate": str(spec.train.learning_rate), "ss_seed": str(spec.train.seed)},
        )

    def _base_model(self) -> str:
        """The model's name as it was asked for; of a local path, its last part."""
        model = self._spec.model
        return Path(model).name if self._config.paths_allowed and Path(model).is_dir() else model

    def _stopped(self, step: int, *, samples: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        output = {"steps": step, "samples": samples or [], "checkpoints": self._artifacts.checkpoints()}
        return {"stopped": self._reporter.stop_reason or "interrupted", "output": output}

    def _should_stop(self) -> bool:
        return self._reporter.stop_reason is not None


def _failure(error: TrainingError) -> dict[str, Any]:
    return {"code": error.code, "message": error.public_message, "retryable": error.retryable}


def _facts_of(folder: Path | None) -> Mapping[str, Any]:
    """The facts stored in a checkpoint; a damaged one is reported later, when it is read in whole."""
    if folder is None:
        return {}
    try:
        facts = json.loads((folder / "state.json").read_text())["facts"]
    except (ValueError, KeyError, TypeError):
        return {}
    return facts if isinstance(facts, dict) else {}


__all__ = ["BoardReporter", "Training", "WorkerConfig", "train_worker"]
