"""A training as one of its workers does it: from a spec to stored checkpoints, previews and the finished adapter.

Nothing durable is kept on the worker's disk, so a worker that starts again on another node continues from the newest
stored checkpoint. Plain: runs without Ray's trainer around it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch

from diffusion.errors import Cancelled
from storage.errors import StorageError
from storage.ray_counters import of_this_process
from train_jobs.artifacts import Artifacts
from train_jobs.checkpoint import read_checkpoint
from train_jobs.config_check import check_tracking, describe_run
from train_jobs.errors import OutOfMemory, TrainingError
from train_jobs.failures import as_training_error, is_out_of_memory
from train_jobs.file_digests import FileDigests
from train_jobs.loop import Callbacks, Outcome, TrainingLoop
from train_jobs.loss_log import LossLog
from train_jobs.peers import Peers
from train_jobs.preparing import Preparation, Prepared
from train_jobs.progress import Progress
from train_jobs.reporting import (
    PREVIEWS,
    PREVIEWS_REPORTED_MAX,
    RESUMED_FROM,
    WORKERS_NOW,
    Reporter,
)
from train_jobs.results import Results
from train_jobs.saving import Saving
from train_jobs.spec import TrainSpec
from train_jobs.tracking import NoTracker, Tracker, WandbTracker
from train_jobs.worker import WorkerConfig

logger = logging.getLogger(__name__)

WORKERS = "workers"
"""Among a checkpoint's facts: of how many workers' batches a step is made."""


class Training:
    """What a worker does, given its surroundings. Rank 0 also reports, stores and makes previews."""

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
        self._workers = max(config.workers, peers.world_size)
        self._artifacts = artifacts
        self._scratch = scratch
        self._device = device
        self._peers = peers
        self._reporter = reporter
        self._agree = agree
        self._report_to_train = report_to_train
        self._clock_s = clock_s
        self._is_split = self._spec.train.strategy == "fsdp" and peers.world_size > 1
        self._results = Results(self._spec, artifacts, scratch, base_model=self._base_model())
        losses = LossLog(artifacts.store_log, scratch, of_this_process())
        self._saving = Saving(artifacts, self._results, losses, reporter, scratch, keep=self._spec.save.keep)

    def run(self) -> dict[str, Any]:
        """Prepare, train, export. Returns what the driver settles the record with."""
        try:
            return self._run()
        except StorageError as error:
            if not self._should_stop() or error.retry_after_s is None:
                raise
            logger.warning("the training was stopped while the object storage was away")
            return {"stopped": self._reporter.stop_reason}

    def _run(self) -> dict[str, Any]:
        failure: TrainingError | None = None
        prepared: Prepared | None = None
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
        self._results.warnings += prepared.warnings
        return self._train(prepared)

    def _prepare(self) -> Prepared | None:
        check_tracking(self._spec, has_key=self._config.wandb_api_key is not None)
        return Preparation(
            self._spec,
            self._artifacts,
            self._device,
            self._config.models,
            scratch=self._scratch,
            kept=self._artifacts.kept(self._config.kept_folder),
            digests=FileDigests(None if self._config.kept_folder is None else Path(self._config.kept_folder)),
            paths_allowed=self._config.paths_allowed,
            stage=self._reporter.stage,
            should_stop=self._should_stop,
            peers=self._peers,
        ).run()

    def _train(self, prepared: Prepared) -> dict[str, Any]:
        tracker = self._tracker()
        try:
            return self._train_tracked(prepared, tracker)
        finally:
            tracker.close()

    def _tracker(self) -> Tracker:
        wanted, key = self._spec.wandb, self._config.wandb_api_key
        if wanted is None or key is None or self._peers.rank != 0:
            return NoTracker()
        facts = {k: v for k, v in describe_run(self._spec).items() if k != "captioning"} | {"model": self._base_model()}
        return WandbTracker(
            wanted, key, process_id=self._config.process_id, name=self._spec.name, facts=facts, folder=self._scratch,
            counters=of_this_process(),
        )  # fmt: skip

    def _train_tracked(self, prepared: Prepared, tracker: Tracker) -> dict[str, Any]:
        def tell(progress: Progress) -> None:
            self._reporter.progress(progress)
            tracker.progress(progress)

        loop = TrainingLoop(
            prepared.family,
            dict(prepared.lora.named_parameters()),
            prepared.cache,
            self._spec.train,
            peers=self._peers,
            callbacks=Callbacks(
                on_progress=tell,
                after_step=lambda loop, is_last: self._after_step(loop, prepared, is_last=is_last),
                should_stop=self._should_stop,
                clock_s=self._clock_s,
                set_dropout=prepared.lora.set_dropout,
            ),
            validation=prepared.validation,
            share_of=self._share_of(prepared),
        )
        told: dict[str, Any] = {WORKERS_NOW: self._peers.world_size}
        if prepared.checkpoint is not None:
            loop.load(prepared.checkpoint.state)
            logger.info("continuing %s at step %d", self._config.process_id, loop.step)
            told[RESUMED_FROM] = loop.step
            self._take_over_previews(loop, prepared)
            told[PREVIEWS] = prepared.previews.made[-PREVIEWS_REPORTED_MAX:]
        elif prepared.previews.due_at(0, total_steps=self._spec.train.steps):
            self._make_previews(loop, prepared, 0)
        self._reporter.stage("training", step=loop.step, total_steps=self._spec.train.steps, **told)
        try:
            outcome = loop.run()
        except Exception as error:
            if self._peers.rank == 0 and not isinstance(error, StorageError):
                self._saving.losses(loop)
            failure = as_training_error(error, model=self._spec.model)
            # With several workers only an error that all of them meet may be returned; the rest is raised.
            is_shared = self._peers.world_size == 1 or not isinstance(failure, OutOfMemory)
            if failure is None or failure.retryable or not is_shared:
                raise
            logger.warning("the training ended at step %d: %s", loop.step, failure.code)
            return {"failure": _failure(failure)}
        return self._finish(prepared, loop, outcome)

    def _share_of(self, prepared: Prepared) -> int:
        """How many workers' batches make a step; a continued training keeps what it began with."""
        began_with = None if prepared.checkpoint is None else prepared.checkpoint.facts.get(WORKERS)
        return began_with if isinstance(began_with, int) and began_with > 0 else self._workers

    def _after_step(self, loop: TrainingLoop, prepared: Prepared, *, is_last: bool) -> None:
        step, total = loop.step, self._spec.train.steps
        is_best = prepared.validation is not None and prepared.validation.best_step == step
        if is_last or is_best or step % self._spec.save.every_steps == 0:
            self._save(loop, prepared)
        is_stopping = is_last and step < total
        if not is_stopping and prepared.previews.due_at(step, total_steps=total):
            self._make_previews(loop, prepared, step)

    def _save(self, loop: TrainingLoop, prepared: Prepared) -> None:
        loop.check_weights()
        if self._peers.rank == 0:
            self._saving.checkpoint(loop, prepared, facts={WORKERS: self._share_of(prepared)})
            self._saving.losses(loop)
        elif self._is_split:
            # Reading the adapter of a split model changes what lies where: on all workers, or their next step differs.
            prepared.lora.file_state()
        # A barrier: every worker comes here at the same steps.
        self._report_to_train({"step": loop.step, "loss": loop.smoothed_loss})

    def _take_over_previews(self, loop: TrainingLoop, prepared: Prepared) -> None:
        """Those of earlier attempts; a checkpoint's own that an attempt had no time to make are made now."""
        is_missing = False
        if self._peers.rank == 0:
            stored = [sample for sample in self._artifacts.samples() if sample.step <= loop.step]
            prepared.previews.remember(stored, self._artifacts.read_sample)
            is_due = prepared.previews.due_at(loop.step, total_steps=self._spec.train.steps)
            is_missing = is_due and not prepared.previews.are_made(loop.step)
            # What a continued training ended with has the previews that it wanted.
            is_missing = is_missing and loop.step in self._artifacts.checkpoint_steps()
        if self._agree(is_missing):
            self._make_previews(loop, prepared, loop.step)

    def _make_previews(self, loop: TrainingLoop, prepared: Prepared, step: int) -> None:
        """A preview that cannot be made does not end the training; it is noted in the output.

        Of a model that is split over the workers all of them make it, and none stops before the others.
        """
        if self._peers.rank != 0 and not self._is_split:
            return
        self._reporter.stage("sampling", step=step)
        try:
            with loop.averaged():
                prepared.previews.make(step, (lambda: False) if self._is_split else self._should_stop)
        except Cancelled:
            logger.info("previews at step %d were left out: the training is to stop", step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("not enough memory for the previews at step %d", step)
            self._results.warnings.append(f"There was not enough memory for the previews at step {step}.")
        self._reporter.stage("training", step=step, **{PREVIEWS: prepared.previews.made[-PREVIEWS_REPORTED_MAX:]})

    def _finish(self, prepared: Prepared, loop: TrainingLoop, outcome: Outcome) -> dict[str, Any]:
        if self._peers.rank != 0:
            return {}
        # Before the loop goes back, and its history with it.
        losses, step, best = self._saving.losses(loop), outcome.step, loop.best_step
        if outcome.is_stopped:
            return self._stopped(step, best=best, samples=prepared.previews.made, **losses)
        self._reporter.stage("saving")
        if loop.is_stalled and best is not None:
            step = self._go_back(loop, best)
        with loop.averaged():
            files = self._results.store_adapter(prepared, step=step)
        output = {
            **files,
            **losses,
            "samples": prepared.previews.made,
            "checkpoints": self._artifacts.checkpoints(best=best),
            "base_model": self._base_model(),
            "base_model_sha256": prepared.base_model_sha256,
            "trigger_word": self._spec.trigger_word,
            "subject_id": self._spec.subject_id,
            "steps": outcome.step,
            "best_step": best,
            "final_loss": outcome.final_loss,
            "warnings": self._results.warnings,
        }
        return {"output": output}

    def _go_back(self, loop: TrainingLoop, best: int) -> int:
        """Take the weights of the checkpoint with the lowest validation loss. Returns its step."""
        folder = self._artifacts.fetch_checkpoint(best)
        loop.load(read_checkpoint(folder, expected=loop.state().parameters).state)
        return best

    def _base_model(self) -> str:
        """The model's name as it was asked for; of a local path, its last part."""
        model = self._spec.model
        return Path(model).name if self._config.paths_allowed and Path(model).is_dir() else model

    def _stopped(self, step: int, *, best: int | None = None, **told: Any) -> dict[str, Any]:
        output = {"steps": step, "samples": [], "checkpoints": self._artifacts.checkpoints(best=best), **told}
        if best is not None:
            output["best_step"] = best
        return {"stopped": self._reporter.stop_reason or "interrupted", "output": output}

    def _should_stop(self) -> bool:
        return self._reporter.stop_reason is not None


def _failure(error: TrainingError) -> dict[str, Any]:
    return {"code": error.code, "message": error.public_message, "retryable": error.retryable}
