"""pydantic's findings in plain words: what a field must be, instead of what a parser did with it.

The words come from the schema of the model, so that a message tells the whole of what is allowed ("must be a whole
number between 1 and 8") whichever part of it was missed. Neither the value that was sent nor the text of an exception
is ever part of one; a validator's own `ValueError` is written for clients and is passed on.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from train_jobs.errors import Problem
from train_jobs.spec import DATASET_PATTERN, MODEL_ALIAS_PATTERN, MODEL_ID_PATTERN, WANDB_NAME_PATTERN

Schema = Mapping[str, Any]
Loc = tuple[int | str, ...]

NAME_SHOWN_MAX = 100
CODES = {"missing": "missing", "extra_forbidden": "unknown_key"}
PATTERNS = {
    r"\S": "must not be blank",
    r"^[0-9a-f]{64}$": "must be 64 digits and letters from a to f, in lower case",
    r"\.safetensors$": "must end in .safetensors",
    r"^train_[0-9a-f]{12}$": "must be the id of a training, such as train_0123456789ab",
    r"^\.[A-Za-z0-9]{1,10}$": "must be a dot and 1 to 10 letters or digits, such as .txt",
    DATASET_PATTERN: "must be 1 to 150 characters: letters, digits, . _ -, and not . or ..",
    f"{MODEL_ALIAS_PATTERN}|{MODEL_ID_PATTERN}": "must be a model's name here or a Hugging Face id such as org/name",
    WANDB_NAME_PATTERN: "must be 1 to 128 characters without / \\ # ? % and :",
}
"""Of what is not plainly so many characters of a few kinds."""

_CHARACTERS = re.compile(
    r"\^(?P<first>\[[^\]^]+\])?(?P<rest>\[[^\]^]+\])(?:\{(?P<least>\d+),(?P<most>\d+)\}|[+*])(?P<end>(?:\\\.[a-z]+)?)\$"
)
_SPANS = ((("A-Z", "a-z"), "letters"), (("a-z",), "lower-case letters"), (("0-9",), "digits"))


def problems_of(invalid: ValidationError, kind: type[BaseModel]) -> list[Problem]:
    """What is wrong with the input of a `kind`, in plain words.

    A collection counts as too short when one of its items is wrong; only the item is reported. Of a field that may be
    one of several things, one problem says all of them.
    """
    found = invalid.errors(include_url=False, include_input=False)
    places = [error["loc"] for error in found]
    wanted = [e for e in found if e["type"] != "too_short" or not any(_is_inside(at, e["loc"]) for at in places)]
    return problems_in(wanted, _schema_of(kind))


def problems_in(found: Iterable[Mapping[str, Any]], schema: Schema) -> list[Problem]:
    """pydantic's error mappings, whose places are looked up in the JSON schema of what was read."""
    problems: dict[tuple[str, str], Problem] = {}
    for error in found:
        place, node, parent = _look_up(schema, tuple(error["loc"]))
        path = format_path(place)
        code = CODES.get(error["type"], "invalid_value")
        problems.setdefault((path, code), Problem(path, _words(error, place, node, parent), code))
    return list(problems.values())


