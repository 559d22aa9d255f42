"""`upload_training_data`: a dataset, sent inside the request."""

from __future__ import annotations

from typing import Any

from serve_app.job_types.context import Finished, JobContext, Services


async def upload_training_data(services: Services, context: JobContext, payload: dict[str, Any]) -> Finished:
    """Raises InvalidRequest, StorageError; the dataset is then as before."""
    return Finished(await services.validation.store_upload(context.tenant, payload))
