"""The optimizer and its learning rate over time, in the `train` section of an ai-toolkit config."""

from __future__ import annotations

from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader, copy_keys

PRODIGY_RATE_MIN = 0.1


def read_optimizer(reader: ConfigReader, train: dict[str, Any], path: str) -> None:
    written = train.get("optimizer", "adamw")
    name = reader.choice(written, f"{path}.optimizer", values.OPTIMIZERS)
    if name is not None:
        reader.put("train.optimizer.type", name, f"{path}.optimizer")
        for key, default in values.OPTIMIZER_DEFAULTS[name].items():
            reader.put(f"train.optimizer.{key}", default, f"{path}.optimizer")
    if isinstance(written, str) and written.lower().endswith("8bit"):
        told = "is run with 8-bit state where there is a GPU and bitsandbytes, else with full-precision state"
        reader.warn(f"{path}.optimizer", told if name == "adamw8bit" else "is run with full-precision state")
    rate = train.get("unet_lr", train.get("lr", 1e-6))
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


def read_schedule(reader: ConfigReader, train: dict[str, Any], path: str, updates_per: int) -> None:
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
