from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ray.exceptions import GetTimeoutError, RayActorError
from safetensors.torch import load

from diffusion.images import read_settings
from diffusion.lora import read_lora
from diffusion.testing import write_tiny_model
from storage.datasets import write_dataset
from storage.errors import StorageUnavailable
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.objects import ObjectStore
from storage.patience import PatientStore
from storage.settings import BreakerSettings, S3Settings
from storage.testing import InMemoryStore
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.artifacts import Artifacts
from train_jobs.board import StopReason
from train_jobs.errors import ConfigInvalid, DatasetEmpty
from train_jobs.local_datasets import upload_local_datasets, upload_names
from train_jobs.loop import Alone
from train_jobs.progress import Progress
from train_jobs.reporting import BoardReporter
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json
from train_jobs.training import Training
from train_jobs.worker import WorkerConfig

JOB = "train_0123456789ab"
KEYS = Keys("raylora", "default")
NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Told:
    """A reporter that remembers, and asks to stop at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.steps: list[int] = []
        self.stop_reason: StopReason | None = None
        self._stop_at = stop_at

    def stage(self, name: str, **details: Any) -> None:
        self.stages.append(name)
        if self._stop_at == 0:
            self.stop_reason = "cancelled"

    def waiting(self, is_waiting: bool) -> None:
        self.stages.append("waiting" if is_waiting else "going on")

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress.step)
        if progress.step + 1 == self._stop_at:
            self.stop_reason = "cancelled"


@pytest.fixture
def spec(store: InMemoryStore, runner: LoopThread, write_pictures: Callable[..., Path]) -> TrainSpec:
    folder = write_pictures((32, 32), (32, 32), (32, 16))
    files = [(path.name, path, None) for path in sorted(folder.iterdir())]
    runner.run_blocking(write_dataset(store, KEYS, "cats", files, now=NOW))
    return spec_from_json(
        TrainSpec,
        {
            "name": "my_lora",
            "model": "tiny",
            "datasets": [{"dataset": "cats", "resolutions_px": [32], "bucket_step_px": 8, "trigger_word": "ohwx"}],
            "network": {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "dtype": "bf16"},
            "save": {"every_steps": 2, "keep": 1, "dtype": "fp16"},
            "sample": {
                "previews": [{"prompt": "ohwx a cat"}, {"prompt": "a dog", "seed": 9}],
                "every_steps": 2,
                "width_px": 16,
                "height_px": 16,
                "steps": 2,
                "walk_seed": True,
                "format": "png",
            },
            "trigger_word": "ohwx",
        },
    )


@pytest.fixture
def train(
    store: InMemoryStore, runner: LoopThread, model_folder: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    count = iter(range(100))

    def run(
        spec: TrainSpec,
        reporter: Told | None = None,
        *,
        reports: list[Any] | None = None,
        objects: ObjectStore = store,
        process_id: str = JOB,
    ) -> dict[str, Any]:
        scratch = tmp_path / f"scratch-{next(count)}"
        scratch.mkdir()
        config = WorkerConfig(
            process_id=process_id,
            tenant="default",
            spec=spec.model_dump(mode="json"),
            models={"tiny": str(model_folder)},
            paths_allowed=False,
            s3=S3Settings(),
            breaker=BreakerSettings(),
            use_gpu=False,
        )
        return Training(
            config,
            Artifacts(objects, runner, KEYS, process_id, scratch, continues=spec.continues),
            scratch,
            torch.device("cpu"),
            Alone(),
            reporter or Told(),
            agree=lambda value: value,
            report_to_train=(reports if reports is not None else []).append,
        ).run()

    return run


def _get(store: InMemoryStore, key: str) -> bytes:
    return asyncio.run(store.get(key))


def _keys(store: InMemoryStore, part: str) -> list[str]:
    return [key for key in list(store.keys()) if part in key]


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
    path.write_bytes(_get(store, lora["key"]))
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
    first = _get(store, output["samples"][0]["key"])
    assert Image.open(io.BytesIO(first)).size == (16, 16)
    assert (read_settings(first) or {})["prompt"] == "ohwx a cat"
    assert [c["step"] for c in output["checkpoints"]] == [4]
    assert len(_keys(store, "/checkpoints/")) == 3
    assert [step for step, _ in json.loads(_get(store, output["loss_key"]))] == [1, 2, 3, 4]
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
    assert len(_keys(store, "/checkpoints/000000002/")) == 3


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
    adapter = _get(store, continued["loras"][0]["key"])
    for key in _keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(key))
    unbroken = train(quiet)["output"]
    assert continued["final_loss"] == pytest.approx(unbroken["final_loss"])
    for name, data in (("a", adapter), ("b", _get(store, unbroken["loras"][0]["key"]))):
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
    assert _get(store, output["loras"][0]["key"]) != _get(store, first["loras"][0]["key"])
    ours, theirs = (load(_get(store, found["loras"][0]["key"])) for found in (output, unbroken))
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


def test_reports_go_out_from_a_thread_and_bring_the_reason_to_stop() -> None:
    sent: list[dict[str, Any]] = []
    arrived = threading.Event()

    def exchange(progress: dict[str, Any]) -> StopReason | None:
        sent.append(progress)
        arrived.set()
        return "timed_out"

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    assert arrived.wait(10)
    reporter.stage("saving")
    reporter.close()
    assert reporter.stop_reason == "timed_out"
    assert sent[-1]["stage"] == "saving"


def test_every_report_says_where_a_resumed_attempt_went_on_from() -> None:
    sent: list[dict[str, Any]] = []
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.stage("training", step=5, resumed_from_step=5)
    reporter.progress(
        Progress(step=6, total_steps=9, loss=0.5, smoothed_loss=0.5, learning_rate=0.1, steps_per_s=1.0, eta_s=3.0)
    )
    reporter.start().close()
    assert (sent[-1]["step"], sent[-1]["resumed_from_step"]) == (6, 5)


def test_reports_say_what_holds_up_the_work_and_for_how_long() -> None:
    sent: list[dict[str, Any]] = []
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.stage("training", step=5)
    reporter.waiting(True)
    reporter.start().close()
    assert sent[-1] == {"stage": "waiting for storage", "step": 5}
    reporter = BoardReporter(lambda progress: sent.append(progress), interval_s=60)
    reporter.waiting(True)
    reporter.stage("training", step=6)
    reporter.waiting(False)
    reporter.start().close()
    assert sent[-1] == {"stage": "training", "step": 6}


def test_a_driver_that_is_gone_stops_the_work() -> None:
    def exchange(_: dict[str, Any]) -> StopReason | None:
        raise RayActorError

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    reporter.close()
    assert reporter.stop_reason == "interrupted"


def test_a_driver_that_is_slow_does_not_stop_the_work() -> None:
    answers: Iterator[StopReason | Exception] = iter([GetTimeoutError(), "cancelled"])
    asked_twice = threading.Event()

    def exchange(_: dict[str, Any]) -> StopReason | None:
        answer = next(answers, "cancelled")
        if isinstance(answer, Exception):
            raise answer
        asked_twice.set()
        return answer

    reporter = BoardReporter(exchange, interval_s=0.001).start()
    assert asked_twice.wait(10)
    reporter.close()
    assert reporter.stop_reason == "cancelled"


def test_files_of_a_local_folder_get_plain_names_and_stay_in_pairs(tmp_path: Path) -> None:
    for name in ("a.PNG", "a.txt", "sub/a.png", "ü ß.jpg", "ü ß.txt", "sub/b.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    names = [name for name, _ in upload_names(tmp_path, ".txt")]
    assert sorted(names) == ["_ _.jpg", "_ _.txt", "a.png", "a.txt", "sub_a.png"]


async def test_local_folders_are_uploaded_and_pinned(
    store: InMemoryStore, spec: TrainSpec, write_pictures: Callable[..., Path]
) -> None:
    folder = write_pictures((8, 8), name="my cats")
    held = {"dataset": {"local_path": str(write_pictures((8, 8), name="held"))}}
    change = {"datasets": [{"local_path": str(folder)}], "validation": held}
    local = spec_from_json(TrainSpec, spec.model_dump() | change, paths_allowed=True)
    uploaded = await upload_local_datasets(store, KEYS, local, now=NOW)
    assert uploaded.is_remote_safe()
    assert uploaded.datasets[0].dataset == "my_cats"
    assert uploaded.validation is not None
    assert uploaded.validation.dataset is not None
    assert uploaded.validation.dataset.dataset == "held"
    assert uploaded.datasets[0].upload_id is not None
    assert [key.rsplit("/")[-1] for key in list(store.keys()) if "my_cats" in key] == [
        "manifest.json",
        "p0.png",
        "p0.txt",
    ]


async def test_a_local_folder_that_is_missing_or_empty_is_an_error(
    store: InMemoryStore, spec: TrainSpec, tmp_path: Path
) -> None:
    def local(path: Path) -> TrainSpec:
        value = spec.model_dump() | {"datasets": [{"local_path": str(path)}]}
        return spec_from_json(TrainSpec, value, paths_allowed=True)

    with pytest.raises(ConfigInvalid):
        await upload_local_datasets(store, KEYS, local(tmp_path / "missing"), now=NOW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetEmpty):
        await upload_local_datasets(store, KEYS, local(tmp_path / "empty"), now=NOW)


def test_the_result_comes_in_both_key_formats_with_loss_files_and_its_best_checkpoint_marked(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    change = {
        "validation": {"every_steps": 1, "share": 0.4, "patience": 1, "places": [0.5]},
        "train": spec.train.model_dump() | {"steps": 30, "learning_rate": 1.0, "ema_decay": 0.5},
        "sample": {},
    }
    output = train(spec_from_json(TrainSpec, spec.model_dump() | change))["output"]
    assert output["steps"] < 30  # a rate of 1 makes it worse, which ends it
    assert output["best_step"] == output["steps"] - 1 == output["loras"][0]["step"]
    assert [c["step"] for c in output["checkpoints"] if c.get("is_best")] == [output["best_step"]]
    assert len(output["validation_losses"]) == output["steps"]
    [kohya] = output["exports"]
    assert kohya["format"] == "kohya"
    for name, entry in (("a", output["loras"][0]), ("b", kohya)):
        (tmp_path / f"{name}.safetensors").write_bytes(_get(store, entry["key"]))
    ours, theirs = (read_lora(tmp_path / f"{name}.safetensors") for name in "ab")
    assert theirs.source_format == "kohya"
    assert ours.state.keys() == theirs.state.keys()
    assert ours.alphas == theirs.alphas
    assert json.loads(ours.metadata["raylora.config"])["model"] == "tiny"
    assert theirs.metadata["ss_num_train_images"] == "3"
    assert _get(store, output["loss_chart_key"]).startswith(b"\x89PNG")
    assert b"loss/validation" in _get(store, output["tensorboard_key"])


def test_pictures_that_are_there_twice_are_named(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, runner: LoopThread, store: InMemoryStore, tmp_path: Path
) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    files = [(path.name, path, None) for path in sorted(tmp_path.glob("*.png"))]
    runner.run_blocking(write_dataset(store, KEYS, "twice", files, now=NOW))
    change = {"datasets": [{"dataset": "twice", "resolutions_px": [16], "bucket_step_px": 8}], "sample": {}}
    output = train(spec_from_json(TrainSpec, spec.model_dump() | change))["output"]
    assert output["warnings"] == ["In dataset 'twice' these pictures are the same: a.png, c.png."]


def test_a_training_can_begin_from_an_adapter_of_its_owner(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec.model_dump() | {"sample": {}}

    def forget() -> None:
        for old in _keys(store, f"/{JOB}/"):
            asyncio.run(store.delete(old))

    key = train(spec_from_json(TrainSpec, quiet))["output"]["loras"][0]["key"]
    mine = key.replace(JOB, "train_000000000000")
    asyncio.run(store.put(mine, _get(store, key)))
    network = spec.network.model_dump()
    longer = quiet["train"] | {"learning_rate": 1e-12}
    forget()
    again = train(spec_from_json(TrainSpec, quiet | {"network": network | {"pretrained": mine}, "train": longer}))
    names = [c["keys"][0] for c in again["output"]["checkpoints"]]
    begun, before = load(_get(store, names[-1])), load(_get(store, mine))
    assert max(float((begun[name] - before[name]).abs().max()) for name in before) <= 1e-6
    for wrong in ("other/tenant/a.safetensors", mine.replace("my_lora", "none")):
        forget()
        failure = train(spec_from_json(TrainSpec, quiet | {"network": network | {"pretrained": wrong}}))["failure"]
        assert (failure["code"], failure["retryable"]) == ("config_invalid", False)
    forget()
    other_rank = quiet | {"network": network | {"pretrained": mine, "rank": 3}}
    assert train(spec_from_json(TrainSpec, other_rank))["failure"]["code"] == "config_invalid"


def test_a_second_training_finds_what_the_first_one_encoded(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec_from_json(TrainSpec, spec.model_dump() | {"sample": {}, "captioning": {"model": "none"}})
    first = train(quiet)["output"]
    kept = _keys(store, "/kept/")
    assert {key.split("/")[3] for key in kept} == {"latents", "texts"}
    for old in _keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(old))
    again = train(quiet)["output"]
    assert _keys(store, "/kept/") == kept
    assert again["final_loss"] == first["final_loss"]


def test_a_training_whose_captioning_model_is_missing_fails_by_name(
    train: Callable[..., dict[str, Any]], spec: TrainSpec
) -> None:
    asked = {"captioning": {"model": "none", "overwrite": True}}
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | asked))["failure"]
    assert (failure["code"], failure["retryable"]) == ("model_not_available", False)
    assert "'none'" in failure["message"]


def test_a_quantised_base_without_torchao_is_refused_with_what_to_install(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.quantized.find_spec", lambda name: None)
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | {"quantize": {"denoiser": "int8"}}))["failure"]
    assert (failure["code"], failure["retryable"]) == ("config_invalid", False)
    assert "raylora[quantized]" in failure["message"]


def test_a_training_on_a_quantised_base_makes_its_previews_and_an_adapter(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    pytest.importorskip("torchao", reason="quantised base models need raylora[quantized]")
    asked = {"quantize": {"denoiser": "float8", "text_encoders": "int8"}}
    output = train(spec_from_json(TrainSpec, spec.model_dump() | asked))["output"]
    assert len(output["samples"]) == 6
    state = load(_get(store, output["loras"][0]["key"]))
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "network",
    [
        {"type": "lokr", "lokr_full_rank": False, "lokr_factor": 4, "rank": 2, "alpha": 1.0, "conv_rank": 2},
        {"type": "lokr"},
        {"type": "loha", "rank": 2},
    ],
    ids=["lokr", "lokr-full", "loha"],
)
def test_lokr_and_loha_are_stored_under_both_names_and_can_be_begun_from(
    network: dict[str, Any], train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec.model_dump() | {"network": network}

    def forget() -> None:
        for old in _keys(store, f"/{JOB}/"):
            asyncio.run(store.delete(old))

    output = train(spec_from_json(TrainSpec, quiet))["output"]
    assert len(output["samples"]) == 6
    [lora], [export] = output["loras"], output["exports"]
    ours, theirs = load(_get(store, lora["key"])), load(_get(store, export["key"]))
    part = "hada_w1_a" if network["type"] == "loha" else "lokr_w1"
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert {f"unet.{layer}.{part}", f"unet.{layer}.alpha"} <= ours.keys()
    assert {f"lora_unet_{layer.replace('.', '_')}.{part}"} <= theirs.keys()
    assert len(theirs) == len(ours)
    assert ("unet.mid_block.resnets.0.conv1.alpha" in ours) == ("conv_rank" in network or network == {"type": "lokr"})
    kept = {name: _get(store, item["key"]) for name, item in (("a", lora), ("b", export))}
    slow = quiet["train"] | {"learning_rate": 1e-12}
    for name, data in kept.items():
        mine = KEYS.lora_file("train_000000000000", f"{name}.safetensors")
        asyncio.run(store.put(mine, data))
        forget()
        again = spec_from_json(
            TrainSpec, quiet | {"network": network | {"pretrained": mine}, "train": slow, "sample": {}}
        )
        checkpoint = train(again)["output"]["checkpoints"][-1]
        begun = load(_get(store, checkpoint["keys"][0]))
        assert max(float((begun[key] - ours[key]).abs().max()) for key in begun) <= 1e-6
    forget()
    other = {"type": "lokr", "lokr_full_rank": False, "rank": 1, "pretrained": mine}
    assert train(spec_from_json(TrainSpec, quiet | {"network": other}))["failure"]["code"] == "config_invalid"


FLUX_CONFIG = """
---
job: extension
config:
  # this name will be the folder and filename name
  name: "my_first_flux_lora_v1"
  process:
    - type: 'sd_trainer'
      # root folder to save training sessions/samples/weights
      training_folder: "output"
      performance_log_every: 1000
      device: cuda:0
      trigger_word: "p3r5on"
      network:
        type: "lora"
        linear: 16
        linear_alpha: 16
      save:
        dtype: float16
        save_every: 250
        max_step_saves_to_keep: 4
        push_to_hub: false
      datasets:
        - folder_path: "/path/to/images/cats"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        lr: 1e-4
        skip_first_sample: true
        ema_config:
          use_ema: true
          ema_decay: 0.99
        dtype: bf16
      model:
        name_or_path: "black-forest-labs/FLUX.1-dev"
        is_flux: true
        quantize: true
      sample:
        sampler: "flowmatch"
        sample_every: 250
        width: 1024
        height: 1024
        prompts:
          - "[trigger] holding a sign that says 'I LOVE PROMPTS!'"
          - "a bear building a log cabin in the snow covered mountains"
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta:
  name: "[name]"
  version: '1.0'
