"""ai-toolkit YAML, accepted unchanged, as a `TrainSpec` or a `GenerateSpec`.

What each key does is the table in `aitoolkit_keys.py`. All problems are reported at once, each with its path in the
file. No torch here: the HTTP side imports this module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from train_jobs import aitoolkit_keys as keys
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.spec import DATASET_PATTERN, GenerateSpec, TrainSpec, check_model_name, problems_of
from train_jobs.strict_yaml import read_mapping

PROBLEMS_MAX = 200
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
S = TypeVar("S", TrainSpec, GenerateSpec)


@dataclass(frozen=True)
class Ignored:
    """An accepted key that this engine has no use for, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ParsedConfig(Generic[S]):
    """`warnings` are problems that did not stop the request: unknown keys, values taken differently."""

    spec: S
    ignored: list[Ignored] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def parse_train_yaml(
    config: str | bytes | Mapping[str, Any], *, datasets_are_local: bool = False
) -> ParsedConfig[TrainSpec]:
    """Read a training config. Raises ConfigInvalid, and nothing else, with every problem found.

    Over HTTP a `folder_path` names an uploaded dataset by its last segment and a model by alias or Hugging Face id.
    `datasets_are_local` is for the command line: folders and models may then be paths on this machine.
    """
    reader = _Reader(read_mapping(config))
    name, process, path = reader.process(keys.PROCESS, keys.PROCESS_TYPES, jobs=("extension", "train"))
    _train_process(reader, name, process, path, local=datasets_are_local)
    return reader.result(TrainSpec)


def parse_generate_yaml(config: str | bytes | Mapping[str, Any]) -> ParsedConfig[GenerateSpec]:
    """Read a generate config. Raises ConfigInvalid, and nothing else, with every problem found."""
    reader = _Reader(read_mapping(config))
    _, process, path = reader.process(keys.GENERATE_PROCESS, keys.GENERATE_TYPES, jobs=("generate",))
    _generate_process(reader, process, path)
    return reader.result(GenerateSpec)


