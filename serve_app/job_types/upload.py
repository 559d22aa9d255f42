"""`upload_training_data`: a dataset, sent inside the request. `create_upload`, `finalize_upload`: sent beside it."""

from __future__ import annotations

from typing import Any

from serve_app.job_types.context import Finished, JobContext, Services


async def upload_training_data(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises InvalidRequest, StorageError; the dataset is then as before."""
    return Finished(await services.validation.store_upload(context.tenant, payload))


async def create_upload(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises InvalidRequest, StorageError."""
    return Finished(await services.validation.create_upload(context.tenant, payload))


async def finalize_upload(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises UploadNotFound, InvalidRequest, StorageError; the dataset is then as before."""
    return Finished(await services.validation.finalize_upload(context.tenant, payload))
