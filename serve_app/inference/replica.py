"""Puts a replica's parts together. Imports torch; imported only inside replicas."""

from __future__ import annotations

import secrets

from serve_app.inference.engines import EngineShelf, device_facts, engine_loader
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.service import InferenceService
from serve_app.settings import Settings
from storage.actor import StorageClient
from storage.keys import Keys


def build_service(settings: Settings) -> InferenceService:
    """With the default model loaded. Raises DiffusionError where it cannot be."""
    s3 = settings.s3()
    store = StorageClient(s3, settings.breaker())
    shelf = EngineShelf(settings.models, engine_loader(settings.device, settings.dtype))
    shelf.engine(settings.default_model)
    # A folder of its own: another replica on this machine evicts by its own count.
    folder = settings.home / "cache" / "loras" / secrets.token_hex(4)
    return InferenceService(
        store=store,
        keys_of=lambda tenant: Keys(s3.prefix, tenant),
        shelf=shelf,
        loras=LoraCache(store, folder, bytes_max=settings.lora_cache_bytes_max),
        device=device_facts(settings.device),
    )
