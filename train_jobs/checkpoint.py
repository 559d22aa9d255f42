"""Checkpoints as files: two safetensors files and a JSON. No pickle, so a stored one cannot run code.

adapter.safetensors      the trained parameters by name, in full precision
optimizer.safetensors    AdamW's state, `<slot>.<parameter>`
state.json               step, loss history, and what the training depends on
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_jobs.errors import CheckpointInvalid
from train_jobs.loop import LoopState

VERSION = 1
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = (ADAPTER, OPTIMIZER, STATE)
"""In the order they are stored: a checkpoint whose last file exists is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A loop's state and the facts stored with it (the dataset uploads it was trained on)."""

    state: LoopState
    facts: dict[str, Any]


def write_checkpoint(folder: Path, state: LoopState, *, facts: Mapping[str, Any]) -> list[Path]:
    """Write `state` into `folder`; the paths come in the order of `FILES`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_contiguous(state.parameters), folder / ADAPTER)
    save_file(_contiguous(state.optimizer), folder / OPTIMIZER)
    meta = {
        "version": VERSION,
        "step": state.step,
        "history": state.history,
        "recent_losses": state.recent_losses,
        "facts": dict(facts),
    }
    (folder / STATE).write_text(json.dumps(meta))
    return [folder / name for name in FILES]


def read_checkpoint(folder: Path, *, expected: Mapping[str, Tensor]) -> Checkpoint:
    """Read it back for parameters of `expected`'s names and shapes. Raises CheckpointInvalid."""
    try:
        parameters = load_file(folder / ADAPTER)
        optimizer = load_file(folder / OPTIMIZER)
        meta = json.loads((folder / STATE).read_text())
        version, step = int(meta["version"]), int(meta["step"])
        history = [(int(at), float(loss)) for at, loss in meta["history"]]
        recent = [float(loss) for loss in meta["recent_losses"]]
        facts = dict(meta["facts"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise CheckpointInvalid("a file of it is missing or damaged") from None
    if version != VERSION:
        raise CheckpointInvalid("it was written by another version")
    _check_shapes(parameters, expected, prefixes=("",))
    _check_shapes(optimizer, expected, prefixes=("step.", "exp_avg.", "exp_avg_sq."))
    return Checkpoint(LoopState(step, parameters, optimizer, history, recent), facts)


def steps_to_prune(steps: Sequence[int], *, keep: int) -> list[int]:
    """Which of the stored steps to delete so that the newest `keep` remain."""
    return sorted(set(steps))[:-keep]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, prefixes: Sequence[str]) -> None:
    if not found and prefixes != ("",):
        return
    wanted = {
        f"{prefix}{name}": torch.Size([]) if prefix == "step." else tensor.shape
        for prefix in prefixes
        for name, tensor in expected.items()
    }
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise CheckpointInvalid("it belongs to another network or model")
