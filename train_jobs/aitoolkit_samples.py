"""The `sample` section of an ai-toolkit config, and prompts with flags in them."""

from __future__ import annotations

import re
from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.config_reader import ConfigReader, copy_keys

IMAGE_FORMATS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
PROMPT_FLAGS = {
    "n": ("negative_prompt", str),
    "w": ("width_px", int),
    "h": ("height_px", int),
    "d": ("seed", int),
    "seed": ("seed", int),
    "l": ("guidance_scale", float),
    "cfg": ("guidance_scale", float),
    "s": ("steps", int),
    "steps": ("steps", int),
    "m": ("lora_scale", float),
    "network_multiplier": ("lora_scale", float),
}


def read_sample(
    reader: ConfigReader, value: Any, path: str, trigger: Any, updates_per: int, *, disabled: bool, family: str | None
) -> None:
    sample = reader.section(value, path, keys.SAMPLE)
    every = reader.count(sample.get("sample_every", 100), f"{path}.sample_every")
    reader.put("sample.every_steps", -(-every // updates_per), f"{path}.sample_every")
    if "sample_start_step" in sample:
        start = sample["sample_start_step"]
        scaled = start // updates_per if isinstance(start, int) and not isinstance(start, bool) else start
        reader.put("sample.start_step", scaled, f"{path}.sample_start_step")
    copy_keys(reader, sample, path, {"walk_seed": "sample.walk_seed"} | _prefixed("sample."))
    reader.put("sample.seed", _seed(reader, sample.get("seed", 0), f"{path}.seed"), f"{path}.seed")
    read_sampler(reader, sample, path, "sample.scheduler", family)
    if "neg" in sample:
        reader.put("sample.negative_prompt", sample["neg"] or "", f"{path}.neg")
    picture_format = reader.choice(sample.get("format", "jpg"), f"{path}.format", IMAGE_FORMATS)
    if picture_format is not None:
        reader.put("sample.format", picture_format, f"{path}.format")
    previews = _previews(reader, sample, path, trigger)
    reader.values.setdefault("sample", {})["previews"] = [] if disabled else previews


def read_sampler(
    reader: ConfigReader, section: dict[str, Any], path: str, target: str, family: str | None = None
) -> None:
    """`family`: what the file takes its model for, where it says so."""
    if "sampler" not in section:
        return
    at = f"{path}.sampler"
    scheduler = reader.choice(section["sampler"], at, values.SAMPLERS)
    if scheduler is None:
        return
    is_flow = family in values.FLOW_FAMILIES
    if family is not None and is_flow != (scheduler == "flowmatch"):
        if not is_flow:
            reader.problem(at, "is for flow-matching models only", "unsupported")
        else:
            reader.warn(at, "is for other models; this one's own sampler is used")
        return
    reader.put(target, scheduler, at)


def _prefixed(prefix: str) -> dict[str, str]:
    return {
        "width": f"{prefix}width_px",
        "height": f"{prefix}height_px",
        "guidance_scale": f"{prefix}guidance_scale",
        "sample_steps": f"{prefix}steps",
        "network_multiplier": f"{prefix}lora_scale",
    }


def _seed(reader: ConfigReader, value: Any, path: str) -> Any:
    if value == -1:
        reader.warn(path, "random preview seeds are not supported; 42 is used")
        return 42
    return value


def _previews(reader: ConfigReader, sample: dict[str, Any], path: str, trigger: Any) -> list[dict[str, Any]]:
    key = "samples" if sample.get("samples") else "prompts"
    items = sample.get(key, [])
    if not isinstance(items, list):
        reader.problem(f"{path}.{key}", "must be a list")
        return []
    previews: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        at = f"{path}.{key}[{index}]"
        preview = _preview(reader, {"prompt": item} if key == "prompts" else item, at, trigger)
        if preview is not None:
            for name in preview:
                reader.origin[f"sample.previews.{len(previews)}.{name}"] = at
            previews.append(preview)
    reader.origin["sample.previews"] = f"{path}.{key}"
    return previews


def _preview(reader: ConfigReader, value: Any, path: str, trigger: Any) -> dict[str, Any] | None:
    item = reader.section(value, path, keys.SAMPLE_ITEM)
    prompt = item.get("prompt")
    if not isinstance(prompt, str):
        reader.problem(path, "the prompt must be text")
        return None
    word = trigger if isinstance(trigger, str) else ""
    preview: dict[str, Any] = {target: item[key] for key, target in _prefixed("").items() if key in item}
    if "seed" in item:
        preview["seed"] = _seed(reader, item["seed"], f"{path}.seed")
    if "neg" in item:
        preview["negative_prompt"] = item["neg"] or ""
    text, flags = prompt_flags(reader, prompt.replace("[trigger]", word), path)
    return preview | flags | {"prompt": text}


def prompt_flags(reader: ConfigReader, prompt: str, path: str) -> tuple[str, dict[str, Any]]:
    """sd-scripts flags after the prompt: `a cat --w 512 --n blurry`. An unknown flag is a problem."""
    text, *parts = re.split(r"(?:^|\s)--(?=[A-Za-z0-9_]+(?:\s|$))", prompt)
    flags: dict[str, Any] = {}
    for part in parts:
        name, _, content = part.partition(" ")
        if name not in PROMPT_FLAGS:
            reader.problem(path, f"the prompt flag '--{name[:40]}' is not supported here", "unsupported")
            continue
        target, kind = PROMPT_FLAGS[name]
        try:
            flags[target] = kind(content.strip())
        except ValueError:
            reader.problem(path, f"the prompt flag '--{name}' needs a number")
    return text.strip(), flags
