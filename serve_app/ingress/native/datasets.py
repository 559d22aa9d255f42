"""`/v1/datasets`: training data sent inside a request, by name; the newest finished upload is the data set."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute

from serve_app.errors import DatasetInUse
from serve_app.ingress.native.bodies import DATASET_NAME, DatasetCreate, reads, takes
from serve_app.ingress.native.calls import checked_name, tenant_of
from serve_app.ingress.native.views import Dataset, DatasetFile, DatasetName, DatasetStored, Files
from serve_app.job_types.context import Services
from storage.datasets import DatasetManifest, dataset_folders, latest_manifest
from storage.job_state import TERMINAL_STATES, JobKind, JobState
from storage.keys import MANIFEST_NAME
from train_jobs.spec import TrainSpec
from train_jobs.spec_datasets import dataset_names

PAGE_RECORDS = 200
ACTIVE = tuple(state for state in JobState if state not in TERMINAL_STATES)


def datasets_router(services: Services, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1/datasets", tags=["datasets"], route_class=route_class)

    @router.post("", status_code=201, openapi_extra=takes(DatasetCreate))
    async def create_dataset(
        request: Request, asked: Annotated[DatasetCreate, Depends(reads(DatasetCreate))]
    ) -> DatasetStored:
        """Store a data set. Every file is checked; one that is wrong is named, and nothing is stored then."""
        tenant = tenant_of(request)
        stored = await services.validation.store_upload(tenant, asked.payload())
        manifest = await latest_manifest(services.store, services.keys_of(tenant), asked.name)
        warnings = [str(note) for note in stored.get("warnings", [])]
        return DatasetStored(dataset=dataset_view(manifest), warnings=warnings)

    @router.get("")
    async def list_datasets(request: Request) -> Files[DatasetName]:
        """Every data set that has a finished upload, by name."""
        names = await dataset_folders(services.store, services.keys_of(tenant_of(request)))
        return Files(items=[DatasetName(name=name) for name in names])

    @router.get("/{name}")
    async def get_dataset(request: Request, name: str) -> Dataset:
        """The newest finished upload and its files."""
        keys = services.keys_of(tenant_of(request))
        return dataset_view(await latest_manifest(services.store, keys, checked_name(name, DATASET_NAME)))

    @router.delete("/{name}", status_code=204)
    async def delete_dataset(request: Request, name: str) -> None:
        """Delete a data set with all its uploads. Refused while a training that reads it has not ended."""
        tenant = tenant_of(request)
        keys = services.keys_of(tenant)
        await latest_manifest(services.store, keys, checked_name(name, DATASET_NAME))
        await _refuse_in_use(services, tenant, name)
        prefix = keys.dataset_manifests_prefix(name)
        found = [info.key for info in await services.store.list(prefix)]
        # Manifests first: a reader sees a whole upload or none.
        await services.store.delete_many(sorted(found, key=lambda key: not key.endswith(f"/{MANIFEST_NAME}")))

    return router


async def _refuse_in_use(services: Services, tenant: str, name: str) -> None:
    cursor: str | None = None
    while True:
        page = await services.jobs.list(tenant, kind=JobKind.TRAINING, states=ACTIVE, limit=PAGE_RECORDS, cursor=cursor)
        for record in page.records:
            if name in dataset_names(TrainSpec.model_validate(record.request)):
                raise DatasetInUse(name)
        cursor = page.next_cursor
        if cursor is None:
            return


def dataset_view(manifest: DatasetManifest) -> Dataset:
    return Dataset(
        name=manifest.folder,
        upload_id=manifest.upload_id,
        trigger_word=manifest.trigger_word,
        created_at=manifest.created_at,
        size_bytes=manifest.size_bytes,
        files=[
            DatasetFile(
                filename=file.filename,
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                content_type=file.content_type,
            )
            for file in manifest.files
        ],
    )
