"""Files as ai-toolkit's users write them, to change."""

from __future__ import annotations

from typing import Any

import yaml

from train_jobs.errors import Problem

TRAIN = """
job: extension
config:
  name: "my_first_lora"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "ohwx"
      network: {type: "lora", linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "/workspace/datasets/cats/"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [ 512, 768 ]
          flip_x: true
          num_repeats: 3
      train:
        batch_size: 2
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: "ddpm"
        optimizer: "adamw8bit"
        optimizer_params: {weight_decay: 1e-4, betas: [0.9, 0.99]}
        lr: 1e-4
        min_snr_gamma: 5.0
        ema_config: {use_ema: false, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: "tiny", quantize: true}
      sample:
        sampler: "ddpm"
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign --w 512 --n blurry", "[name] at the sea"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 25
meta: {name: "[name]", version: '1.0'}
"""


GENERATE = """
job: generate
config:
  name: "generate"
  process:
    - type: to_folder
      output_folder: "output/gen"
      device: cuda:0
      generate: {sampler: "ddpm", width: 64, height: 32, neg: "cartoon", seed: -1, guidance_scale: 7, sample_steps: 20,
                 ext: ".png", num_repeats: 2, prompts: ["photo of batman", "photo of superman"]}
      model: {name_or_path: "tiny", is_v2: false, lora_path: "output/my_lora/my_lora.safetensors", dtype: bf16}
"""


def training_document() -> Any:
    parsed = yaml.safe_load(TRAIN)
    parsed["config"]["process"][0]["train"]["lr"] = 1e-4
    parsed["config"]["process"][0]["train"]["optimizer_params"]["weight_decay"] = 1e-4
    return parsed


def with_value(section: str, key: str, value: Any) -> Any:
    document = training_document()
    target = document["config"]["process"][0][section]
    (target[0] if isinstance(target, list) else target)[key] = value
    return document


def is_in_the_file(problem: Problem) -> bool:
    return problem.path == "job" or problem.path.startswith("config")
