from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train_jobs.aitoolkit_files import GENERATE, TRAIN, training_document, with_value
from train_jobs import aitoolkit_keys
from train_jobs.aitoolkit import dataset_name, parse_generate_yaml, parse_train_yaml
from train_jobs.errors import ConfigInvalid
from train_jobs.spec import TrainSpec

KEYS: dict[str, list[str]] = json.loads(Path(__file__).with_name("aitoolkit_keys_2026_08.json").read_text())
"""Every key of the config classes that have a table here, in ostris/ai-toolkit `toolkit/config_modules.py`."""


def _problems(config: Any, **options: bool) -> dict[str, str]:
    with pytest.raises(ConfigInvalid) as caught:
        parse_train_yaml(config, **options)
    return {problem.path: problem.code for problem in caught.value.problems}


def _parsed(config: Any) -> TrainSpec:
    return parse_train_yaml(config).spec


def test_a_usual_file_is_read_as_it_is() -> None:
    spec = _parsed(TRAIN)
    assert spec.name == "my_first_lora"
    assert spec.network.rank == 16
    assert spec.network.alpha == 8
    dataset = spec.datasets[0]
    assert dataset.dataset == "cats"
    assert dataset.resolutions_px == (512, 768)
    assert dataset.caption_ext == ".txt"
    assert dataset.trigger_word == "ohwx"
    assert (dataset.flip_x, dataset.repeats, dataset.caption_dropout_rate) == (True, 3, 0.05)
    assert spec.train.learning_rate == 1e-4
    assert spec.train.optimizer.weight_decay == 1e-4
    assert spec.train.optimizer.beta2 == 0.99
    assert spec.train.min_snr_gamma == 5.0
    assert (spec.save.every_steps, spec.save.keep, spec.save.dtype) == (250, 4, "fp16")
    first, second = spec.sample.previews
    assert first.prompt == "ohwx holding a sign"
    assert (first.width_px, first.negative_prompt) == (512, "blurry")
    assert second.prompt == "my_first_lora at the sea"


def test_the_same_file_as_a_mapping_and_as_json_gives_the_same_spec() -> None:
    assert _parsed(training_document()) == _parsed(TRAIN) == _parsed(json.dumps(training_document()))


def test_keys_of_no_use_here_are_listed_with_a_reason() -> None:
    ignored = {item.path: item.reason for item in parse_train_yaml(TRAIN).ignored}
    assert "config.process[0].device" in ignored
    assert "config.process[0].datasets[0].cache_latents_to_disk" in ignored
    assert all(ignored.values())


def test_an_unknown_key_is_a_warning_that_names_the_nearest() -> None:
    warnings = (
        parse_train_yaml(with_value("train", "learning_rte", 1)).warnings
        + parse_train_yaml(with_value("train", "batchsize", 2)).warnings
    )
    texts = {w.path: w.message for w in warnings if w.code == "unknown_key"}
    assert "did you mean 'batch_size'" in texts["config.process[0].train.batchsize"]


def test_a_value_taken_differently_is_a_warning() -> None:
    warnings = {w.path for w in parse_train_yaml(TRAIN).warnings}
    assert warnings == {"config.process[0].train.optimizer"}


def test_all_problems_come_at_once_with_their_paths() -> None:
    document = with_value("train", "steps", -3)
    document["config"]["process"][0]["train"]["lr"] = "fast"
    document["config"]["process"][0]["network"]["type"] = "lorm"
    document["config"]["process"][0]["datasets"][0]["folder_path"] = "/data/.."
    document["config"]["process"][0]["datasets"][0]["resolution"] = [512, "big"]
    document["config"]["process"][0]["slider"] = {"targets": []} | {"resolutions": [[512, 512]]}
    process = "config.process[0]"
    assert _problems(document) == {
        f"{process}.slider": "unsupported",
        f"{process}.network.type": "unsupported",
        f"{process}.train.steps": "invalid_value",
        f"{process}.train.lr": "invalid_value",
        f"{process}.datasets[0].folder_path": "invalid_value",
        f"{process}.datasets[0].resolution": "invalid_value",
    }


@pytest.mark.parametrize("section", sorted(KEYS))
def test_every_known_key_has_one_place_in_the_table(section: str) -> None:
    table: aitoolkit_keys.Section = getattr(aitoolkit_keys, section)
    assert set(KEYS[section]) <= table.known
    assert len(table.known) == len(table.honoured) + len(table.ignored) + len(table.refused)


