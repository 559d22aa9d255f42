"""Whole ai-toolkit files as their users write them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from diffusion.testing import write_tiny_model
from storage.datasets import write_dataset
from storage.loop_thread import LoopThread
from storage.settings import BreakerSettings, S3Settings
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, NOW, Told, get
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.artifacts import Artifacts
from train_jobs.loop import Alone
from train_jobs.training import Training
from train_jobs.worker import WorkerConfig

FLUX_CONFIG = """
---
job: extension
config:
  # this name will be the folder and filename name
  name: "my_first_flux_lora_v1"
  process:
    - type: 'sd_trainer'
      # root folder to save training sessions/samples/weights
      training_folder: "output"
      performance_log_every: 1000
      device: cuda:0
      trigger_word: "p3r5on"
      network:
        type: "lora"
        linear: 16
        linear_alpha: 16
      save:
        dtype: float16
        save_every: 250
        max_step_saves_to_keep: 4
        push_to_hub: false
      datasets:
        - folder_path: "/path/to/images/cats"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768, 1024 ]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        lr: 1e-4
        skip_first_sample: true
        ema_config:
          use_ema: true
          ema_decay: 0.99
        dtype: bf16
      model:
        name_or_path: "black-forest-labs/FLUX.1-dev"
        is_flux: true
        quantize: true
      sample:
        sampler: "flowmatch"
        sample_every: 250
        width: 1024
        height: 1024
        prompts:
          - "[trigger] holding a sign that says 'I LOVE PROMPTS!'"
          - "a bear building a log cabin in the snow covered mountains"
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta:
  name: "[name]"
  version: '1.0'
"""


SDXL_CONFIG = """
job: extension
config:
  name: my_style_xl
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      network: {type: lora, linear: 8, linear_alpha: 4, conv: 4, conv_alpha: 2, dropout: 0.1}
      save: {dtype: bf16, save_every: 500, max_step_saves_to_keep: 2}
      datasets:
        - folder_path: /datasets/cats
          caption_ext: txt
          default_caption: a picture
          shuffle_tokens: true
          keep_tokens: 1
          flip_x: true
          cache_latents: true
          resolution: [1024]
        - folder_path: /datasets/cats
          is_reg: true
          num_repeats: 2
          resolution: 1024
      train:
        batch_size: 2
        steps: 3000
        gradient_accumulation: 2
        train_text_encoder: true
        text_encoder_lr: 5e-5
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adafactor
        optimizer_params: {weight_decay: 0.01}
        lr: 1e-4
        lr_scheduler: cosine
        min_snr_gamma: 5.0
        noise_offset: 0.03
        content_or_style: style
        disable_sampling: true
        dtype: bf16
      model: {name_or_path: stabilityai/stable-diffusion-xl-base-1.0, is_xl: true}
"""


@pytest.mark.parametrize(
    ("family", "config", "hub_id", "parts"),
    [
        ("flux1", FLUX_CONFIG, "black-forest-labs/FLUX.1-dev", {"transformer"}),
        ("sdxl", SDXL_CONFIG,
         "stabilityai/stable-diffusion-xl-base-1.0", {"unet", "text_encoder", "text_encoder_2"}),
    ],
)  # fmt: skip
def test_a_users_ai_toolkit_config_runs_with_only_the_model_pointed_elsewhere(
    family: str, config: str, hub_id: str, parts: set[str], store: InMemoryStore, runner: LoopThread,
    write_pictures: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    files = [(path.name, path, None) for path in sorted(write_pictures((64, 64), (64, 64)).iterdir())]
    runner.run_blocking(write_dataset(store, KEYS, "cats", files, now=NOW))
    folder = write_tiny_model(family, tmp_path / "tiny")
    if find_spec("torchao") is None:
        config = config.replace("quantize: true", "quantize: false")
    parsed = parse_train_yaml(config)
    (tmp_path / "scratch").mkdir()
    told = Told(stop_at=3)
    settings = WorkerConfig(
        process_id=JOB, tenant="default", spec=parsed.spec.model_dump(mode="json"), models={hub_id: str(folder)},
        paths_allowed=False, s3=S3Settings(), breaker=BreakerSettings(), use_gpu=False,
    )  # fmt: skip
    result = Training(
        settings, Artifacts(store, runner, KEYS, JOB, tmp_path / "scratch"), tmp_path / "scratch",
        torch.device("cpu"), Alone(), told, agree=lambda value: value, report_to_train=lambda _: None,
    ).run()  # fmt: skip
    assert told.steps == [1, 2, 3]
    assert [c["step"] for c in result["output"]["checkpoints"]] == [3]
    key = next(k for k in result["output"]["checkpoints"][0]["keys"] if k.endswith("adapter.safetensors"))
    assert {name.partition(".")[0] for name in load(get(store, key))} == parts
