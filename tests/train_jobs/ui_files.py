"""Files as ai-toolkit's web page makes them: its defaults, and what choosing a model there changes.

Keys and values: ostris/ai-toolkit `ui/src/app/jobs/new/{jobConfig.ts,options.tsx,utils.ts}` and
`ui/src/helpers/defaultSamples.ts`, August 2026.
"""

from __future__ import annotations

import copy
from typing import Any

import yaml

BASE = """
job: extension
config:
  name: my_first_lora_v1
  process:
    - type: diffusion_trainer
      training_folder: /app/ai-toolkit/output
      sqlite_db_path: ./aitk_db.db
      device: cuda
      trigger_word: null
      performance_log_every: 10
      network:
        type: lora
        linear: 32
        linear_alpha: 32
        conv: 16
        conv_alpha: 16
        lokr_full_rank: true
        lokr_factor: -1
        network_kwargs:
          ignore_if_contains: []
      save:
        dtype: bf16
        save_every: 250
        max_step_saves_to_keep: 4
        save_format: diffusers
        push_to_hub: false
      datasets:
        - folder_path: /app/ai-toolkit/datasets/cats
          mask_path: null
          mask_min_value: 0.1
          default_caption: ""
          caption_ext: txt
          caption_dropout_rate: 0.05
          cache_latents_to_disk: false
          is_reg: false
          network_weight: 1
          resolution: [512, 768, 1024]
          controls: []
          shrink_video_to_frames: true
          num_frames: 1
          flip_x: false
          flip_y: false
          num_repeats: 1
      train:
        batch_size: 1
        bypass_guidance_embedding: false
        steps: 3000
        gradient_accumulation: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        timestep_type: sigmoid
        content_or_style: balanced
        optimizer_params:
          weight_decay: 0.0001
        unload_text_encoder: false
        cache_text_embeddings: false
        lr: 0.0001
        ema_config:
          use_ema: false
          ema_decay: 0.99
        skip_first_sample: false
        force_first_sample: false
        disable_sampling: false
        dtype: bf16
        diff_output_preservation: false
        diff_output_preservation_multiplier: 1
        diff_output_preservation_class: person
        switch_boundary_every: 1
        loss_type: mse
      logging:
        log_every: 1
        use_ui_logger: true
      model:
        quantize: false
        qtype: qfloat8
        quantize_te: false
        qtype_te: qfloat8
        low_vram: false
        model_kwargs: {}
        compile: false
      sample:
        sampler: flowmatch
        sample_every: 250
        sample_start_step: 0
        width: 1024
        height: 1024
        samples:
          - prompt: woman with red hair, playing chess at the park, bomb going off in the background
          - prompt: a man holding a sign that says, 'this is a sign'
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 30
        num_frames: 1
        fps: 1
meta:
  name: "[name]"
  version: "1.0"
"""
ROUNDED = {"model.quantize": True, "model.quantize_te": True}
OFFLOADED = {
    "model.layer_offloading": False,
    "model.layer_offloading_text_encoder_percent": 1,
    "model.layer_offloading_transformer_percent": 1,
}
LARGE = ROUNDED | OFFLOADED | {"model.low_vram": True, "train.timestep_type": "weighted"}
EDITING = {
    "model.model_kwargs": {"match_target_res": False},
    "datasets.control_path_1": None,
    "datasets.control_path_2": None,
    "datasets.control_path_3": None,
}
UNET = {"train.noise_scheduler": "ddpm", "sample.sampler": "ddpm", "sample.guidance_scale": 6}
CHANGES: dict[str, dict[str, Any]] = {
    "sd15": UNET
    | {
        "model.name_or_path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sample.width": 512,
        "sample.height": 512,
    },
    "sdxl": UNET | {"model.name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"},
    # The page's first choice, as it is before another one is made.
    "flex1": ROUNDED | {"model.name_or_path": "ostris/Flex.1-alpha", "train.bypass_guidance_embedding": True},
    "flux": ROUNDED | {"model.name_or_path": "black-forest-labs/FLUX.1-dev"},
    "flux2": LARGE | EDITING | {"model.name_or_path": "black-forest-labs/FLUX.2-dev"},
    "flux2_klein_4b": LARGE | EDITING | {"model.name_or_path": "black-forest-labs/FLUX.2-klein-base-4B"},
    "qwen_image": LARGE | {"model.name_or_path": "Qwen/Qwen-Image"},
    "qwen_image:2512": LARGE | {"model.name_or_path": "Qwen/Qwen-Image-2512"},
    "zimage": LARGE | {"model.name_or_path": "Tongyi-MAI/Z-Image"},
    "zimage:turbo": LARGE
    | {
        "model.name_or_path": "Tongyi-MAI/Z-Image-Turbo",
        "model.assistant_lora_path": "ostris/zimage_turbo_training_adapter/adapter_v2.safetensors",
        "sample.guidance_scale": 1,
        "sample.sample_steps": 9,
    },
}
"""By `arch`: what the page sets when that model is chosen."""


def ui_file(arch: str, **changes: Any) -> str:
    """The file's text. `changes` are by `<section>__<key>`."""
    document = yaml.safe_load(BASE)
    process = document["config"]["process"][0]
    named = {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in (CHANGES[arch] | {"model.arch": arch} | named).items():
        section, _, name = key.partition(".")
        target = process[section]
        (target[0] if isinstance(target, list) else target)[name] = copy.deepcopy(value)
    return yaml.safe_dump(document, sort_keys=False)
