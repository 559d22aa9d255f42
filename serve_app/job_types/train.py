"""`train`: everything that can be known to be wrong is refused before anything is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serve_app.collaborators import TrainingPlan
from serve_app.errors import InvalidRequest
from serve_app.job_types.context import Finished, Following, JobContext, Outcome, Services, runpod_id_of, webhook_of
from serve_app.job_types.recorded import recorded_sha256
from serve_app.validation.validator import parse_payload, unknown_fields
from storage.datasets import DatasetNotFound
from storage.job_record import NewJob
from storage.job_state import JobKind
from storage.keys import Keys
from storage.older_layout import readable_kinds, readable_manifest
from train_jobs.config_check import not_accepted
from train_jobs.errors import DatasetEmpty, Problem
from train_jobs.spec import NetworkSpec, TrainSpec
from train_jobs.spec_datasets import dataset_names, pinned

IMAGE_CONTENT = "image/"
NO_ADAPTER = "is not a .safetensors file of yours"


class TrainPayload(BaseModel):
    """`config` and `yaml_config` are the same; YAML text or a mapping.

    `check` only reports on it, key by key. `uploads` are data sets that a check takes as being there: they are uploaded
    before the training.
    """

    model_config = ConfigDict(extra="allow")

    type: str | None = None
    config: str | dict[str, Any] | None = None
    yaml_config: str | dict[str, Any] | None = None
    wait: bool = False
    check: bool = False
    uploads: list[str] = Field(default_factory=list, max_length=100)

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
        report = await services.validation.training_check(request.given)
        report = await _with_what_exists(services, context.tenant, report, frozenset(request.uploads))
        return Finished({**report, "warnings": list(unknown_fields(request))})
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
            notes={"ignored": list(plan.ignored), "warnings": [*context.warnings, *plan.warnings]},
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


async def _with_what_exists(
    services: Services, tenant: str, report: dict[str, Any], uploads: Set[str]
) -> dict[str, Any]:
    """The report of a check, with `found` in each data set and adapter of its `needs`. Raises StorageError."""
    keys = services.keys_of(tenant)
    names = {need["dataset"] for need in report["needs"] if "dataset" in need} - uploads
    kinds = dict(zip(names, await asyncio.gather(*(_kinds(services, keys, name) for name in names)), strict=True))
    needs: list[dict[str, Any]] = []
    for need in report["needs"]:
        if "dataset" in need:
            name = need["dataset"]
            found = name in uploads or kinds[name] is not None
            problem = None if name in uploads else _unusable(name, kinds[name])
        elif "lora" in need:
            found = keys.may_read(need["lora"])
            problem = None if found else NO_ADAPTER
        else:
            needs.append(need)
            continue
        needs.append({**need, "found": found})
        if problem is not None:
            report = not_accepted(report, need["path"], "invalid", problem)
    return {**report, "needs": needs}


async def _kinds(services: Services, keys: Keys, name: str) -> list[str | None] | None:
    """The content types of a data set's files; None where there is none."""
    try:
        return await readable_kinds(services.store, keys, name)
    except DatasetNotFound:
        return None


def _unusable(name: str, kinds: Sequence[str | None] | None) -> str | None:
    """Why a data set with files of these kinds cannot be trained on."""
    if kinds is None:
        return f"there is no data set '{name}' here: upload it first, or name another"
    return None if _has_pictures(kinds) else f"data set '{name}' has no pictures"


def _has_pictures(kinds: Sequence[str | None]) -> bool:
    return any((kind or "").startswith(IMAGE_CONTENT) for kind in kinds)


async def _with_datasets(services: Services, tenant: str, plan: TrainingPlan) -> dict[str, Any]:
    """The spec with each dataset's newest upload pinned, so that a later upload does not change this training."""
    spec = TrainSpec.model_validate(plan.spec)
    keys = services.keys_of(tenant)
    pretrained = spec.network.pretrained
    if pretrained is not None and not keys.may_read(pretrained):
        at = "network.pretrained"
        raise InvalidRequest([Problem(plan.places.get(at, at), NO_ADAPTER, "not_found")])
    now = services.clock()
    manifests = await asyncio.gather(
        *(readable_manifest(services.store, keys, name, now=now) for name in dataset_names(spec))
    )
    for manifest in manifests:
        if not _has_pictures([file.content_type for file in manifest.files]):
            raise DatasetEmpty(manifest.folder)
    newest = {manifest.folder: manifest.upload_id for manifest in manifests}
    network = await _with_digest(services, tenant, spec.network)
    return pinned(spec.model_copy(update={"network": network}), newest).model_dump(mode="json")


async def _with_digest(services: Services, tenant: str, network: NetworkSpec) -> NetworkSpec:
    """With what the adapter that it begins from must be, where that was recorded."""
    if network.pretrained is None or network.pretrained_sha256 is not None:
        return network
    recorded = await recorded_sha256(services, tenant, network.pretrained)
    return network.model_copy(update={"pretrained_sha256": recorded})
