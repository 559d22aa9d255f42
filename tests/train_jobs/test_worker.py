from __future__ import annotations

import os
from pathlib import Path

from storage.counters import CLEANUP_FAILURES
from storage.ray_counters import of_this_process
from train_jobs.worker import _remove, threads_of_worker


def test_scratch_that_cannot_be_removed_is_counted(tmp_path: Path) -> None:
    before = of_this_process().counts().get(CLEANUP_FAILURES, {}).get("training_scratch", 0)
    _remove(tmp_path / "missing")
    assert of_this_process().counts()[CLEANUP_FAILURES]["training_scratch"] == before + 1
    (tmp_path / "folder").mkdir()
    _remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_the_workers_of_a_node_share_out_its_cpus_and_each_has_a_thread() -> None:
    cpus = len(os.sched_getaffinity(0))
    assert [threads_of_worker(workers) for workers in (1, cpus, 10 * cpus)] == [cpus, 1, 1]
