"""Files that ai-toolkit's web page makes are taken as they are."""

from __future__ import annotations

import pytest

from tests.train_jobs.ui_files import CHANGES, ui_file
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.config_check import ConfigCheck, check_train_yaml
from train_jobs.config_reader import ParsedConfig
from train_jobs.spec import TrainSpec

AT = "config.process[0]"
FAMILIES = {
    "sd15": "sd1",
    "sdxl": "sdxl",
    "flex1": "flux1",
    "flux": "flux1",
    "flux2": "flux2_dev",
    "flux2_klein_4b": "flux2_klein",
    "qwen_image": "qwen_image",
    "qwen_image:2512": "qwen_image",
    "zimage": "z_image",
}


def _verdicts(check: ConfigCheck) -> dict[str, str]:
    return {key.path: key.verdict for key in check.keys}


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_file_with_the_pages_defaults_is_accepted_and_every_key_in_it_is_known(arch: str) -> None:
    check = check_train_yaml(ui_file(arch))
    found = _verdicts(check)
    assert check.is_accepted
    assert set(found.values()) == {"honoured", "ignored"}
    assert found[f"{AT}.save.save_format"] == found[f"{AT}.model.low_vram"] == found[f"{AT}.device"] == "ignored"
    assert all(key.note for key in check.keys if key.verdict == "ignored")


@pytest.mark.parametrize(("arch", "family"), FAMILIES.items())
def test_it_means_what_it_means_there(arch: str, family: str) -> None:
    spec = parse_train_yaml(ui_file(arch)).spec
    assert spec.family == family
    assert (spec.network.rank, spec.network.alpha) == (32, 32)
    assert spec.train.learning_rate == 1e-4
    is_weighted = CHANGES[arch].get("train.timestep_type") == "weighted"
    expected = ("linear", "measured") if is_weighted else ("sigmoid", "none")
    assert (spec.train.timesteps.kind, spec.train.timesteps.weighting) == expected
    assert spec.quantize.is_on == CHANGES[arch].get("model.quantize", False)


def test_the_turbo_models_training_adapter_is_refused_by_name() -> None:
    check = check_train_yaml(ui_file("zimage:turbo"))
    refused = [key for key in check.keys if key.verdict not in ("honoured", "ignored")]
    assert [(key.path, key.verdict) for key in refused] == [(f"{AT}.model.assistant_lora_path", "refused")]


@pytest.mark.parametrize("arch", ["wan21:1b", "qwen_image_edit_plus:2511"])
def test_a_tag_does_not_make_another_model_a_known_one(arch: str) -> None:
    found = _verdicts(check_train_yaml(ui_file("qwen_image", model__arch=arch)))
    assert found[f"{AT}.model.arch"] == "refused"


def test_linear_timesteps_weigh_a_flow_models_loss_too() -> None:
    for kind, weighting in (("sigmoid", "bell"), ("weighted", "measured")):
        spec = parse_train_yaml(ui_file("flux", train__linear_timesteps=True, train__timestep_type=kind)).spec
        assert (spec.train.timesteps.kind, spec.train.timesteps.weighting) == ("linear", weighting)
    parsed = parse_train_yaml(ui_file("sdxl", train__linear_timesteps=True))
    assert _notes(parsed)[f"{AT}.train.linear_timesteps"].startswith("has no effect")


@pytest.mark.parametrize("arch", ["flux", "flux2_klein_4b", "qwen_image", "zimage"])
def test_a_transformers_alpha_is_its_rank_and_another_one_is_told(arch: str) -> None:
    parsed = parse_train_yaml(ui_file(arch, network__linear_alpha=1))
    assert (parsed.spec.network.rank, parsed.spec.network.alpha) == (32, 32)
    assert "is taken as the rank, 32" in _notes(parsed)[f"{AT}.network.linear_alpha"]
    without = parse_train_yaml(_without_alpha(arch))
    assert without.spec.network.alpha == 32
    assert f"{AT}.network.alpha" not in _notes(without)
    check = check_train_yaml(ui_file(arch, network__linear_alpha=1))
    assert "is taken as the rank" in {key.path: key.note for key in check.keys}[f"{AT}.network.linear_alpha"]


def test_a_unets_alpha_is_the_files_and_1_without_one() -> None:
    assert parse_train_yaml(ui_file("sdxl", network__linear_alpha=16)).spec.network.alpha == 16
    assert parse_train_yaml(_without_alpha("sdxl")).spec.network.alpha == 1
    for nothing in (0, None):
        assert parse_train_yaml(ui_file("sdxl", network__linear_alpha=nothing)).spec.network.alpha == 32


