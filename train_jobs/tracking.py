"""A training's numbers at Weights & Biases while it runs, where its request asks for that and the operator gave a key.

wandb is an optional package, imported only then. It has a thread of its own and never the training's: what hangs, fails
or cannot be reached is logged and counted, and the training goes on.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
from pydantic import SecretStr

from storage.counters import TRACKING_FAILURES, Counters
from train_jobs.progress import Progress
from train_jobs.spec import WandbSpec

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 30.0
KILLED_WITHIN_S = 5.0
WAITING_MAX = 10_000
SERVICE = "wandb-core"


class Tracker(Protocol):
    """Hears of every update; neither method raises."""

    def progress(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """Where nobody asked for one."""

    def progress(self, progress: Progress) -> None:
        """Nobody is told."""

    def close(self) -> None:
        """Nothing to end."""


class WandbTracker:
    """One run at W&B, named by the process's id, so that a continued training continues its run.

    `facts` are shown as its configuration. W&B's files are made in `folder`. Numbers that wait for W&B are at most
    `WAITING_MAX`; further ones are left out. `close` waits for the last ones at most `close_timeout_s`.
    """

    def __init__(
        self,
        wanted: WandbSpec,
        key: SecretStr,
        *,
        process_id: str,
        name: str,
        facts: Mapping[str, Any],
        folder: Path,
        counters: Counters,
        init_timeout_s: float = INIT_TIMEOUT_S,
        close_timeout_s: float = CLOSE_TIMEOUT_S,
    ) -> None:
        self._wanted = wanted
        self._key = key
        self._process_id = process_id
        self._name = wanted.run or name
        self._facts = dict(facts)
        self._folder = folder
        self._counters = counters
        self._init_timeout_s = init_timeout_s
        self._close_timeout_s = close_timeout_s
        self._waiting: queue.Queue[Progress | None] = queue.Queue(maxsize=WAITING_MAX)
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def progress(self, progress: Progress) -> None:
        if self._has_failed:
            return
        try:
            self._waiting.put_nowait(progress)
        except queue.Full:
            self._fail("behind")

    def close(self) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
        self._waiting.put_nowait(None)
        self._thread.join(self._close_timeout_s)
        if self._thread.is_alive():
            self._fail("timeout")
            _end_service()

    def _work(self) -> None:
        try:
            run = self._begin()
            while (progress := self._waiting.get()) is not None:
                run.log(_numbers(progress), step=progress.step)
            run.finish()
        except Exception as error:  # noqa: BLE001 - whatever another program's client raises: the training goes on
            # Its text may hold what it was called with.
            self._fail(type(error).__name__)

    def _begin(self) -> Any:
        import wandb

        settings = wandb.Settings(
            api_key=self._key.get_secret_value(), init_timeout=self._init_timeout_s, console="off", silent=True,
            # The numbers of the training are asked for, not what the machine is and runs.
            x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, disable_git=True, disable_code=True,
            x_save_requirements=False, save_code=False,
        )  # fmt: skip
        return wandb.init(
            project=self._wanted.project, name=self._name, id=self._process_id, resume="allow", config=self._facts,
            dir=str(self._folder), settings=settings,
        )  # fmt: skip

    def _fail(self, reason: str) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        self._counters.add(TRACKING_FAILURES, reason=reason)
        logger.warning("W&B gets no more numbers of %s (%s)", self._process_id, reason)


def _numbers(progress: Progress) -> dict[str, float]:
    """By the names that the TensorBoard file has."""
    numbers = {
        "loss": progress.loss,
        "loss/smoothed": progress.smoothed_loss,
        "learning_rate": progress.learning_rate,
        "steps_per_s": progress.steps_per_s,
    }
    return numbers if progress.validation_loss is None else numbers | {"loss/validation": progress.validation_loss}


def _end_service() -> None:
    """wandb's own process, for which this one would wait at its end."""
    for child in psutil.Process().children():
        try:
            if child.name() == SERVICE:
                child.kill()
                child.wait(timeout=KILLED_WITHIN_S)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue
