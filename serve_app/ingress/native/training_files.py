"""`/v1/trainings/{id}/...`: what a training has stored so far, whatever its state."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request

from serve_app.ingress.native.calls import record_of
from serve_app.ingress.native.views import (
    Checkpoint,
    Files,
    LossHistory,
    LossPoint,
    Sample,
    StoredFile,
    progress_of,
)
from serve_app.job_types.context import Services
from serve_app.job_types.continuing import whole_checkpoints
from serve_app.job_types.process_object import count_of
from storage.errors import ObjectNotFound
from storage.job_record import JobRecord
from storage.job_state import JobKind
from storage.objects import ObjectInfo

LOSS_LOG = "loss.json"
_SAMPLE = re.compile(r"(\d+)_(\d+)\.[A-Za-z0-9]+")


def training_files_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/trainings/{training_id}", tags=["trainings"])

    @router.get("/checkpoints")
    async def list_checkpoints(request: Request, training_id: str) -> Files[Checkpoint]:
        """The whole checkpoints that are kept, by step."""
        record = await record_of(services, request, training_id, JobKind.TRAINING)
        whole = await whole_checkpoints(services.store, services.keys_of(record.tenant), record.id)
        best = _best_step(record)
        items = [await _checkpoint(services, step, found, is_best=step == best) for step, found in whole.items()]
        return Files(items=items)

    @router.get("/samples")
    async def list_samples(request: Request, training_id: str) -> Files[Sample]:
        """The preview pictures made so far, by step."""
        record = await record_of(services, request, training_id, JobKind.TRAINING)
        prefix = services.keys_of(record.tenant).samples_prefix(record.id)
        items = []
        for info in await services.store.list(prefix):
            named = _SAMPLE.fullmatch(info.key.removeprefix(prefix))
            if named is not None:
                file = await _file(services, info)
                items.append(Sample(**file.model_dump(), step=int(named[1]), index=int(named[2])))
        return Files(items=sorted(items, key=lambda sample: (sample.step, sample.index)))

    @router.get("/logs")
    async def list_logs(request: Request, training_id: str) -> Files[StoredFile]:
        """The log files that were stored."""
        record = await record_of(services, request, training_id, JobKind.TRAINING)
        prefix = f"{services.keys_of(record.tenant).process_prefix(record.id)}logs/"
        return Files(items=[await _file(services, info) for info in await services.store.list(prefix)])

    @router.get("/loss")
    async def get_loss(request: Request, training_id: str) -> LossHistory:
        """The loss of each logged step: of a training under way up to its last checkpoint, and its latest."""
        record = await record_of(services, request, training_id, JobKind.TRAINING)
        try:
            stored = await services.store.get(services.keys_of(record.tenant).training_log(record.id, LOSS_LOG))
        except ObjectNotFound:
            return LossHistory(complete=False, points=_latest_point(record))
        points = _points(stored)
        if record.state.is_terminal:
            return LossHistory(complete=True, points=points)
        last = points[-1].step if points else 0
        return LossHistory(complete=False, points=points + [p for p in _latest_point(record) if p.step > last])

    return router


def _best_step(record: JobRecord) -> int | None:
    """As the training said at its end, else as it says."""
    return count_of((record.output or {}).get("best_step", record.progress.get("best_step")))


async def _checkpoint(
    services: Services, step: int, found: list[tuple[str, ObjectInfo]], *, is_best: bool
) -> Checkpoint:
    times: list[datetime] = [info.modified_at for _, info in found if info.modified_at is not None]
    return Checkpoint(
        step=step,
        is_best=is_best,
        size_bytes=sum(info.size_bytes for _, info in found),
        created_at=max(times, default=None),
        files=[await _file(services, info) for _, info in found],
    )


async def _file(services: Services, info: ObjectInfo) -> StoredFile:
    filename = info.key.rsplit("/", 1)[-1]
    url = await services.store.presign_get(info.key, expires_s=services.limits.url_expires_s, filename=filename)
    return StoredFile(filename=filename, url=url, size_bytes=info.size_bytes, content_type=info.content_type)


def _points(stored: bytes) -> list[LossPoint]:
    """`[[step, loss], ...]`, as the training wrote it; a loss that was not finite is null."""
    pairs: list[Any] = json.loads(stored, parse_constant=lambda _: None)
    return [LossPoint(step=int(step), loss=loss) for step, loss in pairs]


def _latest_point(record: JobRecord) -> list[LossPoint]:
    latest = progress_of(record)
    return [] if latest.step is None or latest.loss is None else [LossPoint(step=latest.step, loss=latest.loss)]
