"""What is stored of a training while it runs: its checkpoints and its loss history."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train_jobs.artifacts import Artifacts
from train_jobs.checkpoint import write_checkpoint
from train_jobs.loop import TrainingLoop
from train_jobs.loss_log import LossLog
from train_jobs.preparing import Prepared
from train_jobs.reporting import BEST_STEP, LOGS, Reporter
from train_jobs.results import Results


class Saving:
    """One worker's, which alone stores. `keep` is how many checkpoints there are besides the best one."""

    def __init__(
        self, artifacts: Artifacts, results: Results, losses: LossLog, reporter: Reporter, scratch: Path, *, keep: int
    ) -> None:
        self._artifacts = artifacts
        self._results = results
        self._losses = losses
        self._reporter = reporter
        self._scratch = scratch
        self._keep = keep

    def checkpoint(self, loop: TrainingLoop, prepared: Prepared, *, facts: Mapping[str, Any]) -> None:
        """Store one with the adapter that the training would result in now. Raises StorageError."""

        def write_adapter(path: Path) -> None:
            with loop.averaged():
                self._results.write_adapter(path, prepared, step=loop.step)

        folder = self._scratch / f"saving-{loop.step}"
        known = {"uploads": prepared.uploads, BEST_STEP: loop.best_step, **facts}
        paths = write_checkpoint(folder, loop.state(), facts=known, write_adapter=write_adapter)
        self._artifacts.store_checkpoint(loop.step, paths, keep=self._keep, best=loop.best_step)
        shutil.rmtree(folder)

    def losses(self, loop: TrainingLoop) -> dict[str, Any]:
        """Store the history up to now and report where it is. Returns that for the job's output."""
        self._losses.store(loop)
        self._reporter.stage("training", step=loop.step, **{LOGS: self._losses.keys})
        return self._losses.output(loop)
