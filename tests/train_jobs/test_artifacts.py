"""Stored checkpoints come back as they were, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storage.errors import IntegrityError
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from train_jobs import checkpoint
from train_jobs.artifacts import Artifacts
from train_jobs.checkpoint_state import ADAPTER
from train_jobs.checkpoint_state import STATE as STATE_FILE
from train_jobs.errors import ConfigInvalid
from train_jobs.loop import LoopState

KEYS, JOB = Keys("raylora", "default"), "t_" + 32 * "0"
STATE = LoopState(5, {"a.lora_A.weight": torch.ones(2, 3)}, {"exp_avg.a.lora_A.weight": torch.ones(2, 3)}, [], [])


@pytest.fixture
def artifacts(store: InMemoryStore, runner: LoopThread, tmp_path: Path) -> Artifacts:
    artifacts = Artifacts(store, runner, KEYS, JOB, tmp_path / "scratch")
    paths = checkpoint.write_checkpoint(
        tmp_path / "written", STATE, facts={}, write_adapter=lambda path: save_file({"a": torch.ones(2)}, path)
    )
    artifacts.store_checkpoint(5, paths, keep=1)
    return artifacts


def key_of(name: str) -> str:
    return KEYS.checkpoint_file(JOB, 5, name)


def test_a_checkpoint_comes_back(artifacts: Artifacts) -> None:
    read = checkpoint.read_checkpoint(artifacts.fetch_checkpoint(5), expected=STATE.parameters)

    assert torch.equal(read.state.parameters["a.lora_A.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("name", [ADAPTER, checkpoint.OPTIMIZER])
def test_weights_that_were_changed_in_the_store_are_noticed(
    artifacts: Artifacts, store: InMemoryStore, runner: LoopThread, name: str
) -> None:
    data = bytearray(runner.run_blocking(store.get(key_of(name))))
    data[-1] ^= 1
    runner.run_blocking(store.put(key_of(name), bytes(data)))

    with pytest.raises(IntegrityError):
        artifacts.fetch_checkpoint(5)


def test_a_checkpoint_of_before_there_were_digests_is_still_read(
    artifacts: Artifacts, store: InMemoryStore, runner: LoopThread
) -> None:
    state = json.loads(runner.run_blocking(store.get(key_of(STATE_FILE))))
    del state["sha256"]
    runner.run_blocking(store.put(key_of(STATE_FILE), json.dumps(state).encode()))

    assert checkpoint.read_checkpoint(artifacts.fetch_checkpoint(5), expected=STATE.parameters).state.step == 5


def test_an_adapter_of_the_older_layout_comes_for_the_tenant_whose_it_is(
    store: InMemoryStore, runner: LoopThread, tmp_path: Path
) -> None:
    key = "raylora/results/matt/lora/old.safetensors"
    runner.run_blocking(store.put(key, b"weights"))
    own, other = Keys("raylora", "matt", reads_older=True), Keys("raylora", "matt2")

    fetched = Artifacts(store, runner, own, JOB, tmp_path).fetch_lora(key, expected_sha256=None)
    assert fetched.read_bytes() == b"weights"
    with pytest.raises(ConfigInvalid):
        Artifacts(store, runner, other, JOB, tmp_path).fetch_lora(key, expected_sha256=None)


def test_an_adapter_to_begin_from_is_the_one_that_was_recorded(
    store: InMemoryStore, runner: LoopThread, tmp_path: Path
) -> None:
    key = KEYS.lora_file(JOB, "a.safetensors")
    recorded = runner.run_blocking(store.put(key, b"weights")).sha256
    artifacts = Artifacts(store, runner, KEYS, JOB, tmp_path)
    assert artifacts.fetch_lora(key, expected_sha256=recorded).read_bytes() == b"weights"
    runner.run_blocking(store.put(key, b"changed"))

    with pytest.raises(IntegrityError):
        artifacts.fetch_lora(key, expected_sha256=recorded)