class _Reader:
    """Walks the file, gathering values for the spec, problems, warnings and ignored keys."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.ignored: list[Ignored] = []
        self.values: dict[str, Any] = {}
        self.origin: dict[str, str] = {}

    def problem(self, path: str, message: str, code: str = "invalid_value") -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(path, message, code))

    def warn(self, path: str, message: str, code: str = "taken_differently") -> None:
        if len(self.warnings) < PROBLEMS_MAX:
            self.warnings.append(Problem(path, message, code))

    def put(self, target: str, value: Any, path: str) -> None:
        """Set the spec's field `target` (dotted, with list indexes as numbers), remembering where it came from."""
        at: Any = self.values
        *parents, last = target.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
        self.origin[target] = path

    def section(self, value: Any, path: str, section: keys.Section) -> dict[str, Any]:
        """The honoured keys of one mapping that have a value; every other key is listed, warned of or refused."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(path, "must be a mapping")
            return {}
        honoured: dict[str, Any] = {}
        for key, item in value.items():
            at = f"{path}.{key[:100]}" if path else key[:100]
            if key in section.honoured:
                if item is not None:
                    honoured[key] = item
            elif key in section.ignored:
                self.ignored.append(Ignored(at, section.ignored[key]))
            elif key in section.refused:
                self._refuse_unless_default(at, key, item, section.refused[key])
            else:
                self._unknown(at, key, section)
        return honoured

    def _refuse_unless_default(self, at: str, key: str, item: Any, default: Any) -> None:
        if key == "ema_config" and isinstance(item, dict):
            self.section(item, at, keys.EMA)
        elif not _is_off(item, default):
            self.problem(at, f"'{key}' is not supported here{_unless(default)}", "unsupported")

    def _unknown(self, at: str, key: str, section: keys.Section) -> None:
        near = difflib.get_close_matches(key[:100], sorted(section.known), n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        self.warn(at, f"is not a key known here and has no effect{hint}", "unknown_key")

    def process(
        self, section: keys.Section, types: frozenset[str], *, jobs: tuple[str, ...]
    ) -> tuple[str, dict[str, Any], str]:
        """The file's outer frame: its name, the one process's honoured keys, and that process's path."""
        top = self.section(self.document, "", keys.FILE)
        if top.get("job") not in jobs:
            self.problem("job", f"must be {' or '.join(jobs)}", "missing" if "job" not in top else "unsupported")
        config = self.section(top.get("config"), "config", keys.CONFIG)
        if "config" not in top:
            self.problem("config", "is missing", "missing")
        name = self._name(config.get("name"))
        processes = config.get("process")
        if not isinstance(processes, list) or len(processes) != 1:
            self.problem("config.process", "must be a list of exactly one process")
            raise self.invalid()
        path = "config.process[0]"
        if not isinstance(processes[0], dict):
            self.problem(path, "must be a mapping")
            raise self.invalid()
        process = self.section(_named(processes[0], name), path, section)
        kind = process.get("type")
        if not isinstance(kind, str) or kind not in types:
            self.problem(f"{path}.type", f"must be {' or '.join(sorted(types))}", "unsupported")
        return name, process, path

    def _name(self, name: Any) -> str:
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).strip():
            self.problem("config.name", "is missing", "missing")
            return "unnamed"
        written = str(name)
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", written.strip())[:100].lstrip("._-")
        if not safe:
            self.problem("config.name", "must hold letters or digits")
            return "unnamed"
        if safe != written:
            self.warn("config.name", f"is stored as '{safe}'")
        return safe

    def choice(self, value: Any, path: str, choices: Mapping[str, str]) -> str | None:
        chosen = choices.get(value.lower()) if isinstance(value, str) else None
        if chosen is None:
            self.problem(path, f"must be one of {', '.join(sorted(choices))}", "unsupported")
        return chosen

    def count(self, value: Any, path: str) -> int:
        """A whole number of at least 1; another value is a problem and counts as 1."""
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value < 1:
            self.problem(path, "must be a whole number of at least 1")
            return 1
        if value > 1_000_000 or int(value) != value:
            self.problem(path, "must be a whole number of at most 1000000")
            return 1
        return int(value)

    def flag(self, value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            self.problem(path, "must be true or false")
            return False
        return value

    def invalid(self) -> ConfigInvalid:
        return ConfigInvalid(self.problems[:PROBLEMS_MAX])

    def result(self, kind: type[S]) -> ParsedConfig[S]:
        """The spec, or ConfigInvalid with the reader's and the spec's problems, by their paths in the file."""
        spec: S | None = None
        try:
            spec = kind.model_validate(self.values)
        except ValidationError as invalid:
            reported = {problem.path for problem in self.problems}
            for problem in problems_of(invalid):
                at = self._origin_of(problem.path)
                if at not in reported:
                    self.problem(at, problem.message, problem.code)
        if self.problems or spec is None:
            raise self.invalid()
        return ParsedConfig(spec, self.ignored, self.warnings)

    def _origin_of(self, spec_path: str) -> str:
        target = re.sub(r"\[(\d+)\]", r".\1", spec_path)
        while target:
            if target in self.origin:
                return self.origin[target]
            target = target.rpartition(".")[0]
        return spec_path


def _is_off(item: Any, default: Any) -> bool:
    """Whether a refused key stands at a value that asks for nothing."""
    if item is None or item == default:
        return True
    if isinstance(default, bool):
        return False
    return (default is None or isinstance(default, list | dict)) and (
        item is False or item in ("", [], {}) or (isinstance(item, dict) and not any(item.values()))
    )


def _unless(default: Any) -> str:
    return "" if default in (None, [], {}, False, True) else f" other than as {default}"


def _named(value: Any, name: str) -> Any:
    """`[name]` replaced in every string."""
    if isinstance(value, str):
        return value.replace("[name]", name)
    if isinstance(value, dict):
        return {key: _named(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item, name) for item in value]
    return value


def _copy(reader: _Reader, source: Mapping[str, Any], path: str, names: Mapping[str, str]) -> None:
    for key, target in names.items():
        if key in source:
            reader.put(target, source[key], f"{path}.{key}")


def _train_process(reader: _Reader, name: str, process: dict[str, Any], path: str, *, local: bool) -> None:
    reader.put("name", name, "config.name")
    trigger = process.get("trigger_word")
    _copy(reader, process, path, {"trigger_word": "trigger_word", "subject_id": "subject_id"})
    _network(reader, process.get("network"), f"{path}.network")
    updates_per = _train(reader, process, path)
    _save(reader, process.get("save"), f"{path}.save", updates_per)
    _model(reader, process.get("model"), f"{path}.model", local=local)
    _datasets(reader, process.get("datasets"), f"{path}.datasets", trigger, local=local)
    train = process.get("train")
    disabled = isinstance(train, dict) and train.get("disable_sampling") is True
    _sample(reader, process.get("sample"), f"{path}.sample", trigger, updates_per, disabled=disabled)


def _network(reader: _Reader, value: Any, path: str) -> None:
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


def _train(reader: _Reader, process: dict[str, Any], path: str) -> int:
    """The `train` section. Returns how many of the file's steps make one optimizer update."""
    at = f"{path}.train"
    train = reader.section(process.get("train"), at, keys.TRAIN)
    lr_key = "unet_lr" if "unet_lr" in train else "lr"
    reader.put("train.learning_rate", train.get(lr_key, 1e-6), f"{at}.{lr_key}")
    _copy(
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


def _dtype(reader: _Reader, value: Any, path: str) -> None:
    dtype = reader.choice(value, path, DTYPES)
    if dtype is not None:
        reader.put("train.dtype", dtype, path)
        if isinstance(value, str) and SAVE_DTYPES[value.lower()] == "fp16":
            reader.warn(path, "is trained as bf16: the same memory, and no loss scaling is needed")


def _optimizer(reader: _Reader, train: dict[str, Any], path: str) -> None:
    optimizer = train.get("optimizer", "adamw")
    name = optimizer.lower() if isinstance(optimizer, str) else optimizer
    if not isinstance(name, str) or name not in keys.OPTIMIZERS:
        known = ", ".join(sorted(keys.OPTIMIZERS))
        reader.problem(f"{path}.optimizer", f"this optimizer is not supported here; supported: {known}", "unsupported")
    elif name == "adamw8bit":
        reader.warn(f"{path}.optimizer", "is run as adamw with full-precision state")
    at = f"{path}.optimizer_params"
    params = reader.section(train.get("optimizer_params"), at, keys.OPTIMIZER_PARAMS)
    _copy(reader, params, at, {"eps": "train.optimizer.eps", "weight_decay": "train.optimizer.weight_decay"})
    if "betas" in params:
        betas = params["betas"]
        if isinstance(betas, list) and len(betas) == 2:
            reader.put("train.optimizer.beta1", betas[0], f"{at}.betas")
            reader.put("train.optimizer.beta2", betas[1], f"{at}.betas")
        else:
            reader.problem(f"{at}.betas", "must be two numbers")


def _preview_switches(reader: _Reader, train: dict[str, Any], path: str) -> None:
    skip = reader.flag(train.get("skip_first_sample", False), f"{path}.skip_first_sample")
    force = reader.flag(train.get("force_first_sample", False), f"{path}.force_first_sample")
    reader.put("sample.at_start", force or not skip, f"{path}.skip_first_sample")
    reader.flag(train.get("disable_sampling", False), f"{path}.disable_sampling")


def _accumulation(reader: _Reader, train: dict[str, Any], path: str) -> int:
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


def _schedule(reader: _Reader, train: dict[str, Any], path: str, updates_per: int) -> None:
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
    _copy(reader, params, params_at, {"eta_min": "train.schedule.min_learning_rate", "factor": "train.schedule.factor"})
    for key in ("total_iters", "T_max"):
        if key in params:
            total = reader.count(params[key], f"{params_at}.{key}")
            reader.put("train.schedule.total_steps", -(-total // updates_per), f"{params_at}.{key}")


def _save(reader: _Reader, value: Any, path: str, updates_per: int) -> None:
    save = reader.section(value, path, keys.SAVE)
    every = reader.count(save.get("save_every", 1000), f"{path}.save_every")
    reader.put("save.every_steps", -(-every // updates_per), f"{path}.save_every")
    reader.put("save.keep", save.get("max_step_saves_to_keep", 5), f"{path}.max_step_saves_to_keep")
    dtype = reader.choice(save.get("dtype", "float16"), f"{path}.dtype", SAVE_DTYPES)
    if dtype is not None:
        reader.put("save.dtype", dtype, f"{path}.dtype")


def _model(reader: _Reader, value: Any, path: str, *, local: bool) -> None:
    model = reader.section(value, path, keys.MODEL)
    _architecture(reader, model, path)
    name = model.get("name_or_path")
    at = f"{path}.name_or_path"
    if not isinstance(name, str) or not name:
        reader.problem(at, "is missing", "missing")
        return
    reason = check_model_name(name, paths_allowed=local)
    if reason is not None:
        reader.problem(at, reason)
    reader.put("model", name, at)


def _architecture(reader: _Reader, model: dict[str, Any], path: str) -> None:
    arch = model.get("arch", "sd1")
    if not isinstance(arch, str) or arch.lower() not in keys.ARCHITECTURES:
        known = ", ".join(sorted(keys.ARCHITECTURES))
        reader.problem(f"{path}.arch", f"models of this kind are not supported here; supported: {known}", "unsupported")


def _datasets(reader: _Reader, value: Any, path: str, trigger: Any, *, local: bool) -> None:
    if not isinstance(value, list) or not value:
        reader.problem(path, "must be a list of at least one dataset", "missing")
        return
    entries: list[dict[str, Any]] = []
    for index, item in enumerate(value[:64]):
        entries.append(_dataset(reader, item, f"{path}[{index}]", index, trigger, local=local))
    reader.values["datasets"] = entries
    reader.origin["datasets"] = path


def _dataset(reader: _Reader, value: Any, path: str, index: int, trigger: Any, *, local: bool) -> dict[str, Any]:
    dataset = reader.section(value, path, keys.DATASET)
    entry: dict[str, Any] = {}

    def put(target: str, item: Any, key: str) -> None:
        entry[target] = item
        reader.origin[f"datasets.{index}.{target}"] = f"{path}.{key}"

    reader.origin[f"datasets.{index}"] = path
    _folder(reader, dataset, path, put, local=local)
    for key, target in {
        "default_caption": "default_caption",
        "caption_dropout_rate": "caption_dropout_rate",
        "num_repeats": "repeats",
        "flip_x": "flip_x",
        "buckets": "buckets",
        "bucket_tolerance": "bucket_step_px",
    }.items():
        if key in dataset:
            put(target, dataset[key], key)
    word = dataset.get("trigger_word", trigger)
    if word:
        put("trigger_word", word, "trigger_word")
    if "caption_ext" in dataset:
        extension = dataset["caption_ext"]
        put("caption_ext", f".{extension.lstrip('.')}" if isinstance(extension, str) else extension, "caption_ext")
    resolution = dataset.get("resolution", 512)
    put("resolutions_px", resolution if isinstance(resolution, list) else [resolution], "resolution")
    return entry


def _folder(
    reader: _Reader, dataset: dict[str, Any], path: str, put: Callable[[str, Any, str], None], *, local: bool
) -> None:
    key = "folder_path" if "folder_path" in dataset else "dataset_path"
    folder = dataset.get(key)
    if not isinstance(folder, str) or not folder.strip():
        reader.problem(f"{path}.folder_path", "is missing", "missing")
        put("dataset", "unnamed", key)
    elif local:
        put("local_path", folder, key)
    else:
        name = dataset_name(folder)
        if name is None:
            reader.problem(f"{path}.{key}", "must end in the name of an uploaded dataset")
        put("dataset", name or "unnamed", key)


def dataset_name(folder_path: str) -> str | None:
    """The dataset that an old `folder_path` means: its last segment; None when that cannot be a dataset's name."""
    segments = [s for s in re.split(r"[/\\]+", folder_path.strip()) if s]
    return segments[-1] if segments and re.fullmatch(DATASET_PATTERN, segments[-1]) else None


def _sample(reader: _Reader, value: Any, path: str, trigger: Any, updates_per: int, *, disabled: bool) -> None:
    sample = reader.section(value, path, keys.SAMPLE)
    every = reader.count(sample.get("sample_every", 100), f"{path}.sample_every")
    reader.put("sample.every_steps", -(-every // updates_per), f"{path}.sample_every")
    if "sample_start_step" in sample:
        start = sample["sample_start_step"]
        scaled = start // updates_per if isinstance(start, int) and not isinstance(start, bool) else start
        reader.put("sample.start_step", scaled, f"{path}.sample_start_step")
    _copy(reader, sample, path, {"walk_seed": "sample.walk_seed"} | _prefixed("sample."))
    reader.put("sample.seed", _seed(reader, sample.get("seed", 0), f"{path}.seed"), f"{path}.seed")
    _sampler(reader, sample, path, "sample.scheduler")
    if "neg" in sample:
        reader.put("sample.negative_prompt", sample["neg"] or "", f"{path}.neg")
    picture_format = reader.choice(sample.get("format", "jpg"), f"{path}.format", IMAGE_FORMATS)
    if picture_format is not None:
        reader.put("sample.format", picture_format, f"{path}.format")
    previews = _previews(reader, sample, path, trigger)
    reader.values.setdefault("sample", {})["previews"] = [] if disabled else previews


def _sampler(reader: _Reader, section: dict[str, Any], path: str, target: str) -> None:
    if "sampler" in section:
        scheduler = reader.choice(section["sampler"], f"{path}.sampler", keys.SAMPLERS)
        if scheduler is not None:
            reader.put(target, scheduler, f"{path}.sampler")


def _prefixed(prefix: str) -> dict[str, str]:
    return {
        "width": f"{prefix}width_px",
        "height": f"{prefix}height_px",
        "guidance_scale": f"{prefix}guidance_scale",
        "sample_steps": f"{prefix}steps",
        "network_multiplier": f"{prefix}lora_scale",
    }


def _seed(reader: _Reader, value: Any, path: str) -> Any:
    if value == -1:
        reader.warn(path, "random preview seeds are not supported; 42 is used")
        return 42
    return value


def _previews(reader: _Reader, sample: dict[str, Any], path: str, trigger: Any) -> list[dict[str, Any]]:
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


def _preview(reader: _Reader, value: Any, path: str, trigger: Any) -> dict[str, Any] | None:
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
    text, flags = _prompt_flags(reader, prompt.replace("[trigger]", word), path)
    return preview | flags | {"prompt": text}


def _prompt_flags(reader: _Reader, prompt: str, path: str) -> tuple[str, dict[str, Any]]:
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


def _generate_process(reader: _Reader, process: dict[str, Any], path: str) -> None:
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
        text, flags = _prompt_flags(reader, prompt.replace("[trigger]", ""), f"{at}.prompts[{index}]")
        texts.append(text)
        if flags:
            reader.problem(f"{at}.prompts[{index}]", "flags inside a prompt are not supported here", "unsupported")
    reader.put("prompts", texts, f"{at}.prompts")
    _copy(
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
    _sampler(reader, generate, at, "scheduler")
    extension = generate.get("ext", "png")
    chosen = reader.choice(
        extension.lstrip(".") if isinstance(extension, str) else extension, f"{at}.ext", IMAGE_FORMATS
    )
    if chosen is not None:
        reader.put("output_format", chosen, f"{at}.ext")


def _generate_model(reader: _Reader, value: Any, path: str) -> None:
    model = reader.section(value, path, keys.GENERATE_MODEL)
    _architecture(reader, model, path)
    if "name_or_path" in model:
        reader.put("model", model["name_or_path"], f"{path}.name_or_path")
    lora = model.get("lora_path")
    if isinstance(lora, str) and lora.strip():
        name = PurePosixPath(lora.replace("\\", "/")).name.removesuffix(".safetensors")
        reader.values["loras"] = [{"id": name}]
        reader.origin["loras"] = f"{path}.lora_path"
    elif lora is not None and not isinstance(lora, str):
        reader.problem(f"{path}.lora_path", "must be text")


__all__ = [
    "Ignored",
    "ParsedConfig",
    "dataset_name",
    "parse_generate_yaml",
    "parse_train_yaml",
]
