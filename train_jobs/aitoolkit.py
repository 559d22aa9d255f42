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
from train_jobs.aitoolkit_network import read_network
from train_jobs.aitoolkit_optimizer import read_optimizer, read_schedule
from train_jobs.aitoolkit_quantization import read_quantization
from train_jobs.aitoolkit_samples import read_sample
from train_jobs.aitoolkit_timesteps import read_timesteps
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
    family = _model(reader, process.get("model"), f"{path}.model", local=local)
    read_network(reader, process.get("network"), f"{path}.network", family)
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


def _train(reader: ConfigReader, process: dict[str, Any], path: str, family: str | None) -> int:
    """The `train` section. Returns how many of the file's steps make one optimizer update."""
    at = f"{path}.train"
    train = reader.section(process.get("train"), at, keys.TRAIN)
    lr_key = "unet_lr" if "unet_lr" in train else "lr"
    reader.put("train.learning_rate", train.get(lr_key, 1e-6), f"{at}.{lr_key}")
    reader.put("train.gradient_checkpointing", True, f"{at}.gradient_checkpointing")
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
    read_timesteps(reader, train, at, family)
    for key in ("unet_lr", "text_encoder_lr"):
        if train.get(key, train.get("lr")) != train.get("lr"):
            reader.warn(f"{at}.{key}", "is honoured here; ai-toolkit trains all of an adapter at 'lr'")
    _guidance(reader, train, at, family)
    _average(reader, train.get("ema_config"), f"{at}.ema_config")
    if "training_seed" in process:
        reader.put("train.seed", process["training_seed"], f"{path}.training_seed")
    _dtype(reader, train.get("dtype", "fp32"), f"{at}.dtype")
    read_optimizer(reader, train, at)
    _preview_switches(reader, train, at)
    updates_per = _accumulation(reader, train, at)
    steps = reader.count(train.get("steps", 1000), f"{at}.steps")
    reader.put("train.steps", -(-steps // updates_per), f"{at}.steps")
    read_schedule(reader, train, at, updates_per)
    return updates_per


def _guidance(reader: ConfigReader, train: dict[str, Any], path: str, family: str | None) -> None:
    """Only FLUX.1's guidance is left out in ai-toolkit, whatever the file says of other models."""
    at = f"{path}.bypass_guidance_embedding"
    if "bypass_guidance_embedding" not in train or not reader.flag(train["bypass_guidance_embedding"], at):
        return
    if family == "flux1":
        reader.put("train.bypass_guidance_embedding", True, at)
    else:
        reader.warn(at, "has no effect on this model: it is for FLUX.1")


def _dtype(reader: ConfigReader, value: Any, path: str) -> None:
    dtype = reader.choice(value, path, DTYPES)
    if dtype is not None:
        reader.put("train.dtype", dtype, path)
        if isinstance(value, str) and SAVE_DTYPES[value.lower()] == "fp16":
            reader.warn(path, "is trained as bf16: the same memory, and no loss scaling is needed")


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
    encoders = [
        n for n in (1, 2) if reader.flag(model.get(f"use_text_encoder_{n}", True), f"{path}.use_text_encoder_{n}")
    ]
    reader.put("train.trained_text_encoders", encoders, f"{path}.use_text_encoder_1")
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
