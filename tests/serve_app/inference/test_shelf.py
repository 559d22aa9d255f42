"""Models that are asked for at the same time, beside calls of those that are loaded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusion.engine.order import Turns
from diffusion.families import load_family
from diffusion.testing import write_tiny_model
from serve_app.inference.engines import EngineShelf


class NotedTurns(Turns):
    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self._notes = notes

    def __enter__(self) -> None:
        super().__enter__()
        self._notes.append("turn")

    def __exit__(self, *error: object) -> None:
        self._notes.append("end")
        super().__exit__(*error)


def test_models_are_loaded_one_at_a_time_each_after_a_turn_for_its_room() -> None:
    notes: list[str] = []
    both_asked = threading.Barrier(2)

    def load(folder: str) -> Any:
        notes.append(folder)
        notes.append(folder)
        return SimpleNamespace(close=lambda: None, iteration_s=lambda: 0.0)

    shelf = EngineShelf({"a": "a", "b": "b"}, load, loaded_max=2, turns=NotedTurns(notes))

    def ask(alias: str) -> None:
        both_asked.wait(30)
        shelf.load(alias)
        shelf.load(alias)  # is there: takes no turn

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, "ab"))
    first, second = notes[2], notes[6]
    assert {first, second} == {"a", "b"}
    assert notes == ["turn", "end", first, first, "turn", "end", second, second]
    assert set(shelf.loaded) == {"a", "b"}


def test_a_model_that_is_loaded_leaves_the_device_to_the_others() -> None:
    turns, reading, called = Turns(), threading.Event(), threading.Event()

    def load(folder: str) -> Any:
        reading.set()
        assert called.wait(30)
        return SimpleNamespace(close=lambda: None, iteration_s=lambda: 0.0)

    shelf = EngineShelf({"a": "a"}, load, turns=turns)

    def call() -> None:
        assert reading.wait(30)
        with turns:
            called.set()

    with ThreadPoolExecutor(2) as threads:
        loading, calling = threads.submit(shelf.load, "a"), threads.submit(call)
        calling.result(60)
        loading.result(60)
    assert shelf.loaded == ("a",)


def test_weights_are_read_between_turns_and_put_on_the_device_within_them(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = write_tiny_model("sd1", tmp_path)
    read = AutoencoderKL.from_pretrained

    def noted_read(*args: Any, **options: Any) -> Any:
        notes.append("read")
        return read(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoencoderKL, "from_pretrained", noted_read)
        load_family(folder, device="cpu", dtype=torch.float32, turns=NotedTurns(notes))
    assert notes == ["read", *["turn", "end"] * 3]
