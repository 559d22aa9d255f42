"""An ai-toolkit generate config as a `GenerateSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.aitoolkit_samples import IMAGE_FORMATS, prompt_flags, read_sampler
from train_jobs.config_reader import ConfigReader, ParsedConfig, copy_keys, read_architecture
from train_jobs.generate_spec import GenerateSpec
from train_jobs.strict_yaml import read_mapping


def parse_generate_yaml(config: str | bytes | Mapping[str, Any]) -> ParsedConfig[GenerateSpec]:
    """Read a generate config. Raises ConfigInvalid, and nothing else, with every problem found."""
    reader = ConfigReader(read_mapping(config))
    _, process, path = reader.process(keys.GENERATE_PROCESS, values.GENERATE_TYPES, jobs=("generate",))
    _generate_process(reader, process, path)
    return reader.result(GenerateSpec)


def _generate_process(reader: ConfigReader, process: dict[str, Any], path: str) -> None:
    reader.place(f"{path}.generate", {})
    _generate_model(reader, process.get("model"), f"{path}.model")
    at = f"{path}.generate"
    generate = reader.section(process.get("generate"), at, keys.GENERATE)
    prompts = generate.get("prompts")
    if isinstance(prompts, str):
        reader.problem(f"{at}.prompts", "must be a list; a file of prompts on the server is not read", "not_allowed")
        prompts = []
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        reader.problem(f"{at}.prompts", "must be a list of texts", "missing")
        prompts = []
    texts = []
    for index, prompt in enumerate(prompts):
        text, flags = prompt_flags(reader, prompt.replace("[trigger]", ""), f"{at}.prompts[{index}]")
        texts.append(text)
        if flags:
            reader.problem(f"{at}.prompts[{index}]", "flags inside a prompt are not supported here", "unsupported")
    reader.put("prompts", texts, f"{at}.prompts")
    copy_keys(
        reader,
        generate,
        at,
        {"width": "width", "height": "height", "guidance_scale": "guidance_scale", "num_repeats": "num_images"},
    )
    reader.put("num_inference_steps", generate.get("sample_steps", 20), f"{at}.sample_steps")
    reader.values.setdefault("guidance_scale", 7.0)
    reader.put("negative_prompt", generate.get("neg") or "", f"{at}.neg")
    if generate.get("seed", -1) != -1:
        reader.put("seed", generate["seed"], f"{at}.seed")
    read_sampler(reader, generate, at, "scheduler")
    extension = generate.get("ext", "png")
    chosen = reader.choice(
        extension.lstrip(".") if isinstance(extension, str) else extension, f"{at}.ext", IMAGE_FORMATS
    )
    if chosen is not None:
        reader.put("output_format", chosen, f"{at}.ext")


def _generate_model(reader: ConfigReader, value: Any, path: str) -> None:
    model = reader.section(value, path, keys.GENERATE_MODEL)
    read_architecture(reader, model, path)
    if "name_or_path" in model:
        reader.put("model", model["name_or_path"], f"{path}.name_or_path")
    lora = model.get("lora_path")
    if isinstance(lora, str) and lora.strip():
        name = PurePosixPath(lora.replace("\\", "/")).name.removesuffix(".safetensors")
        reader.values["loras"] = [{"id": name}]
        reader.origin["loras"] = f"{path}.lora_path"
    elif lora is not None and not isinstance(lora, str):
        reader.problem(f"{path}.lora_path", "must be text")
