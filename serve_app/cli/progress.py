"""The live line of a training: step, loss, speed, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@contextmanager
def training_progress(console: Console, *, enabled: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that draws a process object's progress; on a pipe it prints a plain line now and then."""
    if not enabled:
        yield lambda _: None
        return
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[eta]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("queued", total=None, loss="-", speed="", eta="")

        def update(process: dict[str, Any]) -> None:
            metrics = process.get("metrics") or {}
            progress.update(
                task, description=_stage(process), total=process.get("total_steps"), completed=process.get("step") or 0,
                loss=_number(metrics.get("smoothed_loss", metrics.get("loss")), "{:.4f}"),
                speed=_number(metrics.get("steps_per_s"), "{:.2f} steps/s"), eta=_left(process.get("eta")),
            )  # fmt: skip

        yield update


def _plain(console: Console) -> Callable[[dict[str, Any]], None]:
    shown: list[str] = [""]

    def update(process: dict[str, Any]) -> None:
        step, total = process.get("step"), process.get("total_steps")
        mark = f"{_stage(process)} {int(step / total * 10) if step and total else ''}"
        if mark == shown[0]:
            return
        shown[0] = mark
        metrics = process.get("metrics") or {}
        loss = _number(metrics.get("smoothed_loss", metrics.get("loss")), "loss {:.4f}")
        speed = _number(metrics.get("steps_per_s"), "{:.2f} steps/s")
        console.print(f"{_stage(process)} {step or 0}/{total or '?'} {loss} {speed} {_left(process.get('eta'))}")

    return update


def _stage(process: dict[str, Any]) -> str:
    metrics = process.get("metrics") or {}
    return str(metrics.get("stage") or process.get("status") or "queued")


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else "-"


def _left(eta_s: Any) -> str:
    if not isinstance(eta_s, int | float):
        return ""
    minutes, seconds = divmod(int(eta_s), 60)
    return f"{minutes}:{seconds:02d} left"
