"""What a training config would do, key by key, without starting anything.

No torch here: the HTTP side and the command line import this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal

from train_jobs.aitoolkit import read_train
from train_jobs.config_reader import ConfigReader, ParsedConfig
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.spec import TrainSpec
from train_jobs.strict_yaml import read_mapping

Verdict = Literal["honoured", "ignored", "unknown", "refused", "invalid"]
LOKR_ONLY = {"lokr_factor", "lokr_full_rank"}
REFUSED_CODES = frozenset({"unsupported", "not_allowed", "conflict"})


@dataclass(frozen=True)
class KeyVerdict:
    """One key of the file, by its path. `note`: why, or how it is taken; empty when there is nothing to add."""

    path: str
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True)
class ConfigCheck:
    """`run` tells what the training would be; None when the file would be refused. `needs` is what has to exist for
    that, each `{"path": <in the file>, "dataset" | "lora" | "model": <name>}`."""

    keys: tuple[KeyVerdict, ...]
    run: dict[str, Any] | None
    needs: tuple[dict[str, str], ...] = ()

    @property
    def is_accepted(self) -> bool:
        return self.run is not None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; `counts` are numbers of keys by verdict."""
        return {
            "accepted": self.is_accepted,
            "counts": dict(Counter(key.verdict for key in self.keys)),
            "keys": [asdict(key) for key in self.keys],
            "run": self.run,
            "needs": list(self.needs),
        }


def not_accepted(report: Mapping[str, Any], path: str, verdict: Verdict, note: str) -> dict[str, Any]:
    """A report as of `ConfigCheck.as_json` where the key at `path` keeps the file from being accepted."""
    keys = [key for key in report["keys"] if key["path"] != path]
    keys.append(asdict(KeyVerdict(path, verdict, note)))
    counts = dict(Counter(key["verdict"] for key in keys))
    return {**report, "accepted": False, "keys": keys, "counts": counts}


def check_train_yaml(config: str | bytes | Mapping[str, Any], *, datasets_are_local: bool = False) -> ConfigCheck:
    """Read a config as `parse_train_yaml` would, and report instead of raising."""
    try:
        reader = ConfigReader(read_mapping(config))
    except ConfigInvalid as invalid:
        return ConfigCheck(tuple(_of_problem(p) for p in invalid.problems), None)
    problems: tuple[Problem, ...] = ()
    run: dict[str, Any] | None = None
    needs: tuple[dict[str, str], ...] = ()
    try:
        parsed = read_train(reader, local=datasets_are_local)
        run, needs = describe_run(parsed.spec), _needs(parsed)
    except ConfigInvalid as invalid:
        problems = invalid.problems
    return ConfigCheck(_verdicts(reader, problems), run, needs)


def _needs(parsed: ParsedConfig[TrainSpec]) -> tuple[dict[str, str], ...]:
    spec, origin = parsed.spec, parsed.origin
    named: list[tuple[str, str, str | None]] = [("model", "model", spec.model)]
    for index, dataset in enumerate(spec.datasets):
        at = f"datasets.{index}"
        named += [
            ("dataset", f"{at}.dataset", dataset.dataset),
            ("dataset", f"{at}.mask_dataset", dataset.mask_dataset),
        ]
    if spec.validation is not None and spec.validation.dataset is not None:
        named.append(("dataset", "validation.dataset", spec.validation.dataset.dataset))
    named.append(("lora", "network.pretrained", spec.network.pretrained))
    return tuple({"path": origin.get(field, field), kind: name} for kind, field, name in named if name is not None)


def _verdicts(reader: ConfigReader, problems: tuple[Problem, ...]) -> tuple[KeyVerdict, ...]:
    """One row for each path; a problem outweighs a warning, and that the mere fact that the key is read."""
    rows = {path: KeyVerdict(path, "honoured") for path in reader.honoured}
    rows |= {item.path: KeyVerdict(item.path, "ignored", item.reason) for item in reader.ignored}
    for warning in reader.warnings:
        verdict: Verdict = "unknown" if warning.code == "unknown_key" else "honoured"
        rows[warning.path] = KeyVerdict(warning.path, verdict, warning.message)
    rows |= {problem.path: _of_problem(problem) for problem in problems}
    return tuple(rows.values())


def _of_problem(problem: Problem) -> KeyVerdict:
    return KeyVerdict(problem.path, "refused" if problem.code in REFUSED_CODES else "invalid", problem.message)


def describe_run(spec: TrainSpec) -> dict[str, Any]:
    """The training in a few plain facts. Pictures are counted for the workers asked for, or for one."""
    train, network = spec.train, spec.network
    per_step = train.batch_size * train.gradient_accumulation * (spec.workers.max if spec.workers is not None else 1)
    previews = [step for step in range(train.steps + 1) if _has_preview(spec, step)] if spec.sample.previews else []
    return {
        "name": spec.name,
        "model": spec.model,
        "network": network.model_dump(
            mode="json", exclude_none=True, exclude=set() if network.type == "lokr" else LOKR_ONLY
        ),
        **({"quantize": spec.quantize.model_dump(mode="json", exclude_none=True)} if spec.quantize.is_on else {}),
        "datasets": [
            dataset.model_dump(mode="json", exclude_defaults=True, exclude={"local_path"}) | {"name": dataset.label}
            for dataset in spec.datasets
        ],
        **({"captioning": _captioning(spec)} if spec.captioning is not None else {}),
        "steps": train.steps,
        **({"workers": spec.workers.model_dump(), "strategy": train.strategy} if spec.workers is not None else {}),
        **({"wandb": spec.wandb.model_dump(exclude_none=True)} if spec.wandb is not None else {}),
        "pictures_per_step": per_step,
        "pictures_total": train.steps * per_step,
        "learning_rate": train.learning_rate,
        "optimizer": train.optimizer.type,
        "schedule": train.schedule.type,
        "dtype": train.dtype,
        "checkpoints_written": -(-train.steps // spec.save.every_steps),
        "checkpoints_kept": min(spec.save.keep, -(-train.steps // spec.save.every_steps)),
        "preview_pictures": len(previews) * len(spec.sample.previews),
    }


def _captioning(spec: TrainSpec) -> dict[str, Any]:
    return spec.captioning.model_dump(mode="json", exclude_none=True) if spec.captioning is not None else {}


def _has_preview(spec: TrainSpec, step: int) -> bool:
    if step == 0:
        return spec.sample.at_start
    return step == spec.train.steps or (step >= spec.sample.start_step and step % spec.sample.every_steps == 0)


def tracking_problem(*, has_key: bool, path: str = "wandb") -> Problem | None:
    """Why W&B cannot be had here; `path` is where a request asks for it."""
    if not has_key:
        message = "there is no key for W&B here: set WANDB_API_KEY where the instance is started, or leave W&B out"
        return Problem(path, message, "wandb_key_missing")
    if find_spec("wandb") is None:
        message = "the package wandb is missing: install raylora[wandb] on every node, or leave W&B out"
        return Problem(path, message, "wandb_not_installed")
    return None


def check_tracking(spec: TrainSpec, *, has_key: bool) -> None:
    """Raises ConfigInvalid where `spec` asks for what cannot be had here."""
    problem = tracking_problem(has_key=has_key) if spec.wandb is not None else None
    if problem is not None:
        raise ConfigInvalid([problem])
