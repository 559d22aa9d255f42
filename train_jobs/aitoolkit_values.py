"""What the values in an ai-toolkit config are called here: plain data. A value that is not listed is not supported.

Names: ostris/ai-toolkit, August 2026.
"""

from __future__ import annotations

PROCESS_TYPES = frozenset(["sd_trainer", "diffusion_trainer", "ui_trainer"])
GENERATE_TYPES = frozenset(["to_folder"])
ARCHITECTURES = {
    "sd": "sd1",
    "sd1": "sd1",
    "sd15": "sd1",
    "sd1.5": "sd1",
    "stable_diffusion": "sd1",
    "sdxl": "sdxl",
    "xl": "sdxl",
    "sd3": "sd3",
    "sd35": "sd3",
    "flux": "flux1",
    "flex1": "flux1",
    "flux1": "flux1",
    "flux_schnell": "flux1",
    "flux2": "flux2_dev",
    "flux2_klein_4b": "flux2_klein",
    "flux2_klein_9b": "flux2_klein",
    "qwen_image": "qwen_image",
    "zimage": "z_image",
    "z_image": "z_image",
}
"""ai-toolkit's architectures (`ModelConfig.arch`, without the tag after a colon) by the names of the families here."""
ARCHITECTURE_FLAGS = {"is_xl": "sdxl", "is_v3": "sd3", "is_flux": "flux1"}
FLOW_FAMILIES = frozenset({"sd3", "flux1", "flux2_klein", "flux2_dev", "qwen_image", "z_image"})
OPTIMIZERS = {
    "adam": "adam",
    "adam8bit": "adam",
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "prodigyopt": "prodigy",
    "lion": "lion",
    "lion8bit": "lion",
}
OPTIMIZER_DEFAULTS: dict[str, dict[str, float]] = {
    "adam": {"eps": 1e-6, "weight_decay": 0.0},
    "adamw": {"eps": 1e-6, "weight_decay": 0.01},
    "adamw8bit": {"eps": 1e-6, "weight_decay": 0.01},
    "adafactor": {"weight_decay": 0.0},
    "prodigy": {"eps": 1e-6, "weight_decay": 0.0},
    "lion": {"beta2": 0.99, "weight_decay": 0.0},
}
"""What ai-toolkit's `toolkit/optimizer.py` and the packages behind it take where a file says nothing, by the name here.
Betas are 0.9 and 0.999 unless they are listed."""
QTYPES = {
    "qfloat8": "float8",
    "float8": "float8",
    "qint8": "int8",
    "int8": "int8",
    "uint8": "int8",
    "qint4": "int4",
    "int4": "int4",
    "uint4": "int4",
}
"""ai-toolkit's names (`toolkit/util/quantize.py`) by what torchao has here."""
SCHEDULERS = frozenset(["constant", "cosine", "linear", "constant_with_warmup", "cosine_with_restarts", "step"])
TIMESTEP_TYPES = {
    "sigmoid": "sigmoid",
    "linear": "linear",
    "weighted": "linear",
    "shift": "shift",
    "flux_shift": "shift",
    "lumina2_shift": "shift",
}
LOSS_WEIGHTINGS = {"weighted": "measured"}
"""Timestep types that are even over the noise levels and weigh the loss instead."""
BIASES = {"balanced": "balanced", "content": "content", "style": "style"}
NOISE_SCHEDULERS = {"ddpm": "discrete", "flowmatch": "flow"}
SAMPLERS = {
    "ddim": "ddim",
    "ddpm": "ddpm",
    "dpmsolver": "dpmsolver_multistep",
    "dpmsolver++": "dpm++",
    "euler": "euler",
    "flowmatch": "flowmatch",
    "euler_a": "euler_a",
    "heun": "heun",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "pndm": "pndm",
    "unipc": "unipc",
}
"""ai-toolkit's sampler names (`toolkit/sampler.py`) by the engine's scheduler names."""
