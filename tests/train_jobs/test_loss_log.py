"""The loss history is stored at every checkpoint and at every end, and holds up no training."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.counters import LOG_FAILURES, Tally
from storage.errors import StorageUnavailable
from storage.objects import ObjectInfo
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, Told, get
from train_jobs import training
from train_jobs.loop import TrainingLoop
from train_jobs.progress import Progress
from train_jobs.samples import Sampler
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json

Train = Callable[..., dict[str, Any]]
FILES = {"loss_key": "loss.json", "loss_chart_key": "loss.png", "tensorboard_key": "events.out.tfevents.raylora"}
LOG_KEYS = {name: KEYS.training_log(JOB, filename) for name, filename in FILES.items()}


@pytest.fixture
def quiet(spec: TrainSpec) -> TrainSpec:
    return spec_from_json(TrainSpec, spec.model_dump() | {"sample": {}})


class Reports(Told):
    """Also remembers what each stage was told with."""

    def __init__(self, stop_at: int | None = None, reason: Any = "cancelled") -> None:
        super().__init__(stop_at)
        self.details: dict[str, Any] = {}
        self._reason = reason

    def stage(self, name: str, **details: Any) -> None:
        super().stage(name, **details)
        self.details |= details

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        self.stop_reason = self._reason if self.stop_reason else None


def steps_of(store: InMemoryStore) -> list[int]:
    return [step for step, _ in json.loads(get(store, LOG_KEYS["loss_key"]))]


def test_the_history_is_there_from_the_first_checkpoint_on(
    train: Train, quiet: TrainSpec, store: InMemoryStore
) -> None:
    seen: list[list[int]] = []

    class Watching(Told):
        def progress(self, progress: Progress) -> None:
            if progress.step in (3, 4):
                seen.append(steps_of(store))

    train(quiet, Watching())
    assert seen == [[1, 2], [1, 2]]
    assert steps_of(store) == [1, 2, 3, 4]


@pytest.mark.parametrize("reason", ["cancelled", "timed_out"])
def test_a_stopped_training_tells_where_its_history_is(
    train: Train, quiet: TrainSpec, store: InMemoryStore, reason: str
) -> None:
    told = Reports(stop_at=3, reason=reason)
    result = train(quiet, told)
    assert result["stopped"] == reason
    assert {name: result["output"][name] for name in LOG_KEYS} == LOG_KEYS == told.details["logs"]
    assert steps_of(store) == [1, 2, 3]
    assert get(store, LOG_KEYS["loss_chart_key"]).startswith(b"\x89PNG")


def test_a_training_that_fails_leaves_the_history_up_to_then(
    train: Train, quiet: TrainSpec, store: InMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, batches = Sampler.losses, iter(range(100))

    def broken(self: Sampler, *args: Any) -> torch.Tensor:
        return losses(self, *args) * (float("nan") if next(batches) == 3 else 1.0)

    monkeypatch.setattr(Sampler, "losses", broken)
    told = Reports()
    assert train(quiet, told)["failure"]["code"] == "non_finite_loss"
    assert steps_of(store) == [1, 2, 3]
    assert told.details["logs"] == LOG_KEYS


def test_a_training_that_crashes_leaves_the_history_up_to_then(
    train: Train, quiet: TrainSpec, store: InMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = TrainingLoop._update

    def crashing(self: TrainingLoop) -> Any:
        if self.step == 3:
            raise RuntimeError
        return update(self)

    monkeypatch.setattr(TrainingLoop, "_update", crashing)
    with pytest.raises(RuntimeError):
        train(quiet)
    assert steps_of(store) == [1, 2, 3]


def test_a_training_that_its_validation_ends_stores_its_whole_history_and_the_worse_steps_too(
    train: Train, quiet: TrainSpec, store: InMemoryStore
) -> None:
    change = {
        "validation": {"every_steps": 1, "share": 0.4, "patience": 2, "places": [0.5]},
        "train": quiet.train.model_dump() | {"steps": 30, "learning_rate": 1.0},
    }
    output = train(spec_from_json(TrainSpec, quiet.model_dump() | change))["output"]
    assert output["best_step"] < output["steps"] < 30
    assert steps_of(store) == list(range(1, output["steps"] + 1))
    assert len(output["validation_losses"]) == output["steps"]


class NoLogs(InMemoryStore):
    """Takes everything but logs."""

    async def put(self, key: str, data: bytes, **rest: Any) -> ObjectInfo:
        if "/logs/" in key:
            raise StorageUnavailable("put", 60.0)
        return await super().put(key, data, **rest)


def test_a_history_that_cannot_be_stored_is_counted_and_costs_the_training_nothing(
    train: Train, quiet: TrainSpec, store: InMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = Tally()
    monkeypatch.setattr(training, "of_this_process", lambda: counters)
    without = NoLogs()
    for key in list(store.keys()):
        asyncio.run(without.put(key, get(store, key)))
    output = train(quiet, objects=without)["output"]
    assert output["steps"] == 4
    assert "loss_key" not in output
    # At both checkpoints, and once more at the end.
    assert counters.counts()[LOG_FAILURES] == {StorageUnavailable.code: 3}


def test_a_history_that_cannot_be_written_is_counted(
    train: Train, quiet: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    counters = Tally()
    monkeypatch.setattr(training, "of_this_process", lambda: counters)
    monkeypatch.setattr("train_jobs.loss_log.tensorboard_file", full)
    assert train(quiet)["output"]["steps"] == 4
    assert counters.counts()[LOG_FAILURES] == {"OSError": 3}