REFUSED = [
    (name, section, key)
    for name, section in (
        ("network", aitoolkit_keys.NETWORK),
        ("train", aitoolkit_keys.TRAIN),
        ("model", aitoolkit_keys.MODEL),
        ("datasets", aitoolkit_keys.DATASET),
        ("sample", aitoolkit_keys.SAMPLE),
        ("save", aitoolkit_keys.SAVE),
    )
    for key in section.refused
]


@pytest.mark.parametrize(("name", "section", "key"), REFUSED)
def test_what_is_not_done_here_is_refused_by_name_and_its_default_accepted(
    name: str, section: aitoolkit_keys.Section, key: str
) -> None:
    default = section.refused[key]
    value: Any = not default if isinstance(default, bool) else "other"
    found = _problems(with_value(name, key, value))
    assert set(found.values()) == {"unsupported"}
    assert any(path.split("]")[-1].find(key) >= 0 for path in found)
    parse_train_yaml(with_value(name, key, default))


@pytest.mark.parametrize("section", ["adapter", "embedding", "decorator", "slider", "guidance"])
def test_a_whole_section_that_is_not_done_here_is_refused(section: str) -> None:
    document = training_document()
    document["config"]["process"][0][section] = {"type": "x"}
    assert _problems(document) == {f"config.process[0].{section}": "unsupported"}


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.0e-4", ".0001", "0.0001", "+1e-4"])
def test_a_number_with_an_exponent_is_a_number(number: str) -> None:
    assert _parsed(TRAIN.replace("lr: 1e-4", f"lr: {number}")).train.learning_rate == pytest.approx(1e-4)


