"""Trainings as a Ray worker runs them, in this process."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from storage.keys import Keys
from storage.testing import InMemoryStore
from train_jobs.board import StopReason
from train_jobs.progress import Progress

JOB = "train_0123456789ab"
KEYS = Keys("raylora", "default")
NOW = datetime(2026, 11, 21, tzinfo=UTC)


class Told:
    """A reporter that remembers, and asks to stop at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.steps: list[int] = []
        self.stop_reason: StopReason | None = None
        self._stop_at = stop_at

    def stage(self, name: str, **details: Any) -> None:
        self.stages.append(name)
        if self._stop_at == 0:
            self.stop_reason = "cancelled"

    def waiting(self, is_waiting: bool) -> None:
        self.stages.append("waiting" if is_waiting else "going on")

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress.step)
        if progress.step + 1 == self._stop_at:
            self.stop_reason = "cancelled"


def get(store: InMemoryStore, key: str) -> bytes:
    return asyncio.run(store.get(key))


def keys(store: InMemoryStore, part: str) -> list[str]:
    return [key for key in list(store.keys()) if part in key]
