"""Removes what nobody needs any more. Plain: the job records, the store and the clock are handed in.

    what                                     goes when
    a finished process's objects             its end is older than `results_ttl_s`
    its samples                              its end is older than `samples_ttl_s`
    files of Ray Train that its driver left  its end is older than `unfinished_ttl_s`
    a presigned upload that became no data   its newest file is older than `staging_ttl_s`
    a data set's files without a manifest    the newest is older than `unfinished_ttl_s`, and no manifest names them
    an adapter's file without a manifest     it is older than `unfinished_ttl_s`
    probes of the capability test            likewise
    pictures to start from, without a job    likewise
    a multipart upload                       it began longer ago than `multipart_ttl_s`
    the embedded server's temporary files    unchanged for `temporary_ttl_s`

Nothing of a job that is queued or runs is touched, nor of one that such a job names in its request, nor anything else
of a process without a record, nor any key of a layout that is not ours. A process's record is read once its objects are
listed, an adapter's manifest again before its file goes. The mirrored records stay, as the records themselves do: there
is one small object for each, which every change replaces.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from storage.async_jobs import AsyncJobsApi
from storage.counters import CLEANUP_FAILURES, SWEPT_BYTES, SWEPT_OBJECTS, Counters
from storage.datasets import referenced_keys
from storage.errors import JobError, JobNotFound, StorageError
from storage.job_state import JobState
from storage.keys import MANIFEST_NAME, Keys, Place, place_of
from storage.objects import ObjectInfo, ObjectStore, StoreMaintenance
from storage.settings import SweepSettings
from storage.sweep_report import SweepFailure, SweepKind, SweepReport, Swept

logger = logging.getLogger(__name__)

PAGE_KEYS = 1000
LIVE_STATES = tuple(state for state in JobState if not state.is_terminal)
JOB_IDS = re.compile(r"(?:train|gen)_[0-9a-f]{12}")
GROUP_KINDS = {
    "staging": SweepKind.STAGING,
    "datasets": SweepKind.UNFINISHED,
    "loras": SweepKind.UNFINISHED,
    "kept": SweepKind.KEPT,
    "probes": SweepKind.PROBES,
}
WITH_MANIFEST = frozenset({"datasets", "loras"})


class SweptStore(ObjectStore, StoreMaintenance, Protocol):
    """The store that is swept."""


class TemporaryFiles(Protocol):
    """Files that the server itself left. Blocking."""

    def sweep(self, older_than_s: float, *, dry_run: bool) -> tuple[int, int]:
        """How many went, and their bytes. Raises OSError."""
        ...


@dataclass
class _Group:
    """Objects that go together."""

    place: Place
    objects: list[ObjectInfo] = field(default_factory=list)

    @property
    def newest(self) -> datetime:
        times = [info.modified_at for info in self.objects if info.modified_at is not None]
        return max(times, default=datetime.max.replace(tzinfo=UTC))


@dataclass
class _Tour:
    """One sweep under way."""

    dry_run: bool
    now: datetime
    swept: list[Swept] = field(default_factory=list)
    failures: list[SweepFailure] = field(default_factory=list)
    kept_live: int = 0


class Sweeper:
    """`prefix` as in `S3Settings`. `temporary_files` only where the embedded server runs on this machine."""

    def __init__(
        self,
        store: SweptStore,
        jobs: AsyncJobsApi,
        prefix: str,
        settings: SweepSettings,
        *,
        counters: Counters,
        temporary_files: TemporaryFiles | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._prefix = prefix
        self._settings = settings
        self._counters = counters
        self._temporary_files = temporary_files
        self._clock = clock

    async def run(self, *, dry_run: bool = False) -> SweepReport:
        """One sweep. What fails is counted, logged and reported, and the rest goes on.

        Raises StorageError when the objects cannot be listed.
        """
        tour = _Tour(dry_run, self._clock())
        async for group in self._groups():
            try:
                await self._sweep_group(tour, group)
            except (StorageError, JobError) as error:
                self._failed(tour, group.place.kind, group.place.name, error.code)
        await self._sweep_multipart(tour)
        await self._sweep_temporary(tour)
        return SweepReport(dry_run, tuple(tour.swept), tuple(tour.failures), tour.kept_live)

    async def _groups(self) -> AsyncIterator[_Group]:
        """In key order, so that only one is held at a time."""
        group: _Group | None = None
        last: str | None = None
        while True:
            page = await self._store.list(f"{self._prefix}/", start_after=last, limit=PAGE_KEYS)
            for info in page:
                place = place_of(self._prefix, info.key)
                if group is not None and group.place != place:
                    yield group
                    group = None
                if place is not None:
                    group = group or _Group(place)
                    group.objects.append(info)
            if len(page) < PAGE_KEYS:
                break
            last = page[-1].key
        if group is not None:
            yield group

    async def _sweep_group(self, tour: _Tour, group: _Group) -> None:
        if group.place.kind == "processes":
            await self._sweep_process(tour, group)
            return
        kind = GROUP_KINDS[group.place.kind]
        ttls = {SweepKind.STAGING: self._settings.staging_ttl_s, SweepKind.KEPT: self._settings.kept_ttl_s}
        ttl_s = ttls.get(kind, self._settings.unfinished_ttl_s)
        await self._remove_older(tour, kind, group, ttl_s)

    async def _remove_older(self, tour: _Tour, kind: SweepKind, group: _Group, ttl_s: float | None) -> None:
        age = tour.now - group.newest
        if ttl_s is None or age < timedelta(seconds=ttl_s):
            return
        doomed = await self._unfinished(group) if group.place.kind in WITH_MANIFEST else group.objects
        await self._remove(tour, kind, group.place.name, doomed, age)

    async def _unfinished(self, group: _Group) -> list[ObjectInfo]:
        """The files of what has no manifest, but those that a later upload of their data set took over."""
        place, keys = group.place, Keys(self._prefix, group.place.tenant)
        if any(info.key.endswith(f"/{MANIFEST_NAME}") for info in group.objects):
            return []
        if place.kind == "loras" and await self._store.exists(keys.imported_lora_manifest(place.name)):
            return []
        named = await referenced_keys(self._store, keys, place.folder) if place.kind == "datasets" else frozenset()
        return [info for info in group.objects if info.key not in named]

    async def _sweep_process(self, tour: _Tour, group: _Group) -> None:
        place = group.place
        expiring = self._expiring(group)
        prefix = Keys(self._prefix, place.tenant).inputs_prefix(place.name)
        inputs = [info for info in group.objects if info.key.startswith(prefix)]
        if not expiring and not inputs:
            return
        try:
            record = await self._jobs.get(place.name, tenant=place.tenant)
        except JobNotFound:
            # Stored before the record is made, which then failed.
            await self._remove_older(tour, SweepKind.UNFINISHED, _Group(place, inputs), self._settings.unfinished_ttl_s)
            return
        if not record.state.is_terminal or record.finished_at is None:
            return
        age = tour.now - record.finished_at
        due = [(kind, doomed) for kind, ttl_s, doomed in expiring if age >= timedelta(seconds=ttl_s)]
        if due and place.name in await self._named_by_live_jobs(place.tenant):
            tour.kept_live += 1
            return
        for kind, doomed in due:
            await self._remove(tour, kind, place.name, doomed, age)
            if kind is SweepKind.RESULTS:
                return

    def _expiring(self, group: _Group) -> list[tuple[SweepKind, float, list[ObjectInfo]]]:
        """What of a process has a TTL: all of it first, then its parts."""
        settings, name, keys = self._settings, group.place.name, Keys(self._prefix, group.place.tenant)
        kinds = (
            (SweepKind.RESULTS, settings.results_ttl_s, keys.process_prefix(name)),
            (SweepKind.SAMPLES, settings.samples_ttl_s, keys.samples_prefix(name)),
            (SweepKind.RAY_TRAIN, settings.unfinished_ttl_s, keys.ray_train_prefix(name)),
        )
        return [
            (kind, ttl_s, doomed)
            for kind, ttl_s, prefix in kinds
            if ttl_s is not None and (doomed := [info for info in group.objects if info.key.startswith(prefix)])
        ]

    async def _named_by_live_jobs(self, tenant: str) -> set[str]:
        """Live jobs and every job that their requests speak of, such as the trainings of their LoRAs."""
        named: set[str] = set()
        cursor: str | None = None
        while True:
            page = await self._jobs.list(tenant, states=LIVE_STATES, limit=500, cursor=cursor)
            for record in page.records:
                named |= {record.id, *JOB_IDS.findall(json.dumps(record.request))}
            if page.next_cursor is None:
                return named
            cursor = page.next_cursor

    async def _remove(
        self, tour: _Tour, kind: SweepKind, resource: str, doomed: list[ObjectInfo], age: timedelta
    ) -> None:
        if not doomed:
            return
        if not tour.dry_run:
            await self._store.delete_many([info.key for info in doomed])
        size_bytes = sum(info.size_bytes for info in doomed)
        self._note(tour, Swept(kind, resource, len(doomed), size_bytes, age.total_seconds()))

    async def _sweep_multipart(self, tour: _Tour) -> None:
        ttl_s = self._settings.multipart_ttl_s
        if ttl_s is None:
            return
        try:
            if not (await self._store.capabilities()).multipart_listing:
                return
            pending = await self._store.list_uploads(f"{self._prefix}/")
        except StorageError as error:
            self._failed(tour, SweepKind.MULTIPART, "all", error.code)
            return
        for upload in pending:
            age = tour.now - upload.started_at
            if age < timedelta(seconds=ttl_s):
                continue
            try:
                if not tour.dry_run:
                    await self._store.abort_upload(upload.key, upload.upload_id)
            except StorageError as error:
                self._failed(tour, SweepKind.MULTIPART, upload.upload_id, error.code)
            else:
                self._note(tour, Swept(SweepKind.MULTIPART, upload.upload_id, 1, 0, age.total_seconds()))

    async def _sweep_temporary(self, tour: _Tour) -> None:
        ttl_s = self._settings.temporary_ttl_s
        if ttl_s is None or self._temporary_files is None:
            return
        try:
            files, size_bytes = await asyncio.to_thread(self._temporary_files.sweep, ttl_s, dry_run=tour.dry_run)
        except OSError as error:
            logger.warning("temporary files could not be swept: %s", type(error).__name__)
            self._failed(tour, SweepKind.TEMPORARY, "all", "os_error")
            return
        if files:
            self._note(tour, Swept(SweepKind.TEMPORARY, "embedded server", files, size_bytes, ttl_s))

    def _note(self, tour: _Tour, swept: Swept) -> None:
        tour.swept.append(swept)
        if not tour.dry_run:
            self._counters.add(SWEPT_OBJECTS, swept.objects, kind=swept.kind)
            self._counters.add(SWEPT_BYTES, swept.size_bytes, kind=swept.kind)
        verb = "would sweep" if tour.dry_run else "swept"
        numbers = (swept.objects, swept.size_bytes, swept.age_s)
        logger.info("%s %s of %s: %d objects, %d bytes, %.0f s old", verb, swept.kind, swept.resource, *numbers)

    def _failed(self, tour: _Tour, kind: str, resource: str, code: str) -> None:
        tour.failures.append(SweepFailure(kind, resource, code))
        self._counters.add(CLEANUP_FAILURES, resource=kind)
        logger.warning("could not sweep %s of %s (%s)", kind, resource, code)
