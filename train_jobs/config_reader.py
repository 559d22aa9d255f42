"""Walking a config file: what each key is, where each value came from, and every problem at once.

No torch here: the HTTP side imports this module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from train_jobs import aitoolkit_keys as keys
from train_jobs import aitoolkit_values as values
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.field_problems import problems_of
from train_jobs.generate_spec import GenerateSpec
from train_jobs.spec import TrainSpec

PROBLEMS_MAX = 200
S = TypeVar("S", TrainSpec, GenerateSpec)


@dataclass(frozen=True)
class Ignored:
    """An accepted key that this engine has no use for, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ParsedConfig(Generic[S]):
    """`warnings` are problems that did not stop the request: unknown keys, values taken differently. `origin` is where
    in the file a field of the spec comes from, both as dotted paths with list indexes as numbers."""

    spec: S
    ignored: list[Ignored] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)


class ConfigReader:
    """Walks the file, gathering values for the spec, problems, warnings and ignored keys."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.ignored: list[Ignored] = []
        self.honoured: list[str] = []
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

    def place(self, path: str, parts: Mapping[str, str]) -> None:
        """Where the file has whole parts of the spec, whose rules are about several keys: `parts` by their key below
        the process at `path`. What belongs to no part belongs to the process."""
        self.origin |= {"": path} | {part: f"{path}.{key}" for part, key in parts.items()}

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
                if not _is_section(item):
                    self.honoured.append(at)
            elif key in section.ignored:
                self.ignored.append(Ignored(at, section.ignored[key]))
            elif key in section.refused:
                self._refuse_unless_default(at, key, item, section.refused[key])
            else:
                self._unknown(at, key, section)
        return honoured

    def _refuse_unless_default(self, at: str, key: str, item: Any, default: Any) -> None:
        if not _is_off(item, default):
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
            for problem in problems_of(invalid, kind):
                at = self._origin_of(problem.path)
                if at not in reported:
                    self.problem(at, problem.message, problem.code)
        if self.problems or spec is None:
            raise self.invalid()
        return ParsedConfig(spec, self.ignored, self.warnings, self.origin)

    def _origin_of(self, spec_path: str) -> str:
        target = re.sub(r"\[(\d+)\]", r".\1", spec_path)
        while target:
            if target in self.origin:
                return self.origin[target]
            target = target.rpartition(".")[0]
        return self.origin.get("", spec_path)


def _is_section(item: Any) -> bool:
    """Whether its own keys are listed instead of it."""
    return isinstance(item, dict) or (isinstance(item, list) and any(isinstance(part, dict) for part in item))


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


def copy_keys(reader: ConfigReader, source: Mapping[str, Any], path: str, names: Mapping[str, str]) -> None:
    for key, target in names.items():
        if key in source:
            reader.put(target, source[key], f"{path}.{key}")


def read_architecture(reader: ConfigReader, model: dict[str, Any], path: str) -> str | None:
    """The family that the file's author takes the model for; None when the file does not say."""
    named: str | None = None
    if "arch" in model:
        arch = model["arch"]
        named = values.ARCHITECTURES.get(arch.lower().partition(":")[0]) if isinstance(arch, str) else None
        if named is None:
            known = ", ".join(sorted(values.ARCHITECTURES))
            message = f"models of this kind are not supported here; supported: {known}"
            reader.problem(f"{path}.arch", message, "unsupported")
    for flag, family in values.ARCHITECTURE_FLAGS.items():
        if flag in model and reader.flag(model[flag], f"{path}.{flag}"):
            if named not in (None, family):
                reader.problem(f"{path}.{flag}", "contradicts the other statement of the model's kind", "conflict")
            named = family
    return named
