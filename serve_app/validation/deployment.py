"""The Serve shell of validation: CPU replicas, so that no request's bytes hold up the ingress loop."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from serve_app.collaborators import GenerationPlan, TrainingPlan
from serve_app.settings import Settings
from serve_app.validation.uploads import DatasetUploads
from serve_app.validation.validator import Validator
from storage.actor import StorageClient
from storage.keys import Keys


class Validation:
    """Implements `serve_app.collaborators.Validation`."""

    def __init__(self, settings: Settings) -> None:
        s3 = settings.s3()
        self._validator = Validator(settings.models, settings.default_model)
        self._uploads = DatasetUploads(
            StorageClient(s3, settings.breaker()),
            lambda tenant: Keys(s3.prefix, tenant),
            s3.bucket,
            lambda: datetime.now(UTC),
        )

    async def training(self, config: str | dict[str, Any]) -> TrainingPlan:
        return await asyncio.to_thread(self._validator.training, config)

    async def training_check(self, config: str | dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._validator.training_check, config)

    async def generation(self, payload: dict[str, Any]) -> GenerationPlan:
        return await asyncio.to_thread(self._validator.generation, payload)

    async def store_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        return await self._uploads.store(tenant, payload)
