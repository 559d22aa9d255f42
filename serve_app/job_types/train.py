"""`train`: everything that can be known to be wrong is refused before anything is queued."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from serve_app.collaborators import TrainingPlan
from serve_app.errors import InvalidRequest
from serve_app.job_types.context import Finished, Following, JobContext, Outcome, Services, runpod_id_of, webhook_of
from serve_app.validation.validator import parse_payload, unknown_fields
from storage.job_record import NewJob
from storage.job_state import JobKind
from storage.older_layout import readable_manifest
from train_jobs.errors import DatasetEmpty, Problem
from train_jobs.spec import TrainSpec

IMAGE_CONTENT = "image/"


class TrainPayload(BaseModel):
    """`config` and `yaml_config` are the same; YAML text or a mapping. `check` only reports on it, key by key."""

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    config: str | dict[str, Any] | None = None
    yaml_config: str | dict[str, Any] | None = None
    wait: bool = False
    check: bool = False

    @property
    def given(self) -> str | dict[str, Any]:
        """Raises InvalidRequest unless exactly one is there."""
        found = [value for value in (self.config, self.yaml_config) if value is not None]
        if len(found) != 1:
            raise InvalidRequest([Problem("config", "give the training config as config or yaml_config", "missing")])
        return found[0]


async def train(services: Services, context: JobContext, payload: dict[str, Any]) -> Outcome:
    """With `check` the report is all there is.

    Raises ConfigInvalid, InvalidRequest, ModelNotServed, DatasetNotFound, DatasetEmpty, StorageError, JobError.
    """
    request = parse_payload(TrainPayload, payload)
    if request.check:
        return Finished(await services.validation.training_check(request.given))
    plan = await services.validation.training(request.given)
    plan = replace(plan, warnings=(*unknown_fields(request), *plan.warnings))
    return await queue_training(services, context, plan, waits=request.wait)


async def queue_training(services: Services, context: JobContext, plan: TrainingPlan, *, waits: bool) -> Following:
    """Raises DatasetNotFound, DatasetEmpty, StorageError, JobError. `waits` as in `runpod_id_of`."""
    spec = await _with_datasets(services, context.tenant, plan)
    record = await services.jobs.create(
        NewJob(
            kind=JobKind.TRAINING,
            tenant=context.tenant,
            request=spec,
            notes={"ignored": list(plan.ignored), "warnings": list(plan.warnings)},
            runpod_id=runpod_id_of(context, waits=waits),
            webhook=webhook_of(context, waits=waits),
            idempotency_key=context.idempotency_key,
            body_sha256=context.body_sha256,
            timeout_s=context.policy.execution_timeout_s or services.defaults.training_timeout_s,
            ttl_s=context.policy.ttl_s,
            attempts_max=services.defaults.attempts_max,
            priority=context.policy.priority,
        )
    )
    return Following(record)


async def _with_datasets(services: Services, tenant: str, plan: TrainingPlan) -> dict[str, Any]:
    """The spec with each dataset's newest upload pinned, so that a later upload does not change this training."""
    spec = TrainSpec.model_validate(plan.spec)
    keys = services.keys_of(tenant)
    pretrained = spec.network.pretrained
    if pretrained is not None and not keys.may_read(pretrained):
        raise InvalidRequest([Problem("network.pretrained", "is not a .safetensors file of yours", "not_found")])
    used = [name for dataset in spec.all_datasets for name in (dataset.dataset, dataset.mask_dataset)]
    names = list(dict.fromkeys(name for name in used if name is not None))
    now = services.clock()
    manifests = await asyncio.gather(*(readable_manifest(services.store, keys, name, now=now) for name in names))
    for manifest in manifests:
        if not any((file.content_type or "").startswith(IMAGE_CONTENT) for file in manifest.files):
            raise DatasetEmpty(manifest.folder)
    newest = {manifest.folder: manifest.upload_id for manifest in manifests}
    datasets = tuple(
        dataset.model_copy(update={"upload_id": dataset.upload_id or newest[dataset.dataset]})
        if dataset.dataset is not None
        else dataset
        for dataset in spec.datasets
    )
    return spec.model_copy(update={"datasets": datasets}).model_dump(mode="json")
