"""`/v1/uploads`: training data PUT straight to the object storage, and checked before the data set exists."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute

from serve_app.ingress.native.bodies import UploadCreate, reads, takes
from serve_app.ingress.native.calls import tenant_of
from serve_app.ingress.native.datasets import dataset_view
from serve_app.ingress.native.once import Renew
from serve_app.ingress.native.views import DatasetStored, UploadPlace, UploadStarted
from serve_app.job_types.context import Services
from serve_app.links import signed
from storage.datasets import latest_manifest


def uploads_router(services: Services, route_class: type[APIRoute]) -> APIRouter:
    router = APIRouter(prefix="/v1/uploads", tags=["datasets"], route_class=route_class)

    @router.post("", status_code=201, openapi_extra=takes(UploadCreate))
    async def create_upload(
        request: Request, asked: Annotated[UploadCreate, Depends(reads(UploadCreate))]
    ) -> UploadStarted:
        """Begin an upload: the reply says where each file goes. POST /v1/uploads/{id}/finish then makes the data set.

        A zip may hold pictures, captions `x.txt` and masks, as `x_mask.png` or as `masks/x.png`. What else is in it is
        left out and named in the warnings of the finished upload.
        """
        made = await services.validation.create_upload(tenant_of(request), asked.payload())
        started = await signed(services.store, made, expires_s=services.limits.url_expires_s)
        return UploadStarted(
            id=started["upload_id"],
            expires_at=datetime.fromisoformat(started["expires_at"]),
            files=[UploadPlace(**place) for place in started["files"]],
        )

    @router.post("/{upload_id}/finish", status_code=201)
    async def finish_upload(request: Request, upload_id: str) -> DatasetStored:
        """Check what arrived and make it a data set. Asked again, it answers the same."""
        tenant = tenant_of(request)
        stored = await services.validation.finalize_upload(tenant, {"token": upload_id})
        keys = services.keys_of(tenant)
        manifest = await latest_manifest(services.store, keys, stored["dataset_folder"], upload_id=stored["upload_id"])
        return DatasetStored(dataset=dataset_view(manifest), warnings=[str(note) for note in stored["warnings"]])

    return router


def renewed_upload(services: Services) -> Renew:
    async def renew(tenant: str, kept: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        keys, expires_s = services.keys_of(tenant), services.limits.url_expires_s
        started = UploadStarted.model_validate(kept)
        places = [
            place.model_copy(
                update={
                    "url": await services.store.presign_put(
                        keys.staging_file(started.id, place.filename),
                        expires_s=expires_s,
                        content_type=place.headers["Content-Type"],
                    )
                }
            )
            for place in started.files
        ]
        expires_at = services.clock() + timedelta(seconds=expires_s)
        return UploadStarted(id=started.id, expires_at=expires_at, files=places).model_dump(mode="json")

    return renew
