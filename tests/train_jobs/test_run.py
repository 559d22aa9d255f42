"""What the driver's program does beside driving."""

from __future__ import annotations

import subprocess
import sys

import pytest

from storage.counters import CLEANUP_FAILURES, Tally
from storage.errors import StorageUnavailable
from storage.jobs_config import JobsConfig
from storage.keys import Keys
from storage.settings import RecordsSettings, S3Settings
from storage.testing import InMemoryStore
from train_jobs.run import remove_train_files, scaling_for
from train_jobs.spec import WorkersSpec

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


@pytest.mark.parametrize(
    ("workers", "expected"),
    [(None, 3), (WorkersSpec(min=2, max=2), 2), (WorkersSpec(min=1, max=4), (1, 4))],
)
def test_a_training_has_the_workers_it_asks_for_else_those_of_the_instance(
    workers: WorkersSpec | None, expected: int | tuple[int, int]
) -> None:
    config = JobsConfig(records=RecordsSettings(url="sqlite:///x"), s3=S3Settings(), training_workers=3)
    scaling = scaling_for(config, {"CPU": 8, "GPU": 2}, workers)
    assert (scaling.num_workers, scaling.use_gpu) == (expected, True)
    assert scaling.elasticity_enabled == isinstance(expected, tuple)


def test_the_driver_does_not_import_what_only_workers_need() -> None:
    # Ray Train's controller imports the same module to find the workers' function.
    heavy = {"diffusers", "transformers", "peft", "diffusion.families"}
    code = f"import sys, train_jobs.run; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