def test_a_lokr_in_the_older_format_keeps_its_alpha() -> None:
    lokr = {"network__type": "lokr", "network__lokr_full_rank": False, "network__linear_alpha": 8}
    assert parse_train_yaml(ui_file("flux", **lokr)).spec.network.alpha == 32
    older = ui_file("flux", **lokr, network__old_lokr_format=True)
    assert parse_train_yaml(older).spec.network.alpha == 8
    whole = parse_train_yaml(ui_file("flux", **(lokr | {"network__lokr_full_rank": True})))
    assert f"{AT}.network.linear_alpha" not in _notes(whole)


def test_flux1s_guidance_is_left_out_where_the_file_says_so() -> None:
    assert parse_train_yaml(ui_file("flex1")).spec.train.bypass_guidance_embedding
    assert not parse_train_yaml(ui_file("flux")).spec.train.bypass_guidance_embedding
    assert parse_train_yaml(ui_file("flux", train__bypass_guidance_embedding=True)).spec.train.bypass_guidance_embedding
    other = parse_train_yaml(ui_file("flux2", train__bypass_guidance_embedding=True))
    assert not other.spec.train.bypass_guidance_embedding
    assert "has no effect" in _notes(other)[f"{AT}.train.bypass_guidance_embedding"]
    refused = check_train_yaml(ui_file("flux", model__use_flux_cfg=True))
    assert _verdicts(refused)[f"{AT}.model.use_flux_cfg"] == "refused"


def test_memory_is_saved_by_recomputing_unless_the_file_says_otherwise() -> None:
    without = ui_file("flux").replace("gradient_checkpointing: true", "seed: 1")
    assert parse_train_yaml(without).spec.train.gradient_checkpointing
    switched_off = ui_file("flux", train__gradient_checkpointing=False)
    assert not parse_train_yaml(switched_off).spec.train.gradient_checkpointing


def test_the_older_name_of_the_captions_suffix_outweighs_the_newer() -> None:
    spec = parse_train_yaml(ui_file("flux", datasets__caption_type="caption")).spec
    assert spec.datasets[0].caption_ext == ".caption"
    assert parse_train_yaml(ui_file("flux", datasets__caption_type=None)).spec.datasets[0].caption_ext == ".txt"


@pytest.mark.parametrize(("off", "left"), [((), (1, 2)), ((1,), (2,)), ((2,), (1,)), ((1, 2), ())])
def test_a_file_may_keep_a_text_encoder_from_being_adapted(off: tuple[int, ...], left: tuple[int, ...]) -> None:
    switches = {f"model__use_text_encoder_{number}": False for number in off}
    spec = parse_train_yaml(ui_file("sdxl", train__train_text_encoder=True, **switches)).spec
    assert spec.train.train_text_encoder
    assert spec.train.trained_text_encoders == left


def test_ai_toolkits_layers_are_adapted_and_locon_stays_inside_the_unets_blocks() -> None:
    assert parse_train_yaml(ui_file("qwen_image")).spec.network.targets == "ai_toolkit"
    plain = parse_train_yaml(ui_file("sdxl")).spec.network
    assert (plain.targets, plain.ignore_if_contains) == ("ai_toolkit", ())
    kept = {"ignore_if_contains": ["up_blocks"]}
    locon = parse_train_yaml(ui_file("sdxl", network__type="locon", network__network_kwargs=kept)).spec.network
    assert locon.ignore_if_contains == (
        "up_blocks", "unet.conv_in", "unet.conv_out", "unet.time_embedding", "unet.add_embedding",
    )  # fmt: skip


def test_a_filter_of_flux2s_layers_is_told_whose_names_it_meets() -> None:
    named = {"only_if_contains": ["single_blocks"], "ignore_if_contains": []}
    assert (
        "diffusers"
        in _notes(parse_train_yaml(ui_file("flux2", network__network_kwargs=named)))[
            f"{AT}.network.network_kwargs.only_if_contains"
        ]
    )
    assert not any("network_kwargs" in path for path in _notes(parse_train_yaml(ui_file("flux2"))))


def test_an_adapter_begins_as_in_ai_toolkit() -> None:
    assert parse_train_yaml(ui_file("flux")).spec.network.initial == "uniform"


def test_a_dropped_caption_leaves_the_process_trigger_word_but_in_regularisation() -> None:
    text = ui_file("flux").replace("trigger_word: null", "trigger_word: ohwx")
    assert parse_train_yaml(text).spec.datasets[0].dropped_caption == "ohwx"
    assert parse_train_yaml(text.replace("is_reg: false", "is_reg: true")).spec.datasets[0].dropped_caption == ""
    assert parse_train_yaml(ui_file("flux", datasets__trigger_word="ohwx")).spec.datasets[0].dropped_caption == ""


def _without_alpha(arch: str) -> str:
    return ui_file(arch).replace("linear_alpha: 32\n", "dropout: null\n")


def _notes(parsed: ParsedConfig[TrainSpec]) -> dict[str, str]:
    return {warning.path: warning.message for warning in parsed.warnings}
