"""Reading a stranger's YAML: plain data only, within bounds, nothing expanded.

Differences to `yaml.safe_load`: `1e-4` is a number (YAML 1.2, and what ai-toolkit's own loader does), a date stays a
string, and anchors, aliases, tags, duplicate keys, deep nesting and very many nodes are refused. `${...}` is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

import yaml

from train_jobs.errors import ConfigInvalid, Problem

SIZE_MAX_BYTES = 10 * 1024 * 1024
DEPTH_MAX = 32
NODES_MAX = 50_000

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)
_WINDOWS_PATH = re.compile(r'"[A-Za-z]:\\(?!\\)')
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")
_EventLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(yaml.SafeLoader):
    """SafeLoader with own number rules and no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value[:60]}' is there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        pairs = super().construct_mapping(node, deep=deep)
        return {str(key): value for key, value in pairs.items()}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    kept: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    dropped = {"tag:yaml.org,2002:" + t for t in ("float", "int", "timestamp", "merge", "value")}
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept[first] = [(tag, pattern) for tag, pattern in entries if tag not in dropped]
    for first in "-+.0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:float", _FLOAT))
    for first in "-+0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:int", _INT))
    return kept


_Loader.yaml_implicit_resolvers = _resolvers()


def read_mapping(config: str | bytes | Mapping[str, Any]) -> dict[str, Any]:
    """The config as a dict of plain JSON values. Raises ConfigInvalid and nothing else."""
    if isinstance(config, Mapping):
        return _plain(config)
    try:
        text = config.decode("utf-8-sig") if isinstance(config, bytes) else config.removeprefix("\ufeff")
        size_bytes = len(text.encode("utf-8"))
    except UnicodeError:
        raise _refuse("the file is not valid UTF-8", "invalid_yaml") from None
    if size_bytes > SIZE_MAX_BYTES:
        raise _refuse("the file is larger than 10 MB", "too_large")
    try:
        _check_events(text)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as broken:
        raise _refuse(_where(broken, text), "invalid_yaml") from None
    except (ValueError, RecursionError):
        raise _refuse("a value in the file cannot be read", "invalid_yaml") from None
    if not isinstance(value, dict):
        raise _refuse("the file must be a mapping with the keys 'job' and 'config'", "invalid_yaml")
    return _plain(value)


def _check_events(text: str) -> None:
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, Loader=_EventLoader), start=1):
        if nodes > NODES_MAX:
            raise _refuse(f"the file has more than {NODES_MAX} elements", "too_large")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refuse("anchors and aliases (& and *) are not accepted", "alias_refused")
        if getattr(event, "tag", None) not in (None, "!"):
            raise _refuse("tags (!) are not accepted", "tag_refused")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MAX:
                raise _refuse(f"the file is nested deeper than {DEPTH_MAX} levels", "too_deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    budget = [NODES_MAX]

    def copy(value: Any, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise _refuse(f"the config has more than {NODES_MAX} elements", "too_large")
        if depth > DEPTH_MAX:
            raise _refuse(f"the config is nested deeper than {DEPTH_MAX} levels", "too_deep")
        if isinstance(value, Mapping):
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise _refuse(f"a value of the kind {type(value).__name__} is not accepted", "invalid_value")

    plain: dict[str, Any] = copy(config, 1)
    return plain


def _where(broken: yaml.YAMLError, text: str) -> str:
    mark = getattr(broken, "problem_mark", None)
    problem = getattr(broken, "problem", None) or "it cannot be parsed"
    if mark is None:
        return f"the YAML is broken: {problem}"
    line = next(islice(text.splitlines(), mark.line, None), "")
    return f"the YAML is broken: {_known_cause(line) or problem} (line {mark.line + 1}, column {mark.column + 1})"


def _known_cause(line: str) -> str | None:
    """What the parser's own words do not say about the two mistakes that are made most."""
    indent = line[: len(line) - len(line.lstrip())]
    if "\t" in indent:
        return "the line is indented by a tab, and YAML takes spaces only"
    if _WINDOWS_PATH.search(line):
        return "in double quotes a backslash begins an escape; write the path in single quotes, or with /"
    return None


def _refuse(message: str, code: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("", message, code)])