"""
SDXL_CONFIG = """
job: extension
config:
  name: my_style_xl
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      network: {type: lora, linear: 8, linear_alpha: 4, conv: 4, conv_alpha: 2, dropout: 0.1}
      save: {dtype: bf16, save_every: 500, max_step_saves_to_keep: 2}
      datasets:
        - folder_path: /datasets/cats
          caption_ext: txt
          default_caption: a picture
          shuffle_tokens: true
          keep_tokens: 1
          flip_x: true
          cache_latents: true
          resolution: [1024]
        - folder_path: /datasets/cats
          is_reg: true
          num_repeats: 2
          resolution: 1024
      train:
        batch_size: 2
        steps: 3000
        gradient_accumulation: 2
        train_text_encoder: true
        text_encoder_lr: 5e-5
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adafactor
        optimizer_params: {weight_decay: 0.01}
        lr: 1e-4
        lr_scheduler: cosine
        min_snr_gamma: 5.0
        noise_offset: 0.03
        content_or_style: style
        disable_sampling: true
        dtype: bf16
      model: {name_or_path: stabilityai/stable-diffusion-xl-base-1.0, is_xl: true}
"""


@pytest.mark.parametrize(
    ("family", "config", "hub_id", "parts"),
    [
        ("flux1", FLUX_CONFIG, "black-forest-labs/FLUX.1-dev", {"transformer"}),
        ("sdxl", SDXL_CONFIG,
         "stabilityai/stable-diffusion-xl-base-1.0", {"unet", "text_encoder", "text_encoder_2"}),
    ],
)  # fmt: skip
def test_a_users_ai_toolkit_config_runs_with_only_the_model_pointed_elsewhere(
    family: str, config: str, hub_id: str, parts: set[str], store: InMemoryStore, runner: LoopThread,
    write_pictures: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    files = [(path.name, path, None) for path in sorted(write_pictures((64, 64), (64, 64)).iterdir())]
    runner.run_blocking(write_dataset(store, KEYS, "cats", files, now=NOW))
    folder = write_tiny_model(family, tmp_path / "tiny")
    if find_spec("torchao") is None:
        config = config.replace("quantize: true", "quantize: false")
    parsed = parse_train_yaml(config)
    (tmp_path / "scratch").mkdir()
    told = Told(stop_at=3)
    settings = WorkerConfig(
        process_id=JOB, tenant="default", spec=parsed.spec.model_dump(mode="json"), models={hub_id: str(folder)},
        paths_allowed=False, s3=S3Settings(), breaker=BreakerSettings(), use_gpu=False,
    )  # fmt: skip
    result = Training(
        settings, Artifacts(store, runner, KEYS, JOB, tmp_path / "scratch"), tmp_path / "scratch",
        torch.device("cpu"), Alone(), told, agree=lambda value: value, report_to_train=lambda _: None,
    ).run()  # fmt: skip
    assert told.steps == [1, 2, 3]
    assert [c["step"] for c in result["output"]["checkpoints"]] == [3]
    key = next(k for k in result["output"]["checkpoints"][0]["keys"] if k.endswith("adapter.safetensors"))
    assert {name.partition(".")[0] for name in load(_get(store, key))} == parts
