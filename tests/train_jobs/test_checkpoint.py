from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train_jobs.checkpoint import ADAPTER, FILES, OPTIMIZER, STATE, read_checkpoint, steps_to_prune, write_checkpoint
from train_jobs.errors import CheckpointInvalid
from train_jobs.loop import LoopState


def _state() -> LoopState:
    parameters = {"unet.a.lora_A.weight": torch.randn(2, 3), "unet.a.lora_B.weight": torch.randn(3, 2)}
    optimizer = {
        f"{slot}.{name}": tensor * 2 for slot in ("exp_avg", "exp_avg_sq") for name, tensor in parameters.items()
    }
    optimizer |= {f"step.{name}": torch.tensor(5.0) for name in parameters}
    return LoopState(5, parameters, optimizer, [(1, 0.5), (5, 0.25)], [0.5, 0.25])


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = _state()
    paths = write_checkpoint(tmp_path, state, facts={"uploads": {"cats": "u1"}})
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
        lambda folder: (folder / STATE).write_text(json.dumps({"version": 2})),
        lambda folder: (folder / ADAPTER).write_bytes(b"x" * 20),
        lambda folder: (folder / OPTIMIZER).write_bytes((folder / OPTIMIZER).read_bytes()[:-4]),
        lambda folder: (folder / STATE).write_text(
            (folder / STATE).read_text().replace('"version": 2', '"version": 9')
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    state = _state()
    write_checkpoint(tmp_path, state, facts={})
    damage(tmp_path)
    with pytest.raises(CheckpointInvalid):
        read_checkpoint(tmp_path, expected=state.parameters)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    state = _state()
    write_checkpoint(tmp_path, state, facts={})
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