def test_environment_variables_are_never_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLORA_SECRET", "leaked")
    spec = _parsed(TRAIN.replace("[trigger] holding", "${RAYLORA_SECRET} holding"))
    assert spec.sample.previews[0].prompt == "${RAYLORA_SECRET} holding a sign"
    assert "config.process[0].datasets[0].folder_path" in _problems(TRAIN.replace("cats/", "${RAYLORA_SECRET}"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: &x 1\nb: 2", "alias_refused"),
        ("a: &x [1]\nb: *x", "alias_refused"),
        ("a: !!python/object:os.system 1", "tag_refused"),
        ("a: !!int 3", "tag_refused"),
        ("[" * 100 + "]" * 100, "too_deep"),
        ("[" * 100_000, "too_deep"),
        ("a: 1\na: 2", "invalid_yaml"),
        ("- 1", "invalid_yaml"),
        ("", "invalid_yaml"),
        ("{", "invalid_yaml"),
        ("? [a]\n: 1", "invalid_yaml"),
        ("a: " + "9" * 5000, "invalid_yaml"),
        ("x" * (10 * 1024 * 1024 + 1), "too_large"),
        ("[" + "1," * 60_000 + "]", "too_large"),
        (b"\xff\xfe\xfa", "invalid_yaml"),
        ("\ud800", "invalid_yaml"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(text: str | bytes, code: str) -> None:
    assert _problems(text) == {"": code}


def test_a_deep_mapping_is_refused() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = {"a": deep}
    assert _problems(deep) == {"": "too_deep"}


def test_a_date_stays_text() -> None:
    assert _parsed(TRAIN.replace('"my_first_lora"', "2024-01-02")).name == "2024-01-02"


def test_a_name_with_other_characters_is_stored_safely_and_said_so() -> None:
    parsed = parse_train_yaml(TRAIN.replace("my_first_lora", "my first/../lora!"))
    assert parsed.spec.name == "my_first_.._lora_"
    assert "config.name" in {w.path for w in parsed.warnings}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/workspace/datasets/cats/", "cats"),
        ("s3://bucket/dataset/cats", "cats"),
        (r"C:\data\cats", "cats"),
        ("cats", "cats"),
        ("/", None),
        (".", None),
        ("..", None),
        ("a/.hidden", ".hidden"),
        ("a/-cats", "-cats"),
        ("a/b c", None),
    ],
)
def test_a_folder_path_names_a_dataset_by_its_last_part(path: str, name: str | None) -> None:
    assert dataset_name(path) == name


def test_local_folders_and_models_are_for_the_command_line() -> None:
    text = TRAIN.replace('name_or_path: "tiny"', 'name_or_path: "/models/a"')
    assert _problems(text) == {"config.process[0].model.name_or_path": "invalid_value"}
    spec = parse_train_yaml(text, datasets_are_local=True).spec
    assert spec.datasets[0].local_path == "/workspace/datasets/cats/"
    assert spec.model == "/models/a"


@pytest.mark.parametrize(("key", "value"), [("arch", "wan21"), ("arch", ["x"])])
def test_a_model_of_another_kind_is_refused(key: str, value: Any) -> None:
    assert _problems(with_value("model", key, value)) == {"config.process[0].model.arch": "unsupported"}


def test_accumulated_steps_become_updates() -> None:
    document = with_value("train", "gradient_accumulation_steps", 4)
    parsed = parse_train_yaml(document)
    assert parsed.spec.train.steps == 500
    assert parsed.spec.train.gradient_accumulation == 4
    assert parsed.spec.save.every_steps == 63
    assert any("gradient_accumulation_steps" in w.path for w in parsed.warnings)


def test_two_kinds_of_accumulation_at_once_are_a_conflict() -> None:
    document = with_value("train", "gradient_accumulation_steps", 4)
    document["config"]["process"][0]["train"]["gradient_accumulation"] = 2
    assert _problems(document) == {"config.process[0].train.gradient_accumulation_steps": "conflict"}


def test_the_linear_schedule_rises_as_in_torch() -> None:
    schedule = _parsed(with_value("train", "lr_scheduler", "linear")).train.schedule
    assert (schedule.start_factor, schedule.end_factor) == (pytest.approx(1 / 3), 1.0)


@pytest.mark.parametrize("key", ["optimizer", "lr_scheduler"])
def test_an_optimizer_or_schedule_that_is_not_there_is_refused(key: str) -> None:
    assert _problems(with_value("train", key, "automagic")) == {f"config.process[0].train.{key}": "unsupported"}


def test_sampling_can_be_turned_off() -> None:
    assert _parsed(with_value("train", "disable_sampling", True)).sample.previews == ()
    assert not _parsed(with_value("train", "skip_first_sample", True)).sample.at_start


def test_an_unknown_prompt_flag_is_refused() -> None:
    assert _problems(with_value("sample", "prompts", ["a --ctrl x"])) == {
        "config.process[0].sample.prompts[0]": "unsupported"
    }
    assert _problems(with_value("sample", "prompts", ["a --w big"])) == {
        "config.process[0].sample.prompts[0]": "invalid_value"
    }


def test_the_named_sampler_is_used_for_previews() -> None:
    assert _parsed(TRAIN).sample.scheduler == "ddpm"
    assert _problems(with_value("sample", "sampler", "tcd")) == {"config.process[0].sample.sampler": "unsupported"}
    assert _parsed(with_value("sample", "sampler", "flowmatch")).sample.scheduler == "flowmatch"
    document = with_value("sample", "sampler", "flowmatch")
    document["config"]["process"][0]["model"]["arch"] = "sd1"
    assert _problems(document) == {"config.process[0].sample.sampler": "unsupported"}


def test_a_generate_file_is_read_as_it_is() -> None:
    parsed = parse_generate_yaml(GENERATE)
    spec = parsed.spec
    assert spec.prompts == ("photo of batman", "photo of superman")
    assert (spec.width, spec.height, spec.num_images, spec.seed) == (64, 32, 2, None)
    assert (spec.model, spec.loras[0].id, spec.output_format) == ("tiny", "my_lora", "png")


def test_a_generate_file_cannot_name_files_on_the_server() -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_generate_yaml(GENERATE.replace('["photo of batman", "photo of superman"]', "/etc/passwd"))
    assert "config.process[0].generate.prompts" in {p.path for p in caught.value.problems}


def test_the_other_kind_of_job_is_refused() -> None:
    assert "job" in _problems(GENERATE)
    with pytest.raises(ConfigInvalid):
        parse_generate_yaml(TRAIN)


@pytest.mark.parametrize("value", [[], {}, [1], {"a": 1}, 3, True])
@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("train", "optimizer"),
        ("train", "lr_scheduler"),
        ("train", "dtype"),
        ("sample", "sampler"),
        ("network", "type"),
        ("model", "arch"),
    ],
)
def test_a_choice_that_is_not_text_is_refused(section: str, key: str, value: Any) -> None:
    assert f"config.process[0].{section}.{key}" in _problems(with_value(section, key, value))


