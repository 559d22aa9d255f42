"""Whatever stands in an ai-toolkit file: it is read, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.train_jobs.aitoolkit_files import GENERATE, is_in_the_file, with_value
from train_jobs import aitoolkit_keys
from train_jobs.aitoolkit import parse_generate_yaml, parse_train_yaml
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.spec import TrainSpec

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3)
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text() | st.binary())
def test_any_text_is_read_or_refused_and_nothing_else(text: str | bytes) -> None:
    with pytest.raises(ConfigInvalid):
        parse_train_yaml(text)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(value=st.dictionaries(st.text(max_size=10), VALUES, max_size=4), parse=st.sampled_from(["train", "generate"]))
def test_any_mapping_is_read_or_refused_and_nothing_else(value: dict[str, Any], parse: str) -> None:
    with pytest.raises(ConfigInvalid):
        (parse_train_yaml if parse == "train" else parse_generate_yaml)(value)


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), value=VALUES)
def test_any_value_under_a_known_key_is_read_or_refused_and_nothing_else(data: st.DataObject, value: Any) -> None:
    name = data.draw(st.sampled_from(["network", "train", "model", "datasets", "sample", "save"]))
    table = {
        "network": aitoolkit_keys.NETWORK,
        "train": aitoolkit_keys.TRAIN,
        "model": aitoolkit_keys.MODEL,
        "datasets": aitoolkit_keys.DATASET,
        "sample": aitoolkit_keys.SAMPLE,
        "save": aitoolkit_keys.SAVE,
    }[name]
    key = data.draw(st.sampled_from(sorted(table.known)))
    document = with_value(name, key, value)
    if data.draw(st.booleans()):
        document["config"]["process"][0][name] = value
    problems: tuple[Problem, ...] = ()
    try:
        parsed = parse_train_yaml(document)
    except ConfigInvalid as invalid:
        problems = invalid.problems
    assert all(map(is_in_the_file, problems)), problems
    assert problems or TrainSpec.model_validate_json(parsed.spec.model_dump_json()) == parsed.spec


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), value=VALUES)
def test_any_value_in_a_generate_file_is_read_or_refused_and_nothing_else(data: st.DataObject, value: Any) -> None:
    document = yaml.safe_load(GENERATE)
    process = document["config"]["process"][0]
    where = data.draw(st.sampled_from(["generate", "model"]))
    table = aitoolkit_keys.GENERATE if where == "generate" else aitoolkit_keys.GENERATE_MODEL
    process[where][data.draw(st.sampled_from(sorted(table.known)))] = value
    problems: tuple[Problem, ...] = ()
    try:
        parse_generate_yaml(document)
    except ConfigInvalid as invalid:
        problems = invalid.problems
    assert all(map(is_in_the_file, problems)), problems
