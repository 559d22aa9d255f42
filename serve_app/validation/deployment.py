"""The Serve shell of validation: CPU replicas, so that no request's bytes hold up the ingress loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from serve_app.collaborators import GenerationPlan, TrainingPlan
from serve_app.outbound import Outbound
from serve_app.settings import Settings
from serve_app.validation.bundles import Bundles
from serve_app.validation.generations import Generations
from serve_app.validation.lora_imports import LoraImports
from serve_app.validation.sources import FETCH_TIMEOUT_S
from serve_app.validation.staged import StagedUploads
from serve_app.validation.start_pictures import StartPictures
from serve_app.validation.uploads import DatasetUploads
from serve_app.validation.validator import Validator
from storage.actor import StorageClient
from storage.imported_loras import ImportedLora
from storage.keys import Keys


class Validation:
    """Implements `serve_app.collaborators.Validation`."""

    def __init__(self, settings: Settings) -> None:
        s3 = settings.s3()
        self._validator = Validator(settings.models, settings.default_model)
        store = StorageClient(s3, settings.breaker())
        self._loras = LoraImports(store, _keys_of(s3.prefix))
        outbound = Outbound(any_address=settings.webhooks.any_address, timeout_s=FETCH_TIMEOUT_S)
        pictures = StartPictures(store, _keys_of(s3.prefix), s3.bucket, outbound)
        self._generations = Generations(self._validator, pictures)
        self._uploads = DatasetUploads(store, _keys_of(s3.prefix), s3.bucket, _now, outbound)
        self._bundles = Bundles(store, _keys_of(s3.prefix), _now)
        self._staged = StagedUploads(
            store,
            _keys_of(s3.prefix),
            s3.bucket,
            _now,
            self._uploads,
            url_expires_s=settings.limits.url_expires_s,
        )

    async def training(self, config: str | dict[str, Any]) -> TrainingPlan:
        return await asyncio.to_thread(self._validator.training, config)

    async def training_check(self, config: str | dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._validator.training_check, config)

    async def training_spec(self, spec: dict[str, Any]) -> TrainingPlan:
        return await asyncio.to_thread(self._validator.training_spec, spec)

    async def finish_lora_import(self, tenant: str, lora_id: str) -> ImportedLora:
        return await self._loras.finish(tenant, lora_id)

    async def generation(self, tenant: str, process_id: str, payload: dict[str, Any]) -> GenerationPlan:
        return await self._generations.plan(tenant, process_id, payload)

    async def store_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        return await self._uploads.store(tenant, payload)

    async def create_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        return await self._staged.create(tenant, payload)

    async def finalize_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        return await self._staged.finalize(tenant, payload)

    async def bundle(self, tenant: str, files: list[dict[str, Any]]) -> dict[str, Any] | None:
        return await self._bundles.make(tenant, files)


def _now() -> datetime:
    return datetime.now(UTC)


def _keys_of(prefix: str) -> Callable[[str], Keys]:
    return lambda tenant: Keys(prefix, tenant)
