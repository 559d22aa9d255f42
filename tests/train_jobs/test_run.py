"""What the driver's program does beside driving."""

from __future__ import annotations

import pytest

from storage.counters import CLEANUP_FAILURES, Tally
from storage.errors import StorageUnavailable
from storage.keys import Keys
from storage.testing import InMemoryStore
from train_jobs.run import remove_train_files

KEYS = Keys("raylora", "default")
PROCESS = "train_0123456789ab"


async def _store() -> InMemoryStore:
    store = InMemoryStore()
    await store.put(f"{KEYS.ray_train_prefix(PROCESS)}{PROCESS}-1/.marker", b"")
    await store.put(f"{KEYS.ray_train_prefix(PROCESS)}{PROCESS}-2/.marker", b"")
    await store.put(KEYS.checkpoint_file(PROCESS, 1, "state.json"), b"{}")
    return store


async def test_after_a_run_nothing_of_ray_train_is_left_and_everything_of_the_training() -> None:
    store, tally = await _store(), Tally()

    await remove_train_files(store, KEYS.ray_train_prefix(PROCESS), tally)

    assert store.keys() == [KEYS.checkpoint_file(PROCESS, 1, "state.json")]
    assert tally.total(CLEANUP_FAILURES) == 0


@pytest.mark.parametrize("operation", ["list", "delete_many"])
async def test_files_that_cannot_be_removed_are_counted_and_fail_no_training(operation: str) -> None:
    store, tally = await _store(), Tally()
    store.fail(operation, StorageUnavailable(operation, 60))

    await remove_train_files(store, KEYS.ray_train_prefix(PROCESS), tally)

    assert tally.counts()[CLEANUP_FAILURES] == {"ray_train_files": 1}
