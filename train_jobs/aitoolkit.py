"""ai-toolkit YAML, accepted unchanged, as a `TrainSpec`; `aitoolkit_generate.py` is its other half.

What each key does is the table in `aitoolkit_keys.py`. All problems are reported at once, each with its path in the
file. No torch here: the HTTP side imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs.aitoolkit_datasets import dataset_name, read_datasets
from train_jobs.aitoolkit_generate import parse_generate_yaml
from train_jobs.aitoolkit_samples import read_sample
from train_jobs.config_reader import ConfigReader, Ignored, ParsedConfig, check_architecture, copy_keys
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
    name, process, path = reader.process(keys.PROCESS, keys.PROCESS_TYPES, jobs=("extension", "train"))
    _train_process(reader, name, process, path, local=local)
    return reader.result(TrainSpec)


def _train_process(reader: ConfigReader, name: str, process: dict[str, Any], path: str, *, local: bool) -> None:
    reader.put("name", name, "config.name")
    trigger = process.get("trigger_word")
    copy_keys(reader, process, path, {"trigger_word": "trigger_word", "subject_id": "subject_id"})
    _network(reader, process.get("network"), f"{path}.network")
    updates_per = _train(reader, process, path)
    _save(reader, process.get("save"), f"{path}.save", updates_per)
    _model(reader, process.get("model"), f"{path}.model", local=local)
    read_datasets(reader, process.get("datasets"), f"{path}.datasets", trigger, local=local)
    train = process.get("train")
    disabled = isinstance(train, dict) and train.get("disable_sampling") is True
    read_sample(reader, process.get("sample"), f"{path}.sample", trigger, updates_per, disabled=disabled)


def _network(reader: ConfigReader, value: Any, path: str) -> None:
    if value is None:
        reader.problem(path, "is missing: only LoRA training is supported", "missing")
        return
    network = reader.section(value, path, keys.NETWORK)
    kind = network.get("type", "lora")
    if kind != "lora":
        reader.problem(f"{path}.type", "only the network type 'lora' is supported", "unsupported")
    rank_key = "rank" if "rank" in network else "linear"
    alpha_key = "linear_alpha" if "linear_alpha" in network else "alpha"
    reader.put("network.rank", network.get(rank_key, 4), f"{path}.{rank_key}")
    reader.put("network.alpha", network.get(alpha_key, 1.0), f"{path}.{alpha_key}")


def _train(reader: ConfigReader, process: dict[str, Any], path: str) -> int:
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
        },
    )
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
    optimizer = train.get("optimizer", "adamw")
    name = optimizer.lower() if isinstance(optimizer, str) else optimizer
    if not isinstance(name, str) or name not in keys.OPTIMIZERS:
        known = ", ".join(sorted(keys.OPTIMIZERS))
        reader.problem(f"{path}.optimizer", f"this optimizer is not supported here; supported: {known}", "unsupported")
    elif name == "adamw8bit":
        reader.warn(f"{path}.optimizer", "is run as adamw with full-precision state")
    at = f"{path}.optimizer_params"
    params = reader.section(train.get("optimizer_params"), at, keys.OPTIMIZER_PARAMS)
    copy_keys(reader, params, at, {"eps": "train.optimizer.eps", "weight_decay": "train.optimizer.weight_decay"})
    if "betas" in params:
        betas = params["betas"]
        if isinstance(betas, list) and len(betas) == 2:
            reader.put("train.optimizer.beta1", betas[0], f"{at}.betas")
            reader.put("train.optimizer.beta2", betas[1], f"{at}.betas")
        else:
            reader.problem(f"{at}.betas", "must be two numbers")


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
    if not isinstance(name, str) or name not in keys.SCHEDULERS:
        known = ", ".join(sorted(keys.SCHEDULERS))
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
    copy_keys(
        reader, params, params_at, {"eta_min": "train.schedule.min_learning_rate", "factor": "train.schedule.factor"}
    )
    for key in ("total_iters", "T_max"):
        if key in params:
            total = reader.count(params[key], f"{params_at}.{key}")
            reader.put("train.schedule.total_steps", -(-total // updates_per), f"{params_at}.{key}")


def _save(reader: ConfigReader, value: Any, path: str, updates_per: int) -> None:
    save = reader.section(value, path, keys.SAVE)
    every = reader.count(save.get("save_every", 1000), f"{path}.save_every")
    reader.put("save.every_steps", -(-every // updates_per), f"{path}.save_every")
    reader.put("save.keep", save.get("max_step_saves_to_keep", 5), f"{path}.max_step_saves_to_keep")
    dtype = reader.choice(save.get("dtype", "float16"), f"{path}.dtype", SAVE_DTYPES)
    if dtype is not None:
        reader.put("save.dtype", dtype, f"{path}.dtype")


def _model(reader: ConfigReader, value: Any, path: str, *, local: bool) -> None:
    model = reader.section(value, path, keys.MODEL)
    check_architecture(reader, model, path)
    name = model.get("name_or_path")
    at = f"{path}.name_or_path"
    if not isinstance(name, str) or not name:
        reader.problem(at, "is missing", "missing")
        return
    reason = check_model_name(name, paths_allowed=local)
    if reason is not None:
        reader.problem(at, reason)
    reader.put("model", name, at)


__all__ = [
    "Ignored",
    "ParsedConfig",
    "dataset_name",
    "parse_generate_yaml",
    "parse_train_yaml",
    "read_train",
]
