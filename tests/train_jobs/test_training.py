from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from diffusion.images import read_settings
from diffusion.lora import read_lora
from storage.datasets import write_dataset
from storage.errors import StorageUnavailable
from storage.loop_thread import LoopThread
from storage.patience import PatientStore
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, NOW, Told, get, keys
from train_jobs.previews import Previews
from train_jobs.progress import Progress
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json


def test_a_training_stores_its_adapter_previews_checkpoints_and_losses(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    told, reports = Told(), list[Any]()
    output = train(spec, told, reports=reports)["output"]
    assert told.steps == [1, 2, 3, 4]
    assert [name for i, name in enumerate(told.stages) if i == 0 or told.stages[i - 1] != name] == [
        "dataset", "model", "caching", "sampling", "training", "sampling", "training", "sampling", "training", "saving",
    ]  # fmt: skip
    assert [report["step"] for report in reports] == [2, 4]
    [lora] = output["loras"]
    path = tmp_path / "my_lora.safetensors"
    path.write_bytes(get(store, lora["key"]))
    read = read_lora(path)
    assert (read.rank, set(read.alphas.values())) == (2, {4.0})
    assert read.metadata["modelspec.trigger_phrase"] == "ohwx"
    assert all(tensor.dtype == torch.float16 for tensor in read.state.values())
    assert any(bool((t != 0).any()) for name, t in read.state.items() if "lora_B" in name)
    assert lora["size_bytes"] == path.stat().st_size
    assert (lora["id"], lora["filename"], lora["step"]) == (JOB, "my_lora.safetensors", 4)
    assert [(s["step"], s["index"], s["seed"]) for s in output["samples"]] == [
        (0, 0, 42), (0, 1, 9), (2, 0, 42), (2, 1, 9), (4, 0, 42), (4, 1, 9),
    ]  # fmt: skip
    first = get(store, output["samples"][0]["key"])
    assert Image.open(io.BytesIO(first)).size == (16, 16)
    assert (read_settings(first) or {})["prompt"] == "ohwx a cat"
    assert [c["step"] for c in output["checkpoints"]] == [4]
    assert len(keys(store, "/checkpoints/")) == 3
    assert [step for step, _ in json.loads(get(store, output["loss_key"]))] == [1, 2, 3, 4]
    assert (output["steps"], output["base_model"], output["trigger_word"]) == (4, "tiny", "ohwx")
    json.dumps(output)


class Outage(Told):
    """The store goes away at a step, and comes back after so many naps; or a user cancels then."""

    def __init__(self, store: InMemoryStore, *, at_step: int, naps: int, cancels: bool = False) -> None:
        super().__init__()
        self._store, self._at_step, self._naps, self._cancels = store, at_step, naps, cancels
        self.patient = PatientStore(
            store, should_stop=lambda: self.stop_reason is not None, tell=self.waiting, sleep=self._sleep
        )

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        if progress.step == self._at_step:
            self._store.break_down(StorageUnavailable("put", 60.0))

    async def _sleep(self, seconds: float) -> None:
        self._naps -= 1
        if self._naps == 0 and self._cancels:
            self.stop_reason = "cancelled"
        elif self._naps == 0:
            self._store.recover()


@pytest.mark.parametrize("step", [2, 4], ids=["at a checkpoint", "at the end"])
def test_a_training_waits_while_the_storage_is_away_and_ends_as_any_other(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, step: int
) -> None:
    outage = Outage(store, at_step=step, naps=70)
    output = train(spec, outage, objects=outage.patient)["output"]
    assert outage.steps == [1, 2, 3, 4]
    assert [name for name in outage.stages if name in {"waiting", "going on"}] == ["waiting", "going on"]
    assert [c["step"] for c in output["checkpoints"]] == [4]
    assert len(output["samples"]) == 6
    assert all(asyncio.run(store.exists(s["key"])) for s in output["samples"])


def test_a_training_that_is_cancelled_while_the_storage_is_away_stops_at_once_and_keeps_its_last_checkpoint(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    outage = Outage(store, at_step=4, naps=3, cancels=True)
    assert train(spec, outage, objects=outage.patient) == {"stopped": "cancelled"}
    store.recover()
    assert len(keys(store, "/checkpoints/000000002/")) == 3


def test_a_stopped_training_keeps_its_last_step_and_continues_from_it(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    quiet = spec.model_copy(update={"sample": spec.sample.model_copy(update={"previews": ()})})
    stopped = train(quiet, Told(stop_at=3))
    assert stopped["stopped"] == "cancelled"
    assert [c["step"] for c in stopped["output"]["checkpoints"]] == [3]
    told = Told()
    continued = train(quiet, told)["output"]
    assert told.steps == [4]
    adapter = get(store, continued["loras"][0]["key"])
    for key in keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(key))
    unbroken = train(quiet)["output"]
    assert continued["final_loss"] == pytest.approx(unbroken["final_loss"])
    for name, data in (("a", adapter), ("b", get(store, unbroken["loras"][0]["key"]))):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    a, b = (read_lora(tmp_path / f"{name}.safetensors").state for name in "ab")
    assert max(float((a[name] - b[name]).abs().max()) for name in b) <= 1e-3


def test_more_steps_of_a_training_equal_one_that_had_them_from_the_start(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec.model_copy(update={"sample": spec.sample.model_copy(update={"previews": ()})})
    short = quiet.model_copy(update={"train": quiet.train.model_copy(update={"steps": 2})})
    unbroken = train(quiet, process_id="train_00000000000a")["output"]
    first = train(short, process_id="train_00000000000b")["output"]
    told = Told()
    more = quiet.model_copy(update={"continues": "train_00000000000b"})
    output = train(more, told, process_id="train_00000000000c")["output"]

    assert told.steps == [3, 4]
    assert get(store, output["loras"][0]["key"]) != get(store, first["loras"][0]["key"])
    ours, theirs = (load(get(store, found["loras"][0]["key"])) for found in (output, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [checkpoint["step"] for checkpoint in output["checkpoints"]] == [4]


def test_a_training_that_continues_one_without_a_checkpoint_says_so(
    train: Callable[..., dict[str, Any]], spec: TrainSpec
) -> None:
    failure = train(spec.model_copy(update={"continues": "train_00000000000b"}))["failure"]
    assert failure["code"] == "config_invalid"
    assert "continues" in failure["message"]


def test_a_training_continues_on_the_upload_it_began_with(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, runner: LoopThread
) -> None:
    quiet = spec.model_copy(update={"sample": spec.sample.model_copy(update={"previews": ()})})
    train(quiet, Told(stop_at=2))
    later = datetime(2026, 11, 22, tzinfo=UTC)
    runner.run_blocking(write_dataset(store, KEYS, "cats", [("a.png", b"not a picture", None)], now=later))
    assert "output" in train(quiet)


def test_a_training_asked_to_stop_while_it_prepares_has_nothing_to_keep(
    train: Callable[..., dict[str, Any]], spec: TrainSpec
) -> None:
    result = train(spec, Told(stop_at=0))
    assert result == {"stopped": "cancelled", "output": {"steps": 0, "samples": [], "checkpoints": []}}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"datasets": [{"dataset": "dogs"}]}, "dataset_not_found"),
        ({"model": "missing"}, "model_not_available"),
        ({"sample": {"previews": [{"prompt": "a"}], "width_px": 17}}, "config_invalid"),
        ({"sample": {"previews": [{"prompt": "a"}], "width_px": 16, "scheduler": "no"}}, "config_invalid"),
    ],
)
def test_a_request_that_cannot_work_is_a_failure_and_not_an_exception(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, change: dict[str, Any], code: str
) -> None:
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | change))["failure"]
    assert (failure["code"], failure["retryable"]) == (code, False)


def test_broken_pictures_are_named(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, runner: LoopThread
) -> None:
    files = [("a.png", b"not a picture", None)]
    runner.run_blocking(write_dataset(store, KEYS, "bad", files, now=NOW))
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | {"datasets": [{"dataset": "bad"}]}))["failure"]
    assert failure["code"] == "image_unreadable"
    assert "a.png" in failure["message"]


def test_half_a_checkpoint_is_not_continued_from(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    asyncio.run(store.put(KEYS.checkpoint_file(JOB, 3, "adapter.safetensors"), b"half"))
    told = Told()
    assert "output" in train(spec, told)
    assert told.steps == [1, 2, 3, 4]


def test_previews_for_which_a_machine_has_not_the_memory_are_left_out(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        torch.empty(10**14)

    monkeypatch.setattr(Previews, "make", exhausted)
    output = train(spec)["output"]
    assert output["steps"] == 4
    assert output["warnings"][0] == "There was not enough memory for the previews at step 0."
