"""Adapter files with their metadata: those that a training ends with, and the one of each of its checkpoints."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion.adapter import TrainableLora
from diffusion.errors import SettingNotSupported
from diffusion.families import Family
from diffusion.kohya import to_kohya, to_kohya_factors
from diffusion.lora import read_lora, save_lora
from train_jobs.artifacts import Artifacts
from train_jobs.preparing import Prepared
from train_jobs.spec import TrainSpec

EXPORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Results:
    """Writes and stores them. `base_model` is the model's name as clients may see it."""

    def __init__(self, spec: TrainSpec, artifacts: Artifacts, scratch: Path, *, base_model: str) -> None:
        self._spec = spec
        self._artifacts = artifacts
        self._scratch = scratch
        self._base_model = base_model
        self.warnings: list[str] = []

    def write_adapter(self, path: Path, prepared: Prepared, *, step: int) -> dict[str, str]:
        """The adapter as it is after `step` updates, under diffusers' key names. Returns its metadata."""
        metadata = self._metadata(prepared, step)
        save_lora(path, prepared.lora.file_state(), metadata=metadata, dtype=EXPORT_DTYPES[self._spec.save.dtype])
        return metadata

    def store_adapter(self, prepared: Prepared, *, step: int) -> dict[str, Any]:
        """The `loras` and `exports` of the output: diffusers' key names, and kohya's where the layers have them."""
        path = self._scratch / f"{self._spec.name}.safetensors"
        metadata = self.write_adapter(path, prepared, step=step)
        stored = self._artifacts.store_lora(path, step=step)
        exports: list[dict[str, Any]] = []
        try:
            named = self._kohya_names(prepared.family, prepared.lora, path)
            exports.append(self._store_kohya(named, metadata, step))
        except SettingNotSupported:
            self.warnings.append("Some of the adapter's layers have no kohya names; there is no kohya file.")
        return {"loras": [stored], "exports": exports}

    def _kohya_names(self, family: Family, lora: TrainableLora, stored: Path) -> dict[str, Tensor]:
        if lora.lycoris is not None:
            return to_kohya_factors(lora.file_state(), family)
        return to_kohya(read_lora(stored).layers(), family)

    def _store_kohya(self, state: dict[str, Tensor], metadata: dict[str, str], step: int) -> dict[str, Any]:
        dtype = EXPORT_DTYPES[self._spec.save.dtype]
        path = self._scratch / f"{self._spec.name}_kohya.safetensors"
        kept = {key: value for key, value in metadata.items() if key != "lora_adapter_metadata"}
        save_file(
            {k: t.to("cpu", dtype).contiguous() for k, t in state.items()}, path, metadata={"format": "pt", **kept}
        )
        return self._artifacts.store_lora(path, step=step) | {"format": "kohya"}

    def _metadata(self, prepared: Prepared, step: int) -> dict[str, str]:
        spec, train = self._spec, self._spec.train
        own = spec.model_dump(
            mode="json",
            exclude={
                "datasets": {"__all__": {"local_path"}},
                "validation": True,
                "captioning": {"model"},
            },
        )
        return prepared.lora.metadata(
            title=spec.name,
            steps=step,
            base_model=self._base_model,
            trigger_word=spec.trigger_word,
            resolution=max(r for dataset in spec.datasets for r in dataset.resolutions_px),
            created_at=datetime.now(UTC),
            base_model_sha256=prepared.base_model_sha256,
            thumbnail=prepared.previews.thumbnail,
            extra={
                "ss_learning_rate": str(train.learning_rate),
                "ss_text_encoder_lr": str(train.text_encoder_learning_rate or train.learning_rate),
                "ss_lr_scheduler": train.schedule.type,
                "ss_optimizer": train.optimizer.type,
                "ss_seed": str(train.seed),
                "ss_batch_size_per_device": str(train.batch_size),
                "ss_gradient_accumulation_steps": str(train.gradient_accumulation),
                "ss_max_train_steps": str(train.steps),
                "ss_num_train_images": str(len(prepared.cache.uses)),
                "ss_mixed_precision": train.dtype,
                "raylora.config": json.dumps(own | {"model": self._base_model}, sort_keys=True),
            },
        )
