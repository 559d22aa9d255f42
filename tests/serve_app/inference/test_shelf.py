"""Models that are asked for at the same time, beside calls of those that are loaded."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from diffusion.engine.order import Turns
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


def test_models_are_loaded_one_at_a_time_each_in_a_turn_of_the_device() -> None:
    notes: list[str] = []
    both_asked = threading.Barrier(2)

    def load(folder: str) -> Any:
        notes.append(folder)
        return SimpleNamespace(close=lambda: None, iteration_s=lambda: 0.0)

    shelf = EngineShelf({"a": "a", "b": "b"}, load, loaded_max=2, turns=NotedTurns(notes))

    def ask(alias: str) -> None:
        both_asked.wait(30)
        shelf.load(alias)
        shelf.load(alias)  # is there: takes no turn

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, "ab"))
    assert sorted(notes[1::3]) == ["a", "b"]
    assert notes == ["turn", notes[1], "end", "turn", notes[4], "end"]
    assert set(shelf.loaded) == {"a", "b"}


def test_what_is_prepared_before_a_load_leaves_the_device_to_the_others() -> None:
    turns, preparing, called = Turns(), threading.Event(), threading.Event()

    def prepare(folder: str) -> None:
        preparing.set()
        assert called.wait(30)

    def load(folder: str) -> Any:
        return SimpleNamespace(close=lambda: None, iteration_s=lambda: 0.0)

    shelf = EngineShelf({"a": "a"}, load, turns=turns, prepare=prepare)

    def call() -> None:
        assert preparing.wait(30)
        with turns:
            called.set()

    with ThreadPoolExecutor(2) as threads:
        loading, calling = threads.submit(shelf.load, "a"), threads.submit(call)
        calling.result(60)
        loading.result(60)
    assert shelf.loaded == ("a",)
