from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train_jobs.checkpoint import FILES, OPTIMIZER, read_checkpoint, steps_to_prune, write_checkpoint
from train_jobs.checkpoint_state import ADAPTER, STATE
from train_jobs.errors import CheckpointInvalid
from train_jobs.loop import LoopState


def _state() -> LoopState:
    parameters = {"unet.a.lora_A.weight": torch.randn(2, 3), "unet.a.lora_B.weight": torch.randn(3, 2)}
    optimizer = {
        f"{slot}.{name}": tensor * 2 for slot in ("exp_avg", "exp_avg_sq") for name, tensor in parameters.items()
    }
    optimizer |= {f"step.{name}": torch.tensor(5.0) for name in parameters}
    return LoopState(5, parameters, optimizer, [(1, 0.5), (5, 0.25)], [0.5, 0.25])


def _write_adapter(path: Path) -> None:
    save_file({"unet.a.lora_A.weight": torch.zeros(2, 3, dtype=torch.float16)}, path)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = _state()
    paths = write_checkpoint(tmp_path, state, facts={"uploads": {"cats": "u1"}}, write_adapter=_write_adapter)
    assert [path.name for path in paths] == list(FILES)
    read = read_checkpoint(tmp_path, expected=state.parameters)
    assert read.facts == {"uploads": {"cats": "u1"}}
    assert (read.state.step, read.state.history, read.state.recent_losses) == (5, state.history, state.recent_losses)
    assert all(torch.equal(read.state.parameters[k], v) for k, v in state.parameters.items())
    assert all(torch.equal(read.state.optimizer[k], v) for k, v in state.optimizer.items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / STATE).unlink(),
        lambda folder: (folder / STATE).write_text("{"),
        lambda folder: (folder / STATE).write_text(json.dumps({"version": 3})),
        lambda folder: (folder / OPTIMIZER).write_bytes((folder / OPTIMIZER).read_bytes()[:-4]),
        lambda folder: (folder / STATE).write_text(
            (folder / STATE).read_text().replace('"version": 3', '"version": 9')
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    state = _state()
    write_checkpoint(tmp_path, state, facts={}, write_adapter=_write_adapter)
    damage(tmp_path)
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path, expected=state.parameters)


def _as_version_2(folder: Path) -> None:
    """As it was written when its adapter was the bare parameters."""
    tensors = load_file(folder / OPTIMIZER)
    bare = {key: tensors.pop(key) for key in list(tensors) if key.startswith("parameter.")}
    save_file({key.removeprefix("parameter."): tensor for key, tensor in bare.items()}, folder / ADAPTER)
    save_file(tensors, folder / OPTIMIZER)
    meta = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps(meta | {"version": 2}))


def test_a_checkpoint_of_the_version_before_is_continued_from_unless_its_adapter_is_damaged(tmp_path: Path) -> None:
    state = _state()
    state.average = {name: tensor / 2 for name, tensor in state.parameters.items()}
    write_checkpoint(tmp_path, state, facts={}, write_adapter=_write_adapter)
    _as_version_2(tmp_path)
    read = read_checkpoint(tmp_path, expected=state.parameters).state
    for found, written in ((read.parameters, state.parameters), (read.optimizer, state.optimizer)):
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    assert all(torch.equal(read.average[name], tensor) for name, tensor in state.average.items())
    (tmp_path / ADAPTER).write_bytes(b"x" * 20)
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path, expected=state.parameters)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = _state()
    write_checkpoint(tmp_path, state, facts={}, write_adapter=_write_adapter)
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path, expected={name: torch.zeros(4, 4) for name in state.parameters})
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path, expected={"other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("steps", "keep", "doomed"),
    [([300, 100, 200], 2, [100]), ([100], 2, []), ([], 1, []), ([1, 2, 3], 1, [1, 2])],
)
def test_the_newest_checkpoints_are_kept(steps: list[int], keep: int, doomed: list[int]) -> None:
    assert steps_to_prune(steps, keep=keep) == doomed