def format_path(loc: Loc) -> str:
    """`("datasets", 0, "repeats")` as `datasets[0].repeats`; a name that nobody here gave may be of any length."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part[:NAME_SHOWN_MAX]}"
    return text


@functools.cache
def _schema_of(kind: type[BaseModel]) -> Schema:
    return kind.model_json_schema()


def _is_inside(place: Loc, outer: Loc) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _look_up(root: Schema, loc: Loc) -> tuple[Loc, Schema, Schema]:
    """The place within the input, its schema, and that of what holds it; empty where the schema does not know it.

    pydantic goes on below a field of several kinds with the names of the kinds, which are no part of any input.
    """
    node, parent = _resolved(root, root), dict[str, Any]()
    for depth, part in enumerate(loc):
        if len(_options(node, root)) > 1:
            return loc[:depth], node, parent
        parent = node
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if inner is None and not isinstance(part, int) and isinstance(node.get("additionalProperties"), dict):
            inner = node["additionalProperties"]
        node = _resolved(inner or {}, root)
    return loc, node, parent


def _resolved(node: Schema, root: Schema) -> dict[str, Any]:
    """Without references, and without the null of what may be left out."""
    if "$ref" in node:
        return _resolved(root["$defs"][node["$ref"].rpartition("/")[2]], root)
    options = _options(node, root)
    about = {name: value for name, value in node.items() if name != "anyOf"}
    return {**about, **options[0]} if len(options) == 1 else {**about, "anyOf": options}


def _options(node: Schema, root: Schema) -> list[dict[str, Any]]:
    if "type" in node:
        return []
    return [_resolved(kind, root) for kind in node.get("anyOf", []) if kind.get("type") != "null"]


def _words(error: Mapping[str, Any], place: Loc, node: Schema, parent: Schema) -> str:
    kind = error["type"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1])[:NAME_SHOWN_MAX], sorted(parent.get("properties", {})), n=1)
        return "is not a field known here" + (f"; did you mean '{near[0]}'?" if near else "")
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        return pattern_words(str(error["ctx"]["pattern"]), node.get("examples", ()))
    wanted = expected(node)
    return f"must be {wanted}" if wanted else "has a value that is not accepted here"


def expected(node: Schema) -> str:
    """What a value of this schema is: `a whole number between 1 and 8`. Empty where the schema does not tell."""
    if node.get("anyOf"):
        return " or ".join(dict.fromkeys(expected(kind) for kind in node["anyOf"]))
    if "const" in node or "enum" in node:
        choices = [_choice(value) for value in node.get("enum", [node.get("const")])]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(node)
    if kind == "string":
        return "text" + _size(node.get("minLength"), node.get("maxLength"), "character")
    if kind == "array":
        return "a list" + _size(node.get("minItems"), node.get("maxItems"), "item")
    return {"boolean": "true or false", "object": "a mapping"}.get(str(kind), "")


def _choice(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _range(node: Schema) -> str:
    if "minimum" in node and "maximum" in node:
        return f" between {_number(node['minimum'])} and {_number(node['maximum'])}"
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "of at most",
        "exclusiveMaximum": "below",
    }
    bounds = [f"{word} {_number(node[name])}" for name, word in words.items() if name in node]
    return "".join(f" {bound}" for bound in bounds[:1]) + "".join(
        f" and {bound.removeprefix('of ')}" for bound in bounds[1:]
    )


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _size(least: int | None, most: int | None, unit: str) -> str:
    if not least and most is None:
        return ""
    if most is None:
        return f" of at least {least} {unit}{'' if least == 1 else 's'}"
    return f" of {least} to {most} {unit}s" if least else f" of at most {most} {unit}s"


def pattern_words(pattern: str, examples: Sequence[Any] = ()) -> str:
    """What a text that matches `pattern` is. `examples` speak for a pattern that there are no words for."""
    known = PATTERNS.get(pattern)
    if known is not None:
        return known
    match = _CHARACTERS.fullmatch(pattern)
    if match is None:
        return f"must be like {' or '.join(map(str, examples))}" if examples else f"must match the pattern {pattern}"
    first, rest, end = match["first"], match["rest"], match["end"].replace("\\", "")
    words = _characters(rest)
    if first is not None and _characters(first) != words:
        words += f" (the first: {_characters(first)})"
    if end:
        words += f", with {end} at the end"
    if match["most"] is None:
        return f"must hold only {words}"
    fixed = len(end) + (1 if first is not None else 0)
    return f"must be {int(match['least']) + fixed} to {int(match['most']) + fixed} characters: {words}"


def _characters(bracket: str) -> str:
    """`[A-Za-z0-9._-]` as `letters, digits, . _ -`."""
    words, signs = [], bracket[1:-1]
    for spans, word in _SPANS:
        if all(span in signs for span in spans):
            words.append(word)
            signs = functools.reduce(lambda left, span: left.replace(span, ""), spans, signs)
    return ", ".join([*words, *([" ".join(signs)] if signs else [])])
