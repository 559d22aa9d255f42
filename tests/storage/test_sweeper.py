from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from storage.async_jobs import AsyncJobs
from storage.counters import CLEANUP_FAILURES, SWEPT_BYTES, SWEPT_OBJECTS, Tally
from storage.datasets import latest_manifest, write_dataset
from storage.embedded import TemporaryFiles
from storage.errors import StorageFailed
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.keys import Keys
from storage.objects import PendingUpload
from storage.settings import DAY_S, SweepSettings
from storage.sweep_report import SweepKind, SweepReport
from storage.sweeper import Sweeper
from storage.testing import InMemoryStore

KEYS = Keys("raylora", "default")
HOUR_S = 3600.0


class World:
    """Jobs and objects that share a clock."""

    def __init__(self, folder: Path) -> None:
        self.jobs = JobsWorld(folder)
        self.clock = self.jobs.clock
        self.store = InMemoryStore(now=self.clock)
        self.tally = Tally()

    async def finished(self, kind: JobKind = JobKind.TRAINING) -> str:
        """A completed process with a LoRA and a sample."""
        record = self.jobs.running("w", kind)
        self.jobs.jobs.complete(record.id, "w", {})
        await self.objects_of(record.id)
        return record.id

    async def objects_of(self, process_id: str) -> None:
        await self.store.put(KEYS.lora_file(process_id, "a.safetensors"), b"12345")
        await self.store.put(KEYS.sample_image(process_id, 0, 0, "png"), b"123")

    async def sweep(self, *, dry_run: bool = False, temporary: Path | None = None, **settings: Any) -> SweepReport:
        sweeper = Sweeper(
            self.store,
            AsyncJobs(self.jobs.jobs),
            "raylora",
            SweepSettings(**settings),
            counters=self.tally,
            temporary_files=None if temporary is None else TemporaryFiles(temporary),
            clock=self.clock,
        )
        return await sweeper.run(dry_run=dry_run)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.jobs.close()


def kinds(report: SweepReport) -> list[SweepKind]:
    return [swept.kind for swept in report.swept]


async def test_by_default_results_and_samples_stay_for_ever(world: World) -> None:
    await world.finished()
    world.clock.advance(1000 * DAY_S)

    assert (await world.sweep()).swept == ()
    assert len(world.store.keys()) == 2


async def test_a_finished_process_goes_when_its_end_is_old_enough_and_is_counted(world: World) -> None:
    process_id = await world.finished()
    world.clock.advance(DAY_S - 1)
    assert (await world.sweep(results_ttl_s=DAY_S)).swept == ()
    world.clock.advance(1)

    report = await world.sweep(results_ttl_s=DAY_S)

    [swept] = report.swept
    assert (swept.kind, swept.resource, swept.objects, swept.size_bytes) == (SweepKind.RESULTS, process_id, 2, 8)
    assert swept.age_s == DAY_S
    assert world.store.keys() == []
    assert world.tally.counts()[SWEPT_OBJECTS] == {"results": 2}
    assert world.tally.counts()[SWEPT_BYTES] == {"results": 8}


async def test_samples_may_go_before_the_rest(world: World) -> None:
    process_id = await world.finished()
    world.clock.advance(DAY_S)

    assert kinds(await world.sweep(samples_ttl_s=HOUR_S, results_ttl_s=30 * DAY_S)) == [SweepKind.SAMPLES]

    assert world.store.keys() == [KEYS.lora_file(process_id, "a.safetensors")]


async def test_files_of_ray_train_that_a_killed_driver_left_go_and_nothing_else_of_it(world: World) -> None:
    process_id = await world.finished()
    kept = list(world.store.keys())
    await world.store.put(f"{KEYS.ray_train_prefix(process_id)}run/.marker", b"")
    world.clock.advance(DAY_S)

    assert kinds(await world.sweep()) == [SweepKind.RAY_TRAIN]

    assert world.store.keys() == kept


@pytest.mark.parametrize("state", [s for s in JobState if not s.is_terminal])
async def test_nothing_of_a_live_job_is_touched(world: World, state: JobState) -> None:
    make = {
        JobState.QUEUED: lambda: world.jobs.create(JobKind.TRAINING),
        JobState.STARTING: lambda: world.jobs.claimed("w", JobKind.TRAINING),
        JobState.RUNNING: lambda: world.jobs.running("w", JobKind.TRAINING),
    }
    record = make[state]()
    assert record.state is state
    await world.objects_of(record.id)
    world.clock.advance(1000 * DAY_S)

    assert (await world.sweep(results_ttl_s=1, samples_ttl_s=1)).swept == ()
    assert len(world.store.keys()) == 2


