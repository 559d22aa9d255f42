"""What W&B gets of a training, and that nothing it does ends or holds up one. Run with the real package, offline."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from storage.counters import TRACKING_FAILURES, Tally
from storage.loop_thread import LoopThread
from tests.train_jobs import two_workers
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.config_check import check_tracking
from train_jobs.errors import ConfigInvalid
from train_jobs.peers import Alone
from train_jobs.progress import Progress
from train_jobs.spec import TrainSpec, WandbSpec
from train_jobs.spec_json import spec_from_json
from train_jobs.tracking import WandbTracker

KEY = "0123456789abcdef0123456789abcdef01234567"
MISSING = "W&B needs raylora[wandb]"


def _spec(**fields: Any) -> dict[str, Any]:
    return {
        "name": "my_lora", "model": "tiny", "network": {"rank": 2},
        "datasets": [{"dataset": "cats", "resolutions_px": [32], "bucket_step_px": 8}],
        "train": {"steps": 3, "learning_rate": 1e-2, "dtype": "fp32"}, "save": {"every_steps": 1}, **fields,
    }  # fmt: skip


def _progress(step: int) -> Progress:
    return Progress(step, 10, 0.5 / step, 0.6 / step, 1e-4, 2.0, 1.0)


def _tracker(folder: Path, counters: Tally, **options: float) -> WandbTracker:
    return WandbTracker(
        WandbSpec(project="cats"), SecretStr(KEY), process_id="train_0123456789ab", name="my_lora",
        facts={"steps": 10}, folder=folder, counters=counters, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def wandb() -> Iterator[None]:
    """The package reads the environment once in a process, unless it is torn down."""
    package = pytest.importorskip("wandb", reason=MISSING)
    yield
    with warnings.catch_warnings():
        # It leaves its own process's handle to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        package.teardown()
        gc.collect()


@pytest.fixture
def offline(wandb: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def _read(folder: Path) -> bytes:
    """The one run that wandb left there, in its own format, which holds names and numbers as they are."""
    [run] = folder.rglob("*.wandb")
    return run.read_bytes()


def _files(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("has_key", "installed", "code", "told"),
    [(False, True, "wandb_key_missing", "WANDB_API_KEY"), (True, False, "wandb_not_installed", "raylora[wandb]")],
)
def test_what_is_missing_is_refused_with_what_to_do(
    has_key: bool, installed: bool, code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_jobs.config_check.find_spec", lambda name: object() if installed else None)
    asked = spec_from_json(TrainSpec, _spec(wandb={}))
    with pytest.raises(ConfigInvalid) as refused:
        check_tracking(asked, has_key=has_key)
    [problem] = refused.value.problems
    assert (problem.path, problem.code) == ("wandb", code)
    assert told in problem.message
    check_tracking(spec_from_json(TrainSpec, _spec()), has_key=False)


def test_an_ai_toolkit_file_asks_by_its_logging_section() -> None:
    def parsed(logging: dict[str, Any]) -> WandbSpec | None:
        process = {
            "type": "sd_trainer", "network": {"type": "lora"}, "datasets": [{"folder_path": "cats"}],
            "model": {"name_or_path": "tiny"}, "logging": logging,
        }  # fmt: skip
        return parse_train_yaml({"job": "extension", "config": {"name": "my_lora", "process": [process]}}).spec.wandb

    assert parsed({"project_name": "cats", "log_every": 10, "verbose": True}) is None
    assert parsed({"use_wandb": False, "project_name": "cats"}) is None
    assert parsed({"use_wandb": True}) == WandbSpec(project="ai-toolkit")
    asked = {"use_wandb": True, "project_name": "cats", "run_name": "[name] again"}
    assert parsed(asked) == WandbSpec(project="cats", run="my_lora again")
    with pytest.raises(ConfigInvalid) as refused:
        parsed({"use_wandb": True, "project_name": "a/b"})
    assert refused.value.problems[0].path == "config.process[0].logging.project_name"


def test_every_step_is_in_the_run_and_the_key_is_not(offline: None, tmp_path: Path) -> None:
    counters = Tally()
    tracker = _tracker(tmp_path, counters)
    for step in (1, 2, 3):
        tracker.progress(_progress(step))
    tracker.close()
    run = _read(tmp_path)
    assert counters.total(TRACKING_FAILURES) == 0
    assert all(text in run for text in (b"cats", b"my_lora", b"loss/smoothed", b"learning_rate"))
    assert all(f"{0.6 / step}".encode() in run for step in (1, 2, 3))
    assert KEY.encode() not in _files(tmp_path)


def test_a_server_that_cannot_be_reached_is_counted_once(
    wandb: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    counters = Tally()
    tracker = _tracker(tmp_path, counters, init_timeout_s=2.0)
    tracker.progress(_progress(1))
    tracker.close()
    tracker.progress(_progress(2))
    assert counters.total(TRACKING_FAILURES) == 1
    assert "train_0123456789ab" in caplog.text
    assert KEY not in caplog.text


WAITS_FOR_NOBODY = """
import json, sys
from pathlib import Path
from storage.counters import Tally
from tests.train_jobs.test_tracking import _progress, _tracker

counters = Tally()
tracker = _tracker(Path(sys.argv[1]), counters, init_timeout_s=600.0, close_timeout_s=1.0)
tracker.progress(_progress(1))
tracker.close()
print(json.dumps(counters.counts()), flush=True)
"""


def test_a_server_that_never_answers_holds_up_neither_the_training_nor_the_end_of_its_process(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason=MISSING)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "WANDB_BASE_URL": url, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", WAITS_FOR_NOBODY, str(tmp_path)], env=environment, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == {TRACKING_FAILURES: {"timeout": 1}}, done.stderr[-2000:]
    assert KEY not in done.stdout + done.stderr


def test_a_training_is_tracked_and_leaves_no_key_behind(offline: None, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "pictures" / "red.png")
    runner = LoopThread("test")
    store = two_workers.dataset(tmp_path, runner)
    told = two_workers.train(
        tmp_path, _spec(wandb={"project": "cats"}), Alone(), "tracked", store, runner, wandb_api_key=SecretStr(KEY)
    )
    runner.stop()
    assert told["result"]["output"]["steps"] == 3
    losses = json.loads(asyncio.run(store.get(told["result"]["output"]["loss_key"])))
    run = _read(tmp_path / "tracked")
    assert all(str(loss).encode() in run for _, loss in losses)
    assert str(tmp_path).encode() not in run
    kept = b"".join(asyncio.run(store.get(key)) for key in list(store.keys()))
    assert KEY.encode() not in kept + _files(tmp_path / "tracked")
    assert KEY not in json.dumps(told)
