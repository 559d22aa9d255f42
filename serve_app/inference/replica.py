"""Puts a replica's parts together. Imports torch; imported only inside replicas."""

from __future__ import annotations

from diffusion.engine.order import Turns
from diffusion.quantized import Quantization
from serve_app.inference.engines import (
    EngineOptions,
    EngineShelf,
    LastResort,
    chosen_device,
    device_facts,
    engine_loader,
    memory_of,
)
from serve_app.inference.lora_cache import LoraCache
from serve_app.inference.model_size import ModelSize
from serve_app.inference.own_folder import own_folder
from serve_app.inference.read_ahead import read_ahead
from serve_app.inference.service import InferenceService
from serve_app.settings import Settings
from storage.actor import StorageClient
from storage.keys import Keys


def build_service(settings: Settings) -> InferenceService:
    """With the default model loaded. Raises DiffusionError where it cannot be, or not with these weights."""
    s3 = settings.s3()
    store = StorageClient(s3, settings.breaker())
    on_gpu = chosen_device(settings.device) == "cuda"
    options = EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        batch_max=settings.pictures_per_batch,
        decode_max=settings.pictures_per_decode,
        tiled=settings.vae_tiling,
        adapter_bytes_max=settings.adapter_memory_bytes_max,
        compiled=settings.compile_models,
        quantization=_quantization(settings),
        first_block_cache=settings.first_block_cache,
    )
    turns = Turns()
    size = ModelSize(options.torch_dtype, options.quantization)
    last_resort = LastResort(engine_loader(options, turns, offloaded=True), size.largest_part(settings.required_mb))
    shelf = EngineShelf(
        settings.models,
        engine_loader(options, turns),
        loaded_max=settings.models_loaded_max,
        memory=memory_of(settings.device),
        needed_bytes=size.whole(settings.required_mb if on_gpu else 0),
        last_resort=last_resort if settings.cpu_offload and on_gpu else None,
        turns=turns,
        prepare=read_ahead,
    )
    shelf.load(settings.default_model)
    # A folder of its own: another replica on this machine evicts by its own count.
    folder = own_folder(settings.home / "cache" / "loras")
    return InferenceService(
        store=store,
        keys_of=lambda tenant: Keys(s3.prefix, tenant),
        shelf=shelf,
        loras=LoraCache(store, folder, bytes_max=settings.lora_cache_bytes_max),
        device=device_facts(settings.device),
        threads=settings.generations_per_replica,
        stuck_after_s=settings.engine_stuck_after_s,
    )


def _quantization(settings: Settings) -> Quantization | None:
    if settings.quantize is None and settings.quantize_text_encoders is None:
        return None
    return Quantization(settings.quantize, settings.quantize_text_encoders, setting="quantize")