async def test_a_failed_job_that_a_user_has_retried_is_live_again(world: World) -> None:
    record = world.jobs.running("w", JobKind.TRAINING)
    world.jobs.jobs.fail(record.id, "w", "x", "x")
    await world.objects_of(record.id)
    world.clock.advance(DAY_S)
    world.jobs.jobs.retry(record.id, tenant=None)

    assert (await world.sweep(results_ttl_s=1)).swept == ()


async def test_a_training_whose_lora_a_waiting_generation_names_is_kept_until_that_has_ended(world: World) -> None:
    process_id = await world.finished()
    world.jobs.create(request={"spec": {"loras": [{"id": process_id, "scale": 1.0}]}})
    world.clock.advance(DAY_S)

    report = await world.sweep(results_ttl_s=1)
    assert (report.swept, report.kept_live) == ((), 1)

    world.jobs.jobs.purge_queue("default")
    assert kinds(await world.sweep(results_ttl_s=1)) == [SweepKind.RESULTS]


async def test_a_process_without_a_record_and_other_layouts_are_left_alone(world: World) -> None:
    await world.objects_of("train_0123456789ab")
    for key in ("raylora/results/me/lora/a", "raylora/dataset/f/a.png", "raylora/processes/train_0123456789ab.json"):
        await world.store.put(key, b"1")
    world.clock.advance(1000 * DAY_S)

    assert (await world.sweep(results_ttl_s=1, samples_ttl_s=1)).swept == ()
    assert len(world.store.keys()) == 5


async def test_pictures_to_start_from_go_where_no_record_was_made(world: World) -> None:
    made = world.jobs.create(JobKind.GENERATION).id
    for process_id in ("gen_0123456789ab", made):
        await world.store.put(KEYS.input_picture(process_id, "mask", "0" * 64, "png"), b"1")
    assert (await world.sweep()).swept == ()
    world.clock.advance(DAY_S)
    assert kinds(await world.sweep()) == [SweepKind.UNFINISHED]
    [left] = world.store.keys()
    assert made in left


async def test_what_trainings_share_goes_by_its_own_age_and_each_object_by_itself(world: World) -> None:
    old, young = KEYS.kept("latents", "a" * 64), KEYS.kept("latents", "b" * 64)
    await world.store.put(old, b"1")
    world.clock.advance(20 * DAY_S)
    await world.store.put(young, b"2")
    world.clock.advance(11 * DAY_S)
    assert kinds(await world.sweep()) == [SweepKind.KEPT]
    assert not await world.store.exists(old)
    assert await world.store.exists(young)


async def test_a_file_of_an_adapter_without_a_manifest_goes_a_day_later_and_a_whole_adapter_stays(world: World) -> None:
    whole, half = "lora_0123456789ab", "lora_0123456789ac"
    for lora_id in (whole, half):
        await world.store.put(KEYS.imported_lora_file(lora_id, "a.safetensors"), b"12345")
    await world.store.put(KEYS.imported_lora_manifest(whole), b"{}")
    world.clock.advance(DAY_S - 1)
    assert (await world.sweep()).swept == ()
    world.clock.advance(1)

    [swept] = (await world.sweep()).swept

    assert (swept.kind, swept.resource, swept.objects, swept.size_bytes) == (SweepKind.UNFINISHED, half, 1, 5)
    world.clock.advance(1000 * DAY_S)
    assert (await world.sweep()).swept == ()
    assert len(world.store.keys()) == 2


async def test_an_adapter_that_becomes_whole_while_it_is_swept_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.store.put(KEYS.imported_lora_file("lora_0123456789ab", "a.safetensors"), b"12345")
    world.clock.advance(DAY_S)
    listed = world.store.list

    async def list_then_finish(*arguments: Any, **keywords: Any) -> Any:
        found = await listed(*arguments, **keywords)
        await world.store.put(KEYS.imported_lora_manifest("lora_0123456789ab"), b"{}")
        return found

    monkeypatch.setattr(world.store, "list", list_then_finish)

    assert (await world.sweep()).swept == ()


async def test_an_unused_upload_goes_a_day_after_its_newest_file(world: World) -> None:
    await world.store.put(KEYS.staging_file("u1", "a.zip"), b"1")
    world.clock.advance(DAY_S - 1)
    await world.store.put(KEYS.staging_file("u1", "b.zip"), b"1")
    world.clock.advance(1)
    assert (await world.sweep()).swept == ()
    world.clock.advance(DAY_S)

    report = await world.sweep()

    assert kinds(report) == [SweepKind.STAGING]
    assert report.totals()["staging"] == {"groups": 1, "objects": 2, "size_bytes": 2}


