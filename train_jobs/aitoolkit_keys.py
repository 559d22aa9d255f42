"""Every key of an ai-toolkit config, and what is done with it: plain data.

honoured  read by `aitoolkit.py` into the spec
ignored   of no use here, with the reason; listed to the caller
refused   asks for something that would change the result and is not done here; accepted only at the value given
Keys and defaults: ostris/ai-toolkit, `toolkit/config_modules.py`, August 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MEMORY = "placement and memory are decided here"
CACHED = "latents and text embeddings are always cached"
SPEED = "changes only speed or memory"
LOGS = "progress, loss and logs are always recorded"
ELSEWHERE = "results are stored in the object storage"
DEPENDENT = "has no effect without a setting that is off here"


@dataclass(frozen=True)
class Section:
    """The keys of one mapping in the file."""

    honoured: frozenset[str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> frozenset[str]:
        return self.honoured | frozenset(self.ignored) | frozenset(self.refused)


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _because(reason: str, text: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), reason)


FILE = Section(honoured=_keys("job config"), ignored={"meta": "free text of the file's author"})

CONFIG = Section(
    honoured=_keys("name process"),
    ignored=_because(MEMORY, "device dtype") | {"training_folder": ELSEWHERE, "log_dir": LOGS},
)

PROCESS = Section(
    honoured=_keys(
        "type trigger_word network save datasets train model sample subject_id training_seed validation captioning"
        " workers logging"
    ),
    ignored=_because(ELSEWHERE, "training_folder output_folder sqlite_db_path")
    | _because(LOGS, "performance_log_every log_dir torch_profiler name")
    | _because(MEMORY, "device dtype"),
    refused={
        "adapter": None,
        "embedding": None,
        "decorator": None,
        "slider": None,
        "guidance": None,
        "first_sample": None,
        "do_lorm": False,
        "lorm_extract_mode": "ratio",
        "lorm_extract_mode_param": 0.25,
    },
)

LOGGING = Section(
    honoured=_keys("use_wandb project_name run_name"),
    ignored=_because(LOGS, "log_every verbose use_ui_logger"),
)

SAVE = Section(
    honoured=_keys("save_every dtype max_step_saves_to_keep"),
    ignored=_because("nothing is pushed to a hub", "hf_repo_id hf_private")
    | {"save_format": "an adapter is stored as safetensors, under diffusers' and kohya's key names"},
    refused={"push_to_hub": False},
)

SAMPLE = Section(
    honoured=_keys(
        "sample_every sample_start_step width height neg seed walk_seed guidance_scale sample_steps network_multiplier"
        " format prompts samples sampler"
    ),
    ignored=_because("for video only", "fps") | _because(DEPENDENT, "adapter_conditioning_scale refiner_start_at"),
    refused={"guidance_rescale": 0.0, "extra_values": [], "num_frames": 1, "do_cfg_norm": False},
)

SAMPLE_ITEM = Section(
    honoured=_keys("prompt width height neg seed guidance_scale sample_steps network_multiplier"),
    ignored=_because("for video only", "fps") | _because(DEPENDENT, "ctrl_idx"),
    refused={
        "num_frames": 1,
        "ctrl_img": None,
        "ctrl_img_1": None,
        "ctrl_img_2": None,
        "ctrl_img_3": None,
        "do_cfg_norm": False,
    },
)

NETWORK = Section(
    honoured=_keys("type rank linear alpha linear_alpha conv conv_alpha dropout network_kwargs pretrained_lora_path"),
    ignored=_because("for other network types", "lokr_full_rank lokr_factor old_lokr_format")
    | _because(DEPENDENT, "split_multistage_loras")
    | _because(MEMORY, "layer_offloading"),
    refused={
        "lorm": None,
        "transformer_only": True,
        "all_layers": False,
    },
)

LOKR_NETWORK = Section(
    honoured=NETWORK.honoured | {"lokr_full_rank", "lokr_factor"},
    ignored={key: reason for key, reason in NETWORK.ignored.items() if key not in ("lokr_full_rank", "lokr_factor")}
    | {"old_lokr_format": "the file is stored under diffusers' and kohya's key names"},
    refused=NETWORK.refused,
)

TRAIN = Section(
    honoured=_keys(
        "steps lr unet_lr optimizer optimizer_params lr_scheduler lr_scheduler_params batch_size dtype min_snr_gamma"
        " noise_offset skip_first_sample force_first_sample max_grad_norm gradient_accumulation_steps"
        " gradient_accumulation disable_sampling seed text_encoder_lr train_text_encoder timestep_type content_or_style"
        " min_denoising_steps max_denoising_steps ema_config noise_scheduler reg_weight gradient_checkpointing"
        " linear_timesteps strategy bypass_guidance_embedding"
    ),
    ignored=_because(SPEED, "xformers sdp attention_backend do_paramiter_swapping")
    | _because(SPEED, "paramiter_swapping_factor max_loss_debug show_turbo_outputs single_item_batching")
    | _because(CACHED, "unload_text_encoder cache_text_embeddings")
    | _because(DEPENDENT, "embedding_lr refiner_lr adapter_lr train_refiner next_sample_timesteps")
    | _because("for audio only", "audio_loss_multiplier")
    | _because("a validation data set is named in the process's own key 'validation'", "validation_config")
    | _because(
        DEPENDENT,
        "adapter_assist_type merge_network_on_save_strength batch_noise_correction_scale signal_amplification_strength"
        " signal_correction_noise_scale negative_prompt max_negative_prompts match_adapter_chance"
        " inverted_mask_prior_multiplier diff_output_preservation_multiplier diff_output_preservation_class"
        " blank_prompt_preservation_multiplier max_cfg_scale cfg_rescale correct_pred_norm_multiplier"
        " target_norm_std_value latent_feature_loss_weight diffusion_feature_extractor_weight guidance_loss_target"
        " do_guidance_loss_cfg_zero guidance_loss_schedule unconditional_prompt differential_guidance_scale"
        " switch_boundary_every t0_velocity_equiv_weight do_fft_velocity_equiv_weight learnable_snr_gos"
        " short_and_long_captions_encoder_split match_adapter_assist",
    ),
    refused={
        "linear_timesteps2": False,
        "num_train_timesteps": 1000,
        "train_unet": True,
        "train_turbo": False,
        "snr_gamma": None,
        "weight_jitter": 0.0,
        "merge_network_on_save": False,
        "start_step": None,
        "free_u": False,
        "adapter_assist_name_or_path": None,
        "noise_multiplier": 1.0,
        "target_noise_multiplier": 1.0,
        "random_noise_multiplier": 0.0,
        "do_signal_correction_noise": False,
        "do_batch_noise_correction": False,
        "do_signal_amplification": False,
        "random_noise_shift": 0.0,
        "img_multiplier": 1.0,
        "noisy_latent_multiplier": 1.0,
        "latent_multiplier": 1.0,
        "adaptive_scaling_factor": False,
        "prompt_dropout_prob": 0.0,
        "match_noise_norm": False,
        "short_and_long_captions": False,
        "loss_target": "noise",
        "inverted_mask_prior": False,
        "diff_output_preservation": False,
        "blank_prompt_preservation": False,
        "standardize_images": False,
        "standardize_latents": False,
        "dynamic_noise_offset": False,
        "do_cfg": False,
        "do_random_cfg": False,
        "cfg_scale": 1.0,
        "correct_pred_norm": False,
        "loss_type": "mse",
        "t0_loss_target": False,
        "do_fft_loss": False,
        "pred_scaler": 1.0,
        "prompt_saturation_chance": 0.0,
        "do_prior_divergence": False,
        "target_norm_std": None,
        "latent_feature_extractor_path": None,
        "diffusion_feature_extractor_path": None,
        "optimal_noise_pairing_samples": 1,
        "force_consistent_noise": False,
        "blended_blur_noise": False,
        "do_guidance_loss": False,
        "do_differential_guidance": False,
        "do_blank_stabilization": False,
        "max_loss": None,
    },
)

EMA = Section(
    honoured=_keys("use_ema ema_decay"),
    refused={"use_feedback": False, "param_multiplier": 1.0},
)

NETWORK_KWARGS = Section(honoured=_keys("only_if_contains ignore_if_contains"))

CAPTIONING = Section(honoured=_keys("model prompt prefix suffix max_new_tokens overwrite"))

QUANTIZE_KWARGS = Section(honoured=_keys("exclude"))

WORKERS = Section(honoured=_keys("min max"))

VALIDATION = Section(honoured=_keys("folder_path dataset_path share every patience"))

OPTIMIZER_PARAMS = Section(
    honoured=_keys("betas eps weight_decay d_coef"), refused={"amsgrad": False, "maximize": False}
)

SCHEDULER_PARAMS = Section(
    honoured=_keys("total_iters num_warmup_steps start_factor end_factor eta_min factor T_max T_0 step_size gamma"),
    refused={"last_epoch": -1},
)

QUANTIZATION = _keys("quantize quantize_te qtype qtype_te quantize_kwargs")
TEXT_ENCODERS = _keys("use_text_encoder_1 use_text_encoder_2")

MODEL = Section(
    honoured=_keys("name_or_path arch is_xl is_flux is_v3 compile block_compile") | QUANTIZATION | TEXT_ENCODERS,
    ignored=_because(
        MEMORY,
        "dtype vae_device vae_dtype te_device te_dtype low_vram text_encoder_bits"
        " split_model_over_gpus split_model_other_module_param_count_scale auto_memory"
        " layer_offloading layer_offloading_transformer_percent layer_offloading_text_encoder_percent",
    )
    | _because(SPEED, "attn_masking compile_mode compile_fullgraph compile_dynamic cache_size_limit")
    | _because(DEPENDENT, "refiner_start_at experimental_xl latent_space_version unet_sample_size"),
    refused={
        "use_flux_cfg": False,
        "is_v2": False,
        "is_pixart": False,
        "is_pixart_sigma": False,
        "is_auraflow": False,
        "is_lumina2": False,
        "is_ssd": False,
        "is_vega": False,
        "is_v_pred": False,
        "vae_path": None,
        "refiner_name_or_path": None,
        "lora_path": None,
        "assistant_lora_path": None,
        "inference_lora_path": None,
        "unconditional_lora_path": None,
        "unet_path": None,
        "ignore_if_contains": None,
        "only_if_contains": None,
        "te_name_or_path": None,
        "extras_name_or_path": None,
        "accuracy_recovery_adapter": None,
        "model_kwargs": {},
        "model_paths": {},
        "in_context": False,
    },
)

DATASET = Section(
    honoured=_keys(
        "folder_path dataset_path default_caption trigger_word caption_ext resolution buckets bucket_tolerance"
        " caption_dropout_rate flip_x flip_y num_repeats shuffle_tokens keep_tokens token_dropout_rate is_reg"
        " loss_multiplier mask_path mask_min_value invert_mask alpha_mask caption_type"
    ),
    ignored=_because(
        CACHED,
        "cache_latents cache_latents_to_disk cache_tensors_to_disk cache_clip_vision_to_disk cache_text_embeddings"
        " load_image_when_caching_latents cache_latents_num_workers",
    )
    | _because(SPEED, "num_workers prefetch_factor fast_image_size debug replay_transforms")
    | _because("for video only", "shrink_video_to_frames fps trim_auto_frame_count_tail")
    | _because("for audio only", "audio_preserve_pitch audio_normalize")
    | _because(
        DEPENDENT,
        "diff_output_preservation_class random_triggers_max num_controls_from_same_folder"
        " control_transparent_color full_size_control_images guidance_type clip_image_augmentations"
        " clip_image_shuffle_augmentations shuffle_augmentations",
    ),
    refused={
        "batch_size": None,
        "type": "image",
        "diff_output_preservation": False,
        "random_triggers": [],
        "random_scale": False,
        "random_crop": False,
        "scale": 1.0,
        "prior_reg": False,
        "network_weight": 1.0,
        "augments": [],
        "control_path": None,
        "control_from_same_folder": False,
        "control_path_1": None,
        "control_path_2": None,
        "control_path_3": None,
        "inpaint_path": None,
        "unconditional_path": None,
        "poi": None,
        "use_short_captions": False,
        "standardize_images": False,
        "augmentations": None,
        "clip_image_path": None,
        "clip_image_from_same_folder": False,
        "replacements": [],
        "extra_values": [],
        "square_crop": False,
        "num_frames": 1,
        "auto_frame_count": False,
        "controls": [],
        "do_i2v": False,
        "do_audio": False,
    },
)

GENERATE_PROCESS = Section(
    honoured=_keys("type model generate"),
    ignored=_because(ELSEWHERE, "output_folder training_folder")
    | _because(MEMORY, "device dtype")
    | _because(LOGS, "performance_log_every name")
    | {"subject_id": "names the result's folder only"},
)

GENERATE = Section(
    honoured=_keys("prompts width height neg seed guidance_scale sample_steps num_repeats ext sampler"),
    ignored={"prompt_file": "prompts are stored with each picture"}
    | _because(SPEED, "compile")
    | _because(DEPENDENT, "max_random_per_prompt max_images"),
    refused={
        "size_list": None,
        "prompt_2": None,
        "neg_2": None,
        "guidance_rescale": 0.0,
        "random_prompts": False,
        "shuffle": False,
    },
)

GENERATE_MODEL = Section(
    honoured=(MODEL.honoured - QUANTIZATION - TEXT_ENCODERS) | {"lora_path"},
    ignored={**MODEL.ignored, **dict.fromkeys(QUANTIZATION, MEMORY), **dict.fromkeys(TEXT_ENCODERS, DEPENDENT)},
    refused={key: value for key, value in MODEL.refused.items() if key != "lora_path"},
)
