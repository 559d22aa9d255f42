"""`generate`: finds the adapters, chooses what was left open, and queues."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from serve_app.collaborators import GenerationPlan
from serve_app.errors import LoraNotUsable, QueueFull
from serve_app.inference.plan import GenerationRequest, ResolvedLora, StartingPoint
from serve_app.job_types.context import Following, JobContext, Services, runpod_id_of, webhook_of
from serve_app.job_types.continuing import whole_checkpoints
from serve_app.job_types.files import latest_lora
from serve_app.job_types.loras import stored_loras
from serve_app.job_types.recorded import recorded_sha256
from serve_app.validation.start_pictures import is_inline
from serve_app.validation.validator import parse_payload
from storage.errors import JobNotFound, JobsUnavailable, ObjectNotFound, StorageError
from storage.imported_loras import IMPORTED_ID_PATTERN, ImportedLoraNotFound, read_imported
from storage.job_record import JOB_ID_PATTERN, JobRecord, NewJob, NewWebhook
from storage.job_state import JobKind, JobState
from storage.jobs import new_job_id
from storage.ray_counters import note_cleanup_failure
from train_jobs.checkpoint_state import ADAPTER
from train_jobs.generate_spec import GenerateSpec, LoraUse

QUEUE_RETRY_AFTER_S = 10.0


class WaitChoice(BaseModel):
    model_config = ConfigDict(extra="allow")

    wait: bool | None = None


async def generate(services: Services, context: JobContext, payload: dict[str, Any]) -> Following:
    """Raises QueueFull, InvalidRequest, ConfigInvalid, ModelNotServed, LoraNotUsable, StorageError, JobError."""
    await _check_queue(services, context.tenant)
    wait = parse_payload(WaitChoice, payload).wait
    process_id = new_job_id(JobKind.GENERATION)
    plan = await services.validation.generation(context.tenant, process_id, payload)
    # A prompt's RunPod job is the picture itself; a config's was, in the older API, only its acceptance.
    waits = not plan.from_config if wait is None else wait
    context = replace(context, webhook=_without_bytes(services, context, plan.start))
    try:
        record = await _queued(services, context, plan, process_id, waits=waits)
    except JobsUnavailable:
        # The record may have been made all the same.
        raise
    except Exception:
        await _discard(services, plan.start)
        raise
    if record.id != process_id:
        await _discard(services, plan.start)
    return Following(record)


async def _queued(
    services: Services, context: JobContext, plan: GenerationPlan, process_id: str, *, waits: bool
) -> JobRecord:
    """The record that is made now, or was by the same request before."""
    spec = GenerateSpec.model_validate(plan.spec)
    by_id = [await _lora_used(services, context.tenant, use) for use in spec.loras]
    by_path = [await _lora_by_path(services, context.tenant, path, scale) for path, scale in plan.lora_paths]
    request = GenerationRequest(spec=spec, loras=(*by_id, *by_path), start=plan.start)
    return await services.jobs.create(
        NewJob(
            kind=JobKind.GENERATION,
            tenant=context.tenant,
            request=request.as_json(),
            notes={"warnings": [*context.warnings, *plan.warnings]},
            job_id=process_id,
            runpod_id=runpod_id_of(context, waits=waits),
            webhook=webhook_of(context, waits=waits),
            idempotency_key=context.idempotency_key,
            body_sha256=context.body_sha256,
            timeout_s=context.policy.execution_timeout_s or services.defaults.generation_timeout_s,
            ttl_s=context.policy.ttl_s,
            attempts_max=services.defaults.attempts_max,
            priority=context.policy.priority,
        )
    )


def _without_bytes(services: Services, context: JobContext, start: StartingPoint | None) -> NewWebhook | None:
    """The webhook whose copy of the input names the stored pictures where the request held their bytes."""
    webhook = context.webhook
    if webhook is None or start is None:
        return webhook
    stored = {"init_image": start.init_image, "mask": start.mask}
    keys = services.keys_of(context.tenant)
    named = {
        field: picture.key
        for field, picture in stored.items()
        if picture is not None and is_inline(webhook.input[field], keys)
    }
    return webhook.model_copy(update={"input": webhook.input | named})


async def _discard(services: Services, start: StartingPoint | None) -> None:
    """Pictures that no record speaks of."""
    if start is None:
        return
    pictures = [start.init_image] if start.mask is None else [start.init_image, start.mask]
    try:
        await services.store.delete_many([picture.key for picture in pictures])
    except StorageError as error:
        # The sweeper takes them after a while.
        note_cleanup_failure("start_pictures", error.code)


async def _check_queue(services: Services, tenant: str) -> None:
    """Refuses early, before anything is looked up. A few more may slip in at the same moment.

    A tenant may have as many waiting as there are places left: alone it fills half of them, and as long as there is
    a place, a tenant that has none waiting gets it (Choudhury and Hahne's dynamic queue length thresholds).
    """
    queued = await services.jobs.queued(JobKind.GENERATION)
    left, own = services.defaults.generation_queue_max - sum(queued.values()), queued.get(tenant, 0)
    if left <= own:
        raise QueueFull(own, QUEUE_RETRY_AFTER_S)


async def _lora_used(services: Services, tenant: str, use: LoraUse) -> ResolvedLora:
    if use.step is None:
        return await _lora_by_id(services, tenant, use.id, use.scale)
    return await _of_checkpoint(services, tenant, use.id, use.step, use.scale)


async def _of_checkpoint(services: Services, tenant: str, process_id: str, step: int, scale: float) -> ResolvedLora:
    """Of a whole checkpoint, whatever has become of its training. A picture's settings call it `<training>@<step>`."""
    if not re.match(JOB_ID_PATTERN, process_id):
        raise LoraNotUsable(process_id, "it is not a training, and has no checkpoints")
    keys = services.keys_of(tenant)
    if step not in await whole_checkpoints(services.store, keys, process_id):
        raise LoraNotUsable(process_id, f"it has no checkpoint of step {step}")
    key = keys.checkpoint_file(process_id, step, ADAPTER)
    sha256 = await recorded_sha256(services, tenant, key)
    return ResolvedLora(id=f"{process_id}@{step}", key=key, sha256=sha256, scale=scale)


async def _lora_by_id(services: Services, tenant: str, lora_id: str, scale: float) -> ResolvedLora:
    """`lora_id` is a training's process id, or the id or file name of a stored adapter; the newest one wins."""
    if re.match(IMPORTED_ID_PATTERN, lora_id):
        return await _imported(services, tenant, lora_id, scale)
    stored = await _of_training(services, tenant, lora_id) if re.match(JOB_ID_PATTERN, lora_id) else None
    if stored is None:
        stored = await _by_name(services, tenant, lora_id)
    if stored is None:
        raise LoraNotUsable(lora_id, "there is no such training or adapter")
    return ResolvedLora(id=lora_id, key=stored["key"], sha256=stored.get("sha256"), scale=scale)


async def _imported(services: Services, tenant: str, lora_id: str, scale: float) -> ResolvedLora:
    try:
        lora = await read_imported(services.store, services.keys_of(tenant), lora_id)
    except ImportedLoraNotFound:
        raise LoraNotUsable(lora_id, "there is no such training or adapter") from None
    return ResolvedLora(id=lora_id, key=lora.key, sha256=lora.sha256, scale=scale)


async def _of_training(services: Services, tenant: str, process_id: str) -> dict[str, Any] | None:
    try:
        record = await services.jobs.get(process_id, tenant=tenant)
    except JobNotFound:
        return None
    if record.kind is not JobKind.TRAINING:
        raise LoraNotUsable(process_id, "it is not a training")
    if record.state is not JobState.COMPLETED:
        raise LoraNotUsable(process_id, "its training has not completed")
    return latest_lora(record.output)


async def _by_name(services: Services, tenant: str, name: str) -> dict[str, Any] | None:
    async for _, stored in stored_loras(services, tenant):
        if name in {stored.get("id"), stored.get("filename"), str(stored.get("filename")).removesuffix(".safetensors")}:
            return stored
    return None


async def _lora_by_path(services: Services, tenant: str, path: str, scale: float) -> ResolvedLora:
    """`path`: a key that the tenant may read, or `s3://<bucket>/<key>` with such a key."""
    key = path.removeprefix(f"s3://{services.bucket}/")
    if not services.keys_of(tenant).may_read(key) or not key.endswith(".safetensors"):
        raise LoraNotUsable(path, "it is not one of your .safetensors files")
    try:
        info = await services.store.head(key)
    except ObjectNotFound:
        raise LoraNotUsable(path, "there is no such file") from None
    sha256 = await recorded_sha256(services, tenant, key) or info.sha256
    return ResolvedLora(id=None, path=path, key=key, sha256=sha256, scale=scale)
