"""Captions by small random-weight models of the real classes, one that goes on from a text and one that chats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from diffusion.testing import qwen_tokenizer
from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from train_jobs import captioner
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.captioner import Captioner, Pictures, caption_all
from train_jobs.data import read_folder
from train_jobs.errors import ConfigInvalid, ModelNotAvailable
from train_jobs.kept import Kept
from train_jobs.spec import CaptioningSpec, DatasetSpec, TrainSpec
from train_jobs.spec_json import spec_from_json

CPU = torch.device("cpu")
SIDE_PX, PATCH_PX = 16, 8
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": SIDE_PX, "patch_size": PATCH_PX,
}  # fmt: skip


def _tokenizer() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def _write_blip2(folder: Path) -> None:
    tokenizer = _tokenizer()
    image = BlipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX})
    processor = Blip2Processor(image, tokenizer, num_query_tokens=3)
    processor.tokenizer.chat_template = None
    size = len(processor.tokenizer)
    config = Blip2Config(
        vision_config=VISION | {"initializer_range": 0.3},
        qformer_config={
            "vocab_size": size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_hidden_size": 16,
        },
        text_config={
            "model_type": "opt", "vocab_size": size, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32,
            "num_attention_heads": 2, "max_position_embeddings": 128, "word_embed_proj_dim": 16, "init_std": 0.5,
            "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        num_query_tokens=3, image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_llava(folder: Path) -> None:
    tokenizer = _tokenizer()
    image = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX}
    )  # fmt: skip
    template = (
        "{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}:"
    )
    processor = LlavaProcessor(
        image, tokenizer, patch_size=PATCH_PX, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5,
            "max_position_embeddings": 256,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_qwen_vl(folder: Path) -> None:
    """As on the hub: with a part for videos, which transformers makes only where torchvision is installed."""
    tokenizer = qwen_tokenizer()
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    image_id, video_id, start_id, end_id = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}:"
    )
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": PATCH_PX, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": SIDE_PX,
            "fullatt_block_indexes": [0],
        },
        image_token_id=image_id, video_token_id=video_id, vision_start_token_id=start_id, vision_end_token_id=end_id,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=PATCH_PX, merge_size=2, temporal_patch_size=2, min_pixels=SIDE_PX**2, max_pixels=4 * SIDE_PX**2
    ).save_pretrained(folder)


def _write_florence2(folder: Path) -> None:
    plain = _tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, pad_token=plain.pad_token, eos_token=plain.eos_token,
        bos_token=plain.eos_token, model_specific_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image = CLIPImageProcessorPil(size={"height": 2 * SIDE_PX, "width": 2 * SIDE_PX}, do_center_crop=False)
    image.image_seq_length = 17
    config = Florence2Config(
        text_config={
            "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 16, "encoder_layers": 1,
            "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "max_position_embeddings": 256, "init_std": 0.5,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": None,
        },
        vision_config={
            "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
            "patch_prenorm": (False, True), "embed_dim": (8, 16), "num_heads": (2, 2), "num_groups": (2, 2),
            "window_size": 4, "projection_dim": 16, "max_temporal_embeddings": 10, "max_position_embeddings": 10,
            "drop_path_rate": 0.0,
        },
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    Florence2Processor(image, tokenizer).save_pretrained(folder)


WRITERS = {
    "blip2": _write_blip2,
    "llava": _write_llava,
    "qwen_vl": _write_qwen_vl,
    "florence2": _write_florence2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(4)
        write(folder)
        found[name] = str(folder)
    return found


@pytest.fixture
def kept() -> Iterator[Kept]:
    runner = LoopThread("test")
    yield Kept(InMemoryStore(), runner, Keys("raylora", "default"), None)
    runner.stop()


@pytest.fixture
def pictures(write_pictures: Callable[..., Path]) -> Pictures:
    folder = write_pictures((16, 16), (24, 16), (32, 32))
    (folder / "p0.txt").unlink()
    (folder / "p1.txt").write_text("  \n")
    spec = DatasetSpec(dataset="cats", trigger_word="ohwx", default_caption="a default")
    return ((spec, read_folder(folder, spec)),)


def _caption(spec: CaptioningSpec, pictures: Pictures, kept: Kept, models: dict[str, str], **options: Any) -> Any:
    progress: list[tuple[int, int]] = []
    result = caption_all(
        spec, pictures, kept=kept, models=models, device=CPU, paths_allowed=False,
        on_progress=lambda done, total: progress.append((done, total)), **({"should_stop": None} | options),
    )  # fmt: skip
    return result, progress


@pytest.mark.parametrize("name", WRITERS)
def test_pictures_without_a_text_get_one_and_the_others_keep_theirs(
    name: str, pictures: Pictures, kept: Kept, models: dict[str, str]
) -> None:
    spec = CaptioningSpec(model=name, prefix="photo of ", suffix=", sharp", max_new_tokens=6)
    captioned, progress = _caption(spec, pictures, kept, models)
    [(_, found)] = captioned
    said = Captioner(spec, Path(models[name]), CPU).caption(pictures[0][1][0].path)
    assert said
    assert found[0].text == f"photo of {said}, sharp"
    assert found[0].caption == f"ohwx photo of {said}, sharp"
    assert found[1].text.startswith("photo of ")
    assert found[2] == pictures[0][1][2]
    assert progress == [(0, 2), (1, 2), (2, 2)]


def test_a_regularisation_picture_is_captioned_without_the_trigger_word(
    pictures: Pictures, kept: Kept, models: dict[str, str]
) -> None:
    [(dataset, found)] = pictures
    regularisation = dataset.model_copy(update={"is_regularisation": True})
    [(_, captioned)], _ = _caption(
        CaptioningSpec(model="blip2", prefix="photo of ", max_new_tokens=4), ((regularisation, found),), kept, models
    )
    assert captioned[0].caption == captioned[0].text
    assert captioned[0].text.startswith("photo of ")


def test_the_question_is_not_part_of_the_answer(pictures: Pictures, models: dict[str, str]) -> None:
    for name in models:
        spec = CaptioningSpec(model=name, prompt="zzzz zzzz", max_new_tokens=4)
        assert "zzzz zzzz" not in Captioner(spec, Path(models[name]), CPU).caption(pictures[0][1][0].path)


def test_overwrite_captions_every_picture(pictures: Pictures, kept: Kept, models: dict[str, str]) -> None:
    spec = CaptioningSpec(model="blip2", prefix="new ", overwrite=True, max_new_tokens=4)
    [(_, found)], progress = _caption(spec, pictures, kept, models)
    assert all(picture.text.startswith("new") for picture in found)
    assert progress[-1] == (3, 3)


def test_what_was_said_before_is_not_asked_again(
    pictures: Pictures, kept: Kept, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CaptioningSpec(model="blip2", max_new_tokens=4)
    first, _ = _caption(spec, pictures, kept, models)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(captioner, "Captioner", refuse)
    assert _caption(spec, pictures, kept, models)[0] == first
    other = spec.model_copy(update={"suffix": " at night"})
    assert _caption(other, pictures, kept, models)[0][0][1][0].text.endswith(" at night")
    with pytest.raises(AssertionError):
        _caption(spec.model_copy(update={"max_new_tokens": 5}), pictures, kept, models)


def test_pictures_that_all_have_texts_need_no_model(write_pictures: Callable[..., Path], kept: Kept) -> None:
    dataset = DatasetSpec(dataset="cats")
    pictures: Pictures = ((dataset, read_folder(write_pictures((16, 16)), dataset)),)
    assert _caption(CaptioningSpec(model="none"), pictures, kept, {}) == (pictures, [])


def test_captioning_can_be_stopped(pictures: Pictures, kept: Kept, models: dict[str, str]) -> None:
    spec = CaptioningSpec(model="blip2", max_new_tokens=2)
    assert _caption(spec, pictures, kept, models, should_stop=lambda: True)[0] is None


def test_a_model_of_another_kind_or_none_is_refused_by_name(pictures: Pictures, kept: Kept, model_folder: Path) -> None:
    with pytest.raises(ModelNotAvailable, match=r"'sd'.*captions pictures"):
        _caption(CaptioningSpec(model="sd"), pictures, kept, {"sd": str(model_folder)})
    with pytest.raises(ModelNotAvailable):
        _caption(CaptioningSpec(model="nowhere"), pictures, kept, {})


def test_a_captioning_model_is_named_as_a_base_model_is() -> None:
    smallest = {"name": "a", "model": "tiny", "datasets": [{"dataset": "cats"}]}
    with pytest.raises(ConfigInvalid) as caught:
        spec_from_json(TrainSpec, smallest | {"captioning": {"model": "/models/blip"}})
    assert [problem.path for problem in caught.value.problems] == ["captioning.model"]
    local = spec_from_json(TrainSpec, smallest | {"captioning": {"model": "/models/blip"}}, paths_allowed=True)
    assert local.captioning is not None
    assert spec_from_json(TrainSpec, smallest | {"captioning": {"model": "org/blip"}}).captioning is not None


def test_captioning_is_asked_for_in_the_process_of_a_config() -> None:
    config: dict[str, Any] = {
        "job": "extension",
        "config": {"name": "a", "process": [{
            "type": "sd_trainer", "network": {"type": "lora", "linear": 4}, "model": {"name_or_path": "tiny"},
            "datasets": [{"folder_path": "cats"}], "train": {"lr": 1e-4},
            "captioning": {"model": "org/blip", "prefix": "photo of ", "max_new_tokens": 30, "overwrite": True},
        }]},
    }  # fmt: skip
    parsed = parse_train_yaml(config)
    assert parsed.spec.captioning == CaptioningSpec(
        model="org/blip", prefix="photo of ", max_new_tokens=30, overwrite=True
    )
    for wrong in ({"model": "/models/blip"}, {"prefix": "a"}):
        config["config"]["process"][0]["captioning"] = wrong
        with pytest.raises(ConfigInvalid) as caught:
            parse_train_yaml(config)
        assert {problem.path for problem in caught.value.problems} == {"config.process[0].captioning.model"}