async def test_files_of_an_upload_that_never_ended_go_and_those_that_a_manifest_names_stay(world: World) -> None:
    files = [("a.png", b"a", None), ("b.png", b"b", None)]
    first = await write_dataset(world.store, KEYS, "cats", files, now=world.clock(), upload_id="u1")
    await write_dataset(
        world.store, KEYS, "cats", [("b.png", b"c", None)], now=world.clock(), upload_id="u2", base=first
    )
    # Without its manifest, of the first upload only the file is needed that the second one took over.
    await world.store.delete(KEYS.dataset_manifest("cats", "u1"))
    await world.store.put(KEYS.dataset_file("cats", "u3", "half.png"), b"1")
    world.clock.advance(DAY_S)

    report = await world.sweep()

    assert sorted(swept.resource for swept in report.swept) == ["u1", "u3"]
    manifest = await latest_manifest(world.store, KEYS, "cats")
    assert all([await world.store.exists(file.key) for file in manifest.files])
    assert len(world.store.keys()) == 3


async def test_an_unreadable_manifest_keeps_everything_of_its_data_set(world: World) -> None:
    await world.store.put(KEYS.dataset_manifest("cats", "u1"), b"not a manifest")
    await world.store.put(KEYS.dataset_file("cats", "u2", "half.png"), b"1")
    world.clock.advance(DAY_S)

    report = await world.sweep()

    assert (report.swept, [failure.code for failure in report.failures]) == ((), ["dataset_manifest_invalid"])


async def test_orphan_multipart_uploads_are_aborted_and_younger_ones_kept(world: World) -> None:
    old = PendingUpload("raylora/default/processes/x/lora/a", "1", world.clock())
    world.clock.advance(DAY_S)
    young = PendingUpload("raylora/default/processes/x/lora/a", "2", world.clock() - timedelta(hours=1))
    world.store.uploads = [old, young]

    assert kinds(await world.sweep()) == [SweepKind.MULTIPART]

    assert world.store.uploads == [young]


async def test_temporary_files_of_the_server_go_when_nobody_writes_them_any_more(world: World, tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".rclone_temp_put_a", ".rclone_temp_put_b", "object"))
    for path in (old, young, other):
        path.write_bytes(b"1234")
    for path in (old, other):
        os.utime(path, (0, 0))

    report = await world.sweep(temporary=tmp_path)

    assert report.totals() == {"temporary": {"groups": 1, "objects": 1, "size_bytes": 4}}
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


async def test_a_dry_run_says_the_same_and_removes_nothing(world: World, tmp_path: Path) -> None:
    await world.finished()
    await world.store.put(KEYS.staging_file("u1", "a.zip"), b"1")
    world.store.uploads = [PendingUpload("raylora/default/a", "1", world.clock())]
    (tmp_path / ".rclone_temp_put_a").write_bytes(b"1")
    os.utime(tmp_path / ".rclone_temp_put_a", (0, 0))
    world.clock.advance(DAY_S)
    before = world.store.keys()

    dry = await world.sweep(dry_run=True, temporary=tmp_path, results_ttl_s=1)

    assert (world.store.keys(), len(world.store.uploads), world.tally.counts()) == (before, 1, {})
    assert (tmp_path / ".rclone_temp_put_a").exists()
    real = await world.sweep(temporary=tmp_path, results_ttl_s=1)
    assert real.swept == dry.swept
    assert world.store.keys() == []


async def test_what_cannot_be_removed_is_counted_and_reported_and_the_rest_goes_on(world: World) -> None:
    await world.store.put(KEYS.staging_file("u1", "a.zip"), b"1")
    await world.store.put(KEYS.staging_file("u2", "a.zip"), b"1")
    world.store.uploads = [PendingUpload("raylora/default/a", "1", world.clock())]
    world.clock.advance(DAY_S)
    world.store.fail("delete_many", StorageFailed("delete_many", 4, "server_error"))
    world.store.fail("abort_upload", StorageFailed("abort_upload", 4, "server_error"))

    report = await world.sweep()

    assert [(failure.kind, failure.resource, failure.code) for failure in report.failures] == [
        ("staging", "u1", "storage_failed"),
        ("multipart", "1", "storage_failed"),
    ]
    assert [swept.resource for swept in report.swept] == ["u2"]
    assert world.tally.counts()[CLEANUP_FAILURES] == {"staging": 1, "multipart": 1}


async def test_more_than_a_page_of_objects_is_swept_group_by_group(world: World) -> None:
    for upload in range(3):
        for number in range(700):
            await world.store.put(KEYS.staging_file(f"u{upload}", f"{number:04d}"), b"1")
    world.clock.advance(DAY_S)

    report = await world.sweep()

    assert [(swept.resource, swept.objects) for swept in report.swept] == [("u0", 700), ("u1", 700), ("u2", 700)]
    assert world.store.keys() == []


async def test_the_log_names_what_went_and_why_but_no_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "storage.sweeper")
    process_id = await world.finished()
    await world.store.put(KEYS.staging_file("u1", "private-name.zip"), b"1")
    world.clock.advance(DAY_S)

    await world.sweep(results_ttl_s=1)

    assert f"swept results of {process_id}: 2 objects, 8 bytes, 86400 s old" in caplog.text
    assert "private-name" not in caplog.text