def test_a_process_of_a_kind_that_is_not_text_is_refused() -> None:
    document = training_document()
    document["config"]["process"][0]["type"] = ["sd_trainer"]
    assert _problems(document) == {"config.process[0].type": "unsupported"}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"train": {"optimizer": "Prodigy", "train_text_encoder": True, "text_encoder_lr": 0.5}}, "train"),
        ({"train": {"strategy": "fsdp"}, "model": {"compile": True, "quantize": False}}, "train"),
        ({"train": {"min_denoising_steps": 900, "max_denoising_steps": 100}}, "train"),
        ({"network": {"type": "dora"}}, ""),
        ({"workers": {"min": 3, "max": 2}}, "workers"),
        ({"datasets": None}, "datasets"),
        ({"model": None}, "model.name_or_path"),
    ],
)
def test_a_rule_about_several_keys_names_their_place_in_the_file(changes: dict[str, Any], path: str) -> None:
    document = training_document()
    process = document["config"]["process"][0]
    for section, change in changes.items():
        process[section] = change if change is None else process.get(section, {}) | change
    assert list(_problems(document)) == [f"config.process[0].{path}".removesuffix(".")]


def test_a_rule_about_all_prompts_names_their_place_in_the_file() -> None:
    document = yaml.safe_load(GENERATE)
    document["config"]["process"][0]["generate"] |= {"prompts": ["a", " "]}
    with pytest.raises(ConfigInvalid) as caught:
        parse_generate_yaml(document)
    assert [problem.path for problem in caught.value.problems] == ["config.process[0].generate"]


def test_lokr_is_read_as_ai_toolkit_means_it() -> None:
    keys = {"type": "lokr", "linear": 8, "linear_alpha": 4, "dropout": 0.1, "old_lokr_format": True}
    document = training_document()
    document["config"]["process"][0]["network"] = dict(keys)
    parsed = parse_train_yaml(document)
    network = parsed.spec.network
    assert (network.type, network.lokr_full_rank, network.lokr_factor) == ("lokr", True, -1)
    assert "config.process[0].network.dropout" in {warning.path for warning in parsed.warnings}
    assert network.dropout == 0
    assert "config.process[0].network.old_lokr_format" in {item.path for item in parsed.ignored}
    document["config"]["process"][0]["network"] |= {"lokr_full_rank": False, "lokr_factor": 8}
    network = parse_train_yaml(document).spec.network
    assert (network.lokr_full_rank, network.lokr_factor, network.rank, network.alpha) == (False, 8, 8, 4)
    document["config"]["process"][0]["network"]["lokr_factor"] = 0
    assert _problems(document) == {"config.process[0].network.lokr_factor": "invalid_value"}


def test_what_only_lokr_knows_is_ignored_for_other_networks() -> None:
    document = training_document()
    document["config"]["process"][0]["network"] |= {"lokr_full_rank": True, "lokr_factor": 8}
    ignored = {item.path for item in parse_train_yaml(document).ignored}
    assert {"config.process[0].network.lokr_full_rank", "config.process[0].network.lokr_factor"} <= ignored


def test_a_quantised_base_is_read_with_its_types_and_exceptions() -> None:
    spec = _parsed(TRAIN)
    assert (spec.quantize.denoiser, spec.quantize.text_encoders) == ("float8", "float8")
    document = training_document()
    document["config"]["process"][0]["model"] |= {
        "quantize_te": False, "qtype": "uint4", "quantize_kwargs": {"exclude": "*time*"},
    }  # fmt: skip
    parsed = parse_train_yaml(document)
    quantize = parsed.spec.quantize
    assert (quantize.denoiser, quantize.text_encoders, quantize.exclude) == ("int4", None, ("*time*",))
    assert "config.process[0].model.qtype" in {warning.path for warning in parsed.warnings}
    assert not _parsed(with_value("model", "quantize", False)).quantize.is_on
    assert _problems(with_value("model", "qtype", "uint3")) == {"config.process[0].model.qtype": "unsupported"}


def test_a_dora_on_a_quantised_base_is_refused() -> None:
    assert "invalid_value" in _problems(with_value("network", "type", "dora")).values()
    plain = with_value("network", "type", "dora")
    plain["config"]["process"][0]["model"]["quantize"] = False
    assert _parsed(plain).network.type == "dora"


def test_a_generation_takes_no_notice_of_quantisation() -> None:
    document = yaml.safe_load(GENERATE)
    document["config"]["process"][0]["model"] |= {"quantize": True, "lora_path": None}
    assert "config.process[0].model.quantize" in {item.path for item in parse_generate_yaml(document).ignored}
