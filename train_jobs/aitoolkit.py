"""ai-toolkit YAML, accepted unchanged, as a `TrainSpec`; `aitoolkit_generate.py` is its other half.

What each key does is the table in `aitoolkit_keys.py`, what values are called here that of `aitoolkit_values.py`. All
problems are reported at once, each with its path in the file. No torch here: the HTTP side imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.aitoolkit_datasets import dataset_name, read_datasets
from train_jobs.aitoolkit_generate import parse_generate_yaml
from train_jobs.aitoolkit_quantization import read_quantization
from train_jobs.aitoolkit_samples import read_sample
from train_jobs.config_reader import ConfigReader, Ignored, ParsedConfig, copy_keys, read_architecture
from train_jobs.spec import TrainSpec, check_model_name
from train_jobs.strict_yaml import read_mapping

DTYPES = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "bf16",
    "float16": "bf16",
    "half": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}
NETWORK_TYPES = ("lora", "locon", "dora", "lokr", "loha")
PLACES = {
    "network": "network",
    "model": "model.name_or_path",
    "quantize": "model",
    "train": "train",
    "save": "save",
    "sample": "sample",
    "datasets": "datasets",
    "validation": "validation",
    "captioning": "captioning",
    "workers": "workers",
    "wandb": "logging",
}
PRODIGY_RATE_MIN = 0.1
SAVE_DTYPES = DTYPES | {"fp16": "fp16", "float16": "fp16", "half": "fp16"}


def parse_train_yaml(
    config: str | bytes | Mapping[str, Any], *, datasets_are_local: bool = False
) -> ParsedConfig[TrainSpec]:
    """Read a training config. Raises ConfigInvalid, and nothing else, with every problem found.

    Over HTTP a `folder_path` names an uploaded dataset by its last segment and a model by alias or Hugging Face id.
    `datasets_are_local` is for the command line: folders and models may then be paths on this machine.
    """
    return read_train(ConfigReader(read_mapping(config)), local=datasets_are_local)


def read_train(reader: ConfigReader, *, local: bool) -> ParsedConfig[TrainSpec]:
    """The file in `reader`, which afterwards tells what each key was. Raises ConfigInvalid."""
    name, process, path = reader.process(keys.PROCESS, values.PROCESS_TYPES, jobs=("extension", "train"))
    _train_process(reader, name, process, path, local=local)
    return reader.result(TrainSpec)


def _train_process(reader: ConfigReader, name: str, process: dict[str, Any], path: str, *, local: bool) -> None:
    reader.place(path, PLACES)
    reader.put("name", name, "config.name")
    trigger = process.get("trigger_word")
    copy_keys(reader, process, path, {"trigger_word": "trigger_word", "subject_id": "subject_id"})
    _network(reader, process.get("network"), f"{path}.network")
    family = _model(reader, process.get("model"), f"{path}.model", local=local)
    updates_per = _train(reader, process, path, family)
    _save(reader, process.get("save"), f"{path}.save", updates_per)
    _validation(reader, process.get("validation"), f"{path}.validation", updates_per, local=local)
    _captioning(reader, process.get("captioning"), f"{path}.captioning", local=local)
    _workers(reader, process.get("workers"), f"{path}.workers")
    _logging(reader, process.get("logging"), f"{path}.logging")
    read_datasets(reader, process.get("datasets"), f"{path}.datasets", trigger, local=local)
    train = process.get("train")
    disabled = isinstance(train, dict) and train.get("disable_sampling") is True
    read_sample(reader, process.get("sample"), f"{path}.sample", trigger, updates_per, disabled=disabled, family=family)


def _network(reader: ConfigReader, value: Any, path: str) -> None:
    if value is None:
        reader.problem(path, "is missing: only LoRA training is supported", "missing")
        return
    kind = value.get("type", "lora") if isinstance(value, dict) else "lora"
    network = reader.section(value, path, keys.LOKR_NETWORK if kind == "lokr" else keys.NETWORK)
    if kind not in NETWORK_TYPES:
        reader.problem(
            f"{path}.type", f"only the network types {', '.join(NETWORK_TYPES)} are supported", "unsupported"
        )
    elif kind not in ("lora", "locon"):
        reader.put("network.type", kind, f"{path}.type")
    rank_key = "rank" if "rank" in network else "linear"
    alpha_key = "linear_alpha" if "linear_alpha" in network else "alpha"
    reader.put("network.rank", network.get(rank_key, 4), f"{path}.{rank_key}")
    reader.put("network.alpha", network.get(alpha_key, 1.0), f"{path}.{alpha_key}")
    names = {
        "conv": "conv_rank",
        "dropout": "dropout",
        "lokr_full_rank": "lokr_full_rank",
        "lokr_factor": "lokr_factor",
    }
    if kind in ("lokr", "loha") and network.get("dropout"):
        del names["dropout"]
        reader.warn(f"{path}.dropout", f"has no effect on {kind}")
    copy_keys(reader, network, path, {key: f"network.{target}" for key, target in names.items()})
    if "conv" in network:
        reader.put("network.conv_alpha", network.get("conv_alpha", network["conv"]), f"{path}.conv_alpha")
    if network.get("pretrained_lora_path"):
        reader.put("network.pretrained", network["pretrained_lora_path"], f"{path}.pretrained_lora_path")
    at = f"{path}.network_kwargs"
    filters = reader.section(network.get("network_kwargs"), at, keys.NETWORK_KWARGS)
    for key, value in filters.items():
        reader.put(f"network.{key}", [value] if isinstance(value, str) else value, f"{at}.{key}")


def _train(reader: ConfigReader, process: dict[str, Any], path: str, family: str | None) -> int:
    """The `train` section. Returns how many of the file's steps make one optimizer update."""
    at = f"{path}.train"
    train = reader.section(process.get("train"), at, keys.TRAIN)
    lr_key = "unet_lr" if "unet_lr" in train else "lr"
    reader.put("train.learning_rate", train.get(lr_key, 1e-6), f"{at}.{lr_key}")
    copy_keys(
        reader,
        train,
        at,
        {
            "batch_size": "train.batch_size",
            "max_grad_norm": "train.max_grad_norm",
            "min_snr_gamma": "train.min_snr_gamma",
            "noise_offset": "train.noise_offset",
            "seed": "train.seed",
            "train_text_encoder": "train.train_text_encoder",
            "reg_weight": "train.regularisation_weight",
            "gradient_checkpointing": "train.gradient_checkpointing",
            "strategy": "train.strategy",
        },
    )
    if train.get("train_text_encoder") and "text_encoder_lr" in train:
        reader.put("train.text_encoder_learning_rate", train["text_encoder_lr"], f"{at}.text_encoder_lr")
    _timesteps(reader, train, at, family)
    _average(reader, train.get("ema_config"), f"{at}.ema_config")
    if "training_seed" in process:
        reader.put("train.seed", process["training_seed"], f"{path}.training_seed")
    _dtype(reader, train.get("dtype", "fp32"), f"{at}.dtype")
    _optimizer(reader, train, at)
    _preview_switches(reader, train, at)
    updates_per = _accumulation(reader, train, at)
    steps = reader.count(train.get("steps", 1000), f"{at}.steps")
    reader.put("train.steps", -(-steps // updates_per), f"{at}.steps")
    _schedule(reader, train, at, updates_per)
    return updates_per


def _dtype(reader: ConfigReader, value: Any, path: str) -> None:
    dtype = reader.choice(value, path, DTYPES)
    if dtype is not None:
        reader.put("train.dtype", dtype, path)
        if isinstance(value, str) and SAVE_DTYPES[value.lower()] == "fp16":
            reader.warn(path, "is trained as bf16: the same memory, and no loss scaling is needed")


def _optimizer(reader: ConfigReader, train: dict[str, Any], path: str) -> None:
    written = train.get("optimizer", "adamw")
    name = reader.choice(written, f"{path}.optimizer", values.OPTIMIZERS)
    if name is not None:
        reader.put("train.optimizer.type", name, f"{path}.optimizer")
    if isinstance(written, str) and written.lower().endswith("8bit"):
        told = "is run with 8-bit state where there is a GPU and bitsandbytes, else with full-precision state"
        reader.warn(f"{path}.optimizer", told if name == "adamw8bit" else "is run with full-precision state")
    rate = train.get("unet_lr", train.get("lr"))
    if name == "prodigy" and isinstance(rate, int | float) and rate < PRODIGY_RATE_MIN:
        # Prodigy finds the rate and takes this one as a factor; ai-toolkit reads small ones as 1 too.
        reader.put("train.learning_rate", 1.0, f"{path}.lr")
        reader.warn(f"{path}.lr", "is taken as 1 for Prodigy, which finds the rate by itself")
    at = f"{path}.optimizer_params"
    params = reader.section(train.get("optimizer_params"), at, keys.OPTIMIZER_PARAMS)
    copy_keys(reader, params, at, {key: f"train.optimizer.{key}" for key in ("eps", "weight_decay", "d_coef")})
    if "betas" in params:
        betas = params["betas"]
        if isinstance(betas, list) and len(betas) == 2:
            reader.put("train.optimizer.beta1", betas[0], f"{at}.betas")
            reader.put("train.optimizer.beta2", betas[1], f"{at}.betas")
        else:
            reader.problem(f"{at}.betas", "must be two numbers")


def _timesteps(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> None:
    kind = reader.choice(train.get("timestep_type", "sigmoid"), f"{path}.timestep_type", values.TIMESTEP_TYPES)
    if "linear_timesteps" in train and reader.flag(train["linear_timesteps"], f"{path}.linear_timesteps"):
        kind = "linear"
    if kind is not None:
        reader.put("train.timesteps.kind", kind, f"{path}.timestep_type")
    bias = reader.choice(train.get("content_or_style", "balanced"), f"{path}.content_or_style", values.BIASES)
    if bias is not None:
        reader.put("train.timesteps.bias", bias, f"{path}.content_or_style")
    for key, target in {"min_denoising_steps": "first", "max_denoising_steps": "last"}.items():
        if key in train:
            value = train[key]
            # 1000 is a usual way to write "to the end".
            reader.put(f"train.timesteps.{target}", 999 if value == 1000 else value, f"{path}.{key}")
    at = f"{path}.noise_scheduler"
    noise = reader.choice(train.get("noise_scheduler", "ddpm"), at, values.NOISE_SCHEDULERS)
    if "noise_scheduler" in train and family is not None and (noise == "flow") != (family in values.FLOW_FAMILIES):
        reader.warn(at, "is for other models; this one is trained with its own noise")


def _average(reader: ConfigReader, value: Any, path: str) -> None:
    average = reader.section(value, path, keys.EMA)
    if "use_ema" in average and reader.flag(average["use_ema"], f"{path}.use_ema"):
        reader.put("train.ema_decay", average.get("ema_decay", 0.999), f"{path}.ema_decay")


def _validation(reader: ConfigReader, value: Any, path: str, updates_per: int, *, local: bool) -> None:
    """A key of our own: a data set, or a share of the training pictures, whose loss is watched."""
    if value is None:
        return
    validation = reader.section(value, path, keys.VALIDATION)
    every = reader.count(validation.get("every", 100), f"{path}.every")
    reader.put("validation.every_steps", -(-every // updates_per), f"{path}.every")
    copy_keys(reader, validation, path, {"share": "validation.share", "patience": "validation.patience"})
    key = "folder_path" if "folder_path" in validation else "dataset_path"
    if validation.get(key) is not None:
        named = {"local_path" if local else "dataset": _named_folder(validation[key], local)}
        reader.put("validation.dataset", named, f"{path}.{key}")


def _captioning(reader: ConfigReader, value: Any, path: str, *, local: bool) -> None:
    """A key of our own: a model that writes the captions that are missing."""
    if value is None:
        return
    captioning = reader.section(value, path, keys.CAPTIONING)
    model = captioning.get("model")
    reason = check_model_name(model, paths_allowed=local) if isinstance(model, str) else "is missing"
    if reason is not None:
        reader.problem(f"{path}.model", reason)
    reader.origin["captioning.model"] = f"{path}.model"
    copy_keys(reader, captioning, path, {key: f"captioning.{key}" for key in sorted(captioning)})


def _workers(reader: ConfigReader, value: Any, path: str) -> None:
    """A key of our own: a number, or the fewest and the most that train together."""
    if isinstance(value, dict):
        workers = reader.section(value, path, keys.WORKERS)
        copy_keys(reader, workers, path, {"min": "workers.min", "max": "workers.max"})
    elif value is not None:
        count = reader.count(value, path)
        reader.put("workers", {"min": count, "max": count}, path)


def _logging(reader: ConfigReader, value: Any, path: str) -> None:
    """Names without the switch ask for nothing."""
    logging = reader.section(value, path, keys.LOGGING)
    if reader.flag(logging.get("use_wandb", False), f"{path}.use_wandb"):
        reader.put("wandb.project", logging.get("project_name", "ai-toolkit"), f"{path}.project_name")
        copy_keys(reader, logging, path, {"run_name": "wandb.run"})


def _named_folder(folder: Any, local: bool) -> Any:
    return folder if local or not isinstance(folder, str) else dataset_name(folder) or ""


def _preview_switches(reader: ConfigReader, train: dict[str, Any], path: str) -> None:
    skip = reader.flag(train.get("skip_first_sample", False), f"{path}.skip_first_sample")
    force = reader.flag(train.get("force_first_sample", False), f"{path}.force_first_sample")
    reader.put("sample.at_start", force or not skip, f"{path}.skip_first_sample")
    reader.flag(train.get("disable_sampling", False), f"{path}.disable_sampling")


def _accumulation(reader: ConfigReader, train: dict[str, Any], path: str) -> int:
    """ai-toolkit has two: `gradient_accumulation` is inside a step, `gradient_accumulation_steps` counts steps."""
    inside = reader.count(train.get("gradient_accumulation", 1), f"{path}.gradient_accumulation")
    across_at = f"{path}.gradient_accumulation_steps"
    across = reader.count(train.get("gradient_accumulation_steps", 1), across_at)
    if inside > 1 and across > 1:
        reader.problem(across_at, "give either this or 'gradient_accumulation'", "conflict")
        return 1
    if across > 1:
        reader.warn(across_at, f"one optimizer update takes {across} of this file's steps; progress counts updates")
    at = across_at if across > 1 else f"{path}.gradient_accumulation"
    reader.put("train.gradient_accumulation", max(inside, across), at)
    return across


def _schedule(reader: ConfigReader, train: dict[str, Any], path: str, updates_per: int) -> None:
    at = f"{path}.lr_scheduler"
    name = train.get("lr_scheduler", "constant")
    if not isinstance(name, str) or name not in values.SCHEDULERS:
        known = ", ".join(sorted(values.SCHEDULERS))
        reader.problem(at, f"this schedule is not supported here; supported: {known}", "unsupported")
        return
    reader.put("train.schedule.type", name, at)
    params_at = f"{path}.lr_scheduler_params"
    params = reader.section(train.get("lr_scheduler_params"), params_at, keys.SCHEDULER_PARAMS)
    if name == "linear":
        # torch's LinearLR, which ai-toolkit uses, rises from a third of the rate unless told otherwise.
        reader.put("train.schedule.start_factor", params.get("start_factor", 1 / 3), f"{params_at}.start_factor")
        reader.put("train.schedule.end_factor", params.get("end_factor", 1.0), f"{params_at}.end_factor")
    if name == "constant_with_warmup":
        warmup = reader.count(params.get("num_warmup_steps", 1000), f"{params_at}.num_warmup_steps")
        reader.put("train.schedule.warmup_steps", -(-warmup // updates_per), f"{params_at}.num_warmup_steps")
    names = {"eta_min": "min_learning_rate", "factor": "factor", "gamma": "gamma"}
    copy_keys(reader, params, params_at, {key: f"train.schedule.{target}" for key, target in names.items()})
    for key, target in {"total_iters": "total_steps", "T_max": "total_steps", "T_0": "total_steps",
                        "step_size": "step_size"}.items():  # fmt: skip
        if key in params:
            total = reader.count(params[key], f"{params_at}.{key}")
            reader.put(f"train.schedule.{target}", -(-total // updates_per), f"{params_at}.{key}")


def _save(reader: ConfigReader, value: Any, path: str, updates_per: int) -> None:
    save = reader.section(value, path, keys.SAVE)
    every = reader.count(save.get("save_every", 1000), f"{path}.save_every")
    reader.put("save.every_steps", -(-every // updates_per), f"{path}.save_every")
    reader.put("save.keep", save.get("max_step_saves_to_keep", 5), f"{path}.max_step_saves_to_keep")
    dtype = reader.choice(save.get("dtype", "float16"), f"{path}.dtype", SAVE_DTYPES)
    if dtype is not None:
        reader.put("save.dtype", dtype, f"{path}.dtype")


def _model(reader: ConfigReader, value: Any, path: str, *, local: bool) -> str | None:
    """The `model` section. Returns the family that the file's author takes it for."""
    model = reader.section(value, path, keys.MODEL)
    family = read_architecture(reader, model, path)
    if family is not None:
        reader.put("family", family, f"{path}.arch")
    flags = [reader.flag(model[key], f"{path}.{key}") for key in ("compile", "block_compile") if key in model]
    if flags:
        reader.put("train.compile", any(flags), f"{path}.compile")
    read_quantization(reader, model, path)
    name = model.get("name_or_path")
    at = f"{path}.name_or_path"
    if not isinstance(name, str) or not name:
        reader.problem(at, "is missing", "missing")
        return family
    reason = check_model_name(name, paths_allowed=local)
    if reason is not None:
        reader.problem(at, reason)
    reader.put("model", name, at)
    return family


__all__ = [
    "Ignored",
    "ParsedConfig",
    "dataset_name",
    "parse_generate_yaml",
    "parse_train_yaml",
    "read_train",
]
