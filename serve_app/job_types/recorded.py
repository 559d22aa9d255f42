"""What was recorded of a stored adapter when it was made: the digest that its bytes must have wherever they are read.

The object itself need not tell: the embedded server forgets metadata, and who could change the bytes could change it.
"""

from __future__ import annotations

from serve_app.job_types.context import Services
from storage.errors import JobNotFound, ObjectNotFound
from storage.imported_loras import ImportedLoraNotFound, read_imported
from storage.keys import Place, owner_of, place_of
from storage.ray_counters import note_unverified_weights
from train_jobs.checkpoint_state import STATE, digests_in


async def recorded_sha256(services: Services, tenant: str, key: str) -> str | None:
    """In hex, of an adapter that `tenant` may read; None where nothing was recorded: of the older layout, of
    checkpoints from before they had digests, and of what a deleted record listed. That is logged and counted.

    Raises CheckpointInvalid, JobError, StorageError.
    """
    place = place_of(services.prefix, key)
    recorded = None if place is None else await _recorded(services, tenant, place, key)
    if recorded is None:
        kind = "older layout" if place is None else place.kind
        note_unverified_weights(kind, owner_of(services.prefix, key))
    return recorded


async def _recorded(services: Services, tenant: str, place: Place, key: str) -> str | None:
    if place.kind == "loras":
        return await _of_imported(services, tenant, place.name, key)
    if place.kind != "processes":
        return None
    if key.startswith(services.keys_of(tenant).checkpoints_prefix(place.name)):
        return await _of_checkpoint(services, key)
    return await _of_training(services, tenant, place.name, key)


async def _of_imported(services: Services, tenant: str, lora_id: str, key: str) -> str | None:
    try:
        lora = await read_imported(services.store, services.keys_of(tenant), lora_id)
    except ImportedLoraNotFound:
        return None
    return lora.sha256 if lora.key == key else None


async def _of_checkpoint(services: Services, key: str) -> str | None:
    folder, _, name = key.rpartition("/")
    try:
        state = await services.store.get(f"{folder}/{STATE}")
    except ObjectNotFound:
        return None
    return digests_in(state).get(name)


async def _of_training(services: Services, tenant: str, process_id: str, key: str) -> str | None:
    try:
        record = await services.jobs.get(process_id, tenant=tenant)
    except JobNotFound:
        return None
    listed = (record.output or {}).get("loras", [])
    found = (stored.get("sha256") for stored in listed if stored.get("key") == key)
    return next(found, None)
