"""The loss history as stored files, while a training runs and however it ends."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.counters import LOG_FAILURES, Counters
from storage.errors import StorageError
from train_jobs.charts import loss_png, tensorboard_file
from train_jobs.loop import TrainingLoop

logger = logging.getLogger(__name__)

LOSS_LOG, LOSS_CHART, EVENTS = "loss.json", "loss.png", "events.out.tfevents.raylora"


class LossLog:
    """Stores the history as JSON, picture and TensorBoard events, each time whole and under the same keys.

    `store_log` takes a name and bytes, and returns the key. The files tell of a training and are no part of it: one
    that cannot be written or stored is logged and counted, and tried again with the next.
    """

    def __init__(self, store_log: Callable[[str, bytes], str], scratch: Path, counters: Counters) -> None:
        self._store_log = store_log
        self._scratch = scratch
        self._counters = counters
        self._stored_step: int | None = None
        self.keys: dict[str, str] = {}
        """By their names in the job's output: `loss_key`, `loss_chart_key`, `tensorboard_key`."""

    def store(self, loop: TrainingLoop) -> None:
        """The history up to the loop's step, unless it is stored already."""
        if not loop.history or self._stored_step == loop.step:
            return
        try:
            self.keys |= self._files(loop)
            self._stored_step = loop.step
        except StorageError as error:
            self._note_failure(error.code)
        except OSError as error:
            self._note_failure(type(error).__name__)

    def output(self, loop: TrainingLoop) -> dict[str, Any]:
        """For the job's output: the keys, and `validation_losses`, `[step, loss]` each, where there are any."""
        losses = [] if loop.validation is None else [list(point) for point in loop.validation.losses]
        return {**self.keys, **({"validation_losses": losses} if losses else {})}

    def _files(self, loop: TrainingLoop) -> dict[str, str]:
        history = loop.history
        validation = [] if loop.validation is None else list(loop.validation.losses)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            events = tensorboard_file(Path(folder), history, validation)
        return {
            "loss_key": self._store_log(LOSS_LOG, json.dumps(history).encode()),
            "loss_chart_key": self._store_log(LOSS_CHART, loss_png(history, validation)),
            "tensorboard_key": self._store_log(EVENTS, events),
        }

    def _note_failure(self, reason: str) -> None:
        logger.warning("the loss history could not be stored (%s)", reason)
        self._counters.add(LOG_FAILURES, reason=reason)
