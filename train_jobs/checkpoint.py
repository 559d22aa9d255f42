"""Checkpoints as files: two safetensors files and a JSON. No pickle, so a stored one cannot run code.

adapter.safetensors      the adapter that the training would result in now, as its final one is written
optimizer.safetensors    what the training goes on from, in full precision: the trained parameters,
                         `parameter.<parameter>`, their average, `average.<parameter>`, and the optimizer's tensors,
                         `<slot>.<parameter>`
state.json               step, losses, the optimizer's plain numbers, what the training depends on, and the SHA-256
                         of the other two

Version 2 had the parameters in the first, in full precision and by their own names: it is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_jobs.checkpoint_state import ADAPTER, STATE, digests_in
from train_jobs.errors import CheckpointInvalid
from train_jobs.loop import LoopState

VERSION = 3
BARE_ADAPTER_VERSION = 2
PARAMETER = "parameter."
AVERAGE = "average."
OPTIMIZER = "optimizer.safetensors"
FILES = (ADAPTER, OPTIMIZER, STATE)
"""In the order they are stored: a checkpoint whose last file exists is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A loop's state and the facts stored with it (the dataset uploads it was trained on)."""

    state: LoopState
    facts: dict[str, Any]


def write_checkpoint(
    folder: Path, state: LoopState, *, facts: Mapping[str, Any], write_adapter: Callable[[Path], object]
) -> list[Path]:
    """Write `state` into `folder`, its adapter by `write_adapter`; the paths come in the order of `FILES`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder / ADAPTER)
    parameters = {f"{PARAMETER}{name}": tensor for name, tensor in state.parameters.items()}
    average = {f"{AVERAGE}{name}": tensor for name, tensor in state.average.items()}
    save_file(_contiguous(state.optimizer | parameters | average), folder / OPTIMIZER)
    meta = {
        "version": VERSION,
        "step": state.step,
        "history": state.history,
        "recent_losses": state.recent_losses,
        "numbers": state.numbers,
        "group": state.group,
        "validation": state.validation,
        "facts": dict(facts),
        "sha256": {name: _sha256_of(folder / name) for name in (ADAPTER, OPTIMIZER)},
    }
    (folder / STATE).write_text(json.dumps(meta))
    return [folder / name for name in FILES]


def read_checkpoint(folder: Path, *, expected: Mapping[str, Tensor]) -> Checkpoint:
    """Read it back for parameters of `expected`'s names and shapes. Raises CheckpointInvalid."""
    try:
        meta = json.loads((folder / STATE).read_text())
        version, step = int(meta["version"]), int(meta["step"])
        optimizer = load_file(folder / OPTIMIZER)
        parameters = _taken(optimizer, PARAMETER) if version == VERSION else load_file(folder / ADAPTER)
        history = [(int(at), float(loss)) for at, loss in meta["history"]]
        recent = [float(loss) for loss in meta["recent_losses"]]
        validation = [(int(at), float(loss)) for at, loss in meta["validation"]]
        numbers, group = _numbers(meta["numbers"]), _numbers(meta["group"])
        facts = dict(meta["facts"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        raise CheckpointInvalid("a file of it is missing or damaged") from None
    if version not in (VERSION, BARE_ADAPTER_VERSION):
        raise CheckpointInvalid("it was written by another version")
    average = _taken(optimizer, AVERAGE)
    _check_same(parameters, expected)
    if average:
        _check_same(average, expected)
    if any(key.partition(".")[2] not in expected for key in (*optimizer, *numbers)):
        raise CheckpointInvalid("it belongs to another network or model")
    state = LoopState(
        step, parameters, optimizer, history, recent, numbers=numbers, group=group, average=average,
        validation=validation,
    )  # fmt: skip
    return Checkpoint(state, facts)


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 (hex) of a checkpoint's other files, as its state says; none in one of an earlier version.

    Raises CheckpointInvalid.
    """
    try:
        state = (folder / STATE).read_bytes()
    except OSError:
        raise CheckpointInvalid("its state is missing") from None
    return digests_in(state)


def steps_to_prune(steps: Sequence[int], *, keep: int, best: int | None = None) -> list[int]:
    """Which of the stored steps to delete so that the newest `keep` remain, and the `best` one with them."""
    return [step for step in sorted(set(steps))[:-keep] if step != best]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbers(value: Any) -> dict[str, float]:
    """Whole numbers stay whole: some optimizers count with them."""
    return {str(key): number if isinstance(number, int) else float(number) for key, number in dict(value).items()}


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name has the prefix, which they lose, taken out of `tensors`."""
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if {name: tensor.shape for name, tensor in found.items()} != {n: tensor.shape for n, tensor in expected.items()}:
        raise CheckpointInvalid("it belongs to another network or model")
