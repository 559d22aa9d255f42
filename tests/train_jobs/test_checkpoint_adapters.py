"""A checkpoint's adapter is one to draw with, and what is gone on from is beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.families import Family
from diffusion.lora import read_lora
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, Told, get, keys
from train_jobs.checkpoint import OPTIMIZER
from train_jobs.checkpoint_state import ADAPTER, STATE
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json

Train = Callable[..., dict[str, Any]]
NETWORKS: dict[str, dict[str, Any]] = {
    "alpha": {"rank": 2, "alpha": 8},
    "average": {"rank": 2, "alpha": 1, "ema_decay": 0.5},
    "dora": {"type": "dora", "rank": 2, "alpha": 4},
    "lokr": {"type": "lokr", "lokr_full_rank": False, "lokr_factor": 4, "rank": 2, "alpha": 1},
    "loha": {"type": "loha", "rank": 2, "alpha": 4},
}


def of_kind(spec: TrainSpec, name: str, *, steps: int = 4) -> TrainSpec:
    """Rounds its files, so that what is gone on from cannot come from them."""
    network = dict(NETWORKS[name])
    train = spec.train.model_dump() | {"steps": steps, "ema_decay": network.pop("ema_decay", None)}
    save = {"every_steps": 2, "keep": 4, "dtype": "fp16"}
    change = {"network": network, "train": train, "save": save, "sample": {}}
    return spec_from_json(TrainSpec, spec.model_dump() | change)


def checkpoint_file(store: InMemoryStore, step: int, name: str = ADAPTER) -> bytes:
    return get(store, KEYS.checkpoint_file(JOB, step, name))


def forget(store: InMemoryStore) -> None:
    for key in keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(key))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_checkpoints_adapter_draws_what_a_training_that_ends_at_its_step_draws(
    kind: str, train: Train, spec: TrainSpec, store: InMemoryStore, family: Family, tmp_path: Path
) -> None:
    train(of_kind(spec, kind))
    (tmp_path / "checkpoint.safetensors").write_bytes(checkpoint_file(store, 2))
    forget(store)
    [result] = train(of_kind(spec, kind, steps=2))["output"]["loras"]
    (tmp_path / "result.safetensors").write_bytes(get(store, result["key"]))

    loras = [(LoraRef(tmp_path / f"{name}.safetensors", 1.0, name),) for name in ("checkpoint", "result")]
    asked = {"prompt": "a cat", "width": 16, "height": 16, "steps": 2, "seed": 3}
    requests = [GenerateRequest(**asked, loras=own) for own in (*loras, ())]
    ours, theirs, without = (np.asarray(made.image, dtype=int) for made in Engine(family).generate(requests))
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours, without)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_training_that_goes_on_from_a_checkpoint_equals_an_unbroken_one_in_every_bit(
    kind: str, train: Train, spec: TrainSpec, store: InMemoryStore
) -> None:
    train(of_kind(spec, kind))
    whole = {name: load(checkpoint_file(store, 4, name)) for name in (ADAPTER, OPTIMIZER)}
    forget(store)
    train(of_kind(spec, kind), Told(stop_at=3))
    told = Told()
    train(of_kind(spec, kind), told)

    assert told.steps == [4]
    for name, expected in whole.items():
        found = load(checkpoint_file(store, 4, name))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_checkpoints_adapter_tells_what_the_final_one_tells(
    train: Train, spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    [final] = train(of_kind(spec, "alpha"))["output"]["loras"]
    (tmp_path / "checkpoint.safetensors").write_bytes(checkpoint_file(store, 2))
    (tmp_path / "final.safetensors").write_bytes(get(store, final["key"]))
    early, late = (read_lora(tmp_path / f"{name}.safetensors").metadata for name in ("checkpoint", "final"))
    own = {"ss_steps", "modelspec.date"}
    assert {name: text for name, text in early.items() if name not in own} == {
        name: text for name, text in late.items() if name not in own
    }
    assert (early["ss_steps"], late["ss_steps"]) == ("2", "4")


def test_a_training_that_an_earlier_version_began_goes_on_to_the_same_end(
    train: Train, spec: TrainSpec, store: InMemoryStore
) -> None:
    train(of_kind(spec, "average"))
    whole = load(checkpoint_file(store, 4, OPTIMIZER))
    forget(store)
    train(of_kind(spec, "average"), Told(stop_at=3))
    state = load(checkpoint_file(store, 3, OPTIMIZER))
    bare = {
        name: state.pop(f"parameter.{name}")
        for name in [n.removeprefix("parameter.") for n in state if "parameter." in n]
    }
    meta = json.loads(checkpoint_file(store, 3, STATE))
    del meta["sha256"]
    older = {ADAPTER: save(bare), OPTIMIZER: save(state), STATE: json.dumps(meta | {"version": 2}).encode()}
    for name, data in older.items():
        asyncio.run(store.put(KEYS.checkpoint_file(JOB, 3, name), data))
    told = Told()
    train(of_kind(spec, "average"), told)

    assert told.steps == [4]
    found = load(checkpoint_file(store, 4, OPTIMIZER))
    assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


def test_a_training_whose_weights_are_no_numbers_any_more_keeps_no_such_checkpoint(
    train: Train, spec: TrainSpec, store: InMemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def overflowing(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("inf"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | {"save": {"every_steps": 1}, "sample": {}}))[
        "failure"
    ]
    assert (failure["code"], failure["retryable"]) == ("non_finite_loss", False)
    assert "at step 1. " in failure["message"]
    assert keys(store, "/checkpoints/") == []
