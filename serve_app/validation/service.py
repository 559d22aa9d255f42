"""Validation's work, without Ray: what each kind of request must hold, and where its bytes go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve_app.collaborators import Clock, GenerationPlan, TrainingPlan
from serve_app.outbound import Outbound
from serve_app.validation.bundles import Bundles
from serve_app.validation.generations import Generations
from serve_app.validation.lora_imports import LoraImports
from serve_app.validation.staged import StagedUploads
from serve_app.validation.start_pictures import StartPictures
from serve_app.validation.uploads import DatasetUploads
from serve_app.validation.validator import Validator
from storage.imported_loras import ImportedLora
from storage.keys import Keys
from storage.objects import ObjectStore


class ValidationService:
    """Implements `serve_app.collaborators.Validation`. `keys_of` gives a tenant's keys, `models` the models' folders by
    alias."""

    def __init__(
        self,
        validator: Validator,
        store: ObjectStore,
        keys_of: Callable[[str], Keys],
        *,
        bucket: str,
        clock: Clock,
        outbound: Outbound,
        url_expires_s: int,
        models: Mapping[str, str],
    ) -> None:
        self._validator = validator
        self._loras = LoraImports(store, keys_of, models)
        self._generations = Generations(validator, StartPictures(store, keys_of, bucket, outbound))
        self._uploads = DatasetUploads(store, keys_of, bucket, clock, outbound)
        self._bundles = Bundles(store, keys_of, clock)
        self._staged = StagedUploads(store, keys_of, bucket, clock, self._uploads, url_expires_s=url_expires_s)

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

    async def bundle(self, tenant: str, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return await self._bundles.make(tenant, files)
