"""What a finished training leaves: adapter files with their metadata, loss files, and the record's output."""

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
from train_jobs.charts import Points, loss_png, tensorboard_file
from train_jobs.spec import TrainSpec

EXPORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOSS_LOG, LOSS_CHART, EVENTS = "loss.json", "loss.png", "events.out.tfevents.raylora"


class Results:
    """Writes and stores them. `base_model` is the model's name as clients may see it."""

    def __init__(self, spec: TrainSpec, artifacts: Artifacts, scratch: Path, *, base_model: str) -> None:
        self._spec = spec
        self._artifacts = artifacts
        self._scratch = scratch
        self._base_model = base_model
        self.warnings: list[str] = []

    def store_adapter(self, family: Family, lora: TrainableLora, *, step: int, pictures: int) -> dict[str, Any]:
        """The `loras` and `exports` of the output: diffusers' key names, and kohya's where the layers have them."""
        metadata = self._metadata(lora, step, pictures)
        dtype = EXPORT_DTYPES[self._spec.save.dtype]
        path = self._scratch / f"{self._spec.name}.safetensors"
        save_lora(path, lora.file_state(), metadata=metadata, dtype=dtype)
        stored = self._artifacts.store_lora(path, step=step)
        exports: list[dict[str, Any]] = []
        try:
            named = self._kohya_names(family, lora, path)
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

    def store_losses(self, history: Points, validation: Points) -> dict[str, Any]:
        """Loss files as JSON, picture and TensorBoard events; their keys, for the output."""
        if not history:
            return {}
        store = self._artifacts.store_log
        keys = {
            "loss_key": store(LOSS_LOG, json.dumps(list(history)).encode()),
            "loss_chart_key": store(LOSS_CHART, loss_png(history, validation)),
            "tensorboard_key": store(EVENTS, tensorboard_file(self._scratch / "events", history, validation)),
        }
        return keys | ({"validation_losses": [list(point) for point in validation]} if validation else {})

    def _metadata(self, lora: TrainableLora, step: int, pictures: int) -> dict[str, str]:
        spec, train = self._spec, self._spec.train
        own = spec.model_dump(
            mode="json",
            exclude={
                "datasets": {"__all__": {"local_path"}},
                "validation": True,
                "captioning": {"model"},
            },
        )
        return lora.metadata(
            title=spec.name,
            steps=step,
            base_model=self._base_model,
            trigger_word=spec.trigger_word,
            resolution=max(r for dataset in spec.datasets for r in dataset.resolutions_px),
            created_at=datetime.now(UTC),
            extra={
                "ss_learning_rate": str(train.learning_rate),
                "ss_text_encoder_lr": str(train.text_encoder_learning_rate or train.learning_rate),
                "ss_lr_scheduler": train.schedule.type,
                "ss_optimizer": train.optimizer.type,
                "ss_seed": str(train.seed),
                "ss_batch_size_per_device": str(train.batch_size),
                "ss_gradient_accumulation_steps": str(train.gradient_accumulation),
                "ss_max_train_steps": str(train.steps),
                "ss_num_train_images": str(pictures),
                "ss_mixed_precision": train.dtype,
                "raylora.config": json.dumps(own | {"model": self._base_model}, sort_keys=True),
            },
        )
