"""What a training leaves behind, and what a later one makes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from diffusion.lora import read_lora
from storage.datasets import write_dataset
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, NOW, get, keys
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json


def test_the_result_comes_in_both_key_formats_with_loss_files_and_its_best_checkpoint_marked(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore, tmp_path: Path
) -> None:
    change = {
        "validation": {"every_steps": 1, "share": 0.4, "patience": 1, "places": [0.5]},
        "train": spec.train.model_dump() | {"steps": 30, "learning_rate": 1.0, "ema_decay": 0.5},
        "sample": {},
    }
    output = train(spec_from_json(TrainSpec, spec.model_dump() | change))["output"]
    assert output["steps"] < 30  # a rate of 1 makes it worse, which ends it
    assert output["best_step"] == output["steps"] - 1 == output["loras"][0]["step"]
    assert [c["step"] for c in output["checkpoints"] if c.get("is_best")] == [output["best_step"]]
    assert len(output["validation_losses"]) == output["steps"]
    [kohya] = output["exports"]
    assert kohya["format"] == "kohya"
    for name, entry in (("a", output["loras"][0]), ("b", kohya)):
        (tmp_path / f"{name}.safetensors").write_bytes(get(store, entry["key"]))
    ours, theirs = (read_lora(tmp_path / f"{name}.safetensors") for name in "ab")
    assert theirs.source_format == "kohya"
    named = {f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}": a for name, a in ours.alphas.items()}
    assert named == theirs.alphas
    assert json.loads(ours.metadata["raylora.config"])["model"] == "tiny"
    assert theirs.metadata["ss_num_train_images"] == "3"
    assert get(store, output["loss_chart_key"]).startswith(b"\x89PNG")
    assert b"loss/validation" in get(store, output["tensorboard_key"])


def test_pictures_that_are_there_twice_are_named(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, runner: LoopThread, store: InMemoryStore, tmp_path: Path
) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "red")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    files = [(path.name, path, None) for path in sorted(tmp_path.glob("*.png"))]
    runner.run_blocking(write_dataset(store, KEYS, "twice", files, now=NOW))
    change = {"datasets": [{"dataset": "twice", "resolutions_px": [16], "bucket_step_px": 8}], "sample": {}}
    output = train(spec_from_json(TrainSpec, spec.model_dump() | change))["output"]
    assert output["warnings"] == ["In dataset 'twice' these pictures are the same: a.png, c.png."]


def test_a_training_can_begin_from_an_adapter_of_its_owner(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec.model_dump() | {"sample": {}}

    def forget() -> None:
        for old in keys(store, f"/{JOB}/"):
            asyncio.run(store.delete(old))

    key = train(spec_from_json(TrainSpec, quiet))["output"]["loras"][0]["key"]
    mine = key.replace(JOB, "train_000000000000")
    asyncio.run(store.put(mine, get(store, key)))
    network = spec.network.model_dump()
    longer = quiet["train"] | {"learning_rate": 1e-12}
    forget()
    again = train(spec_from_json(TrainSpec, quiet | {"network": network | {"pretrained": mine}, "train": longer}))
    names = [c["keys"][0] for c in again["output"]["checkpoints"]]
    begun, before = load(get(store, names[-1])), load(get(store, mine))
    assert max(float((begun[name] - before[name]).abs().max()) for name in before) <= 1e-6
    for wrong in ("other/tenant/a.safetensors", mine.replace("my_lora", "none")):
        forget()
        failure = train(spec_from_json(TrainSpec, quiet | {"network": network | {"pretrained": wrong}}))["failure"]
        assert (failure["code"], failure["retryable"]) == ("config_invalid", False)
    forget()
    other_rank = quiet | {"network": network | {"pretrained": mine, "rank": 3}}
    assert train(spec_from_json(TrainSpec, other_rank))["failure"]["code"] == "config_invalid"
    whole_lokr = {f"unet.x.lokr_w{i}": torch.ones(16, 16) for i in (1, 2)}
    asyncio.run(store.put(mine, save(whole_lokr)))
    forget()
    of_another_kind = quiet | {"network": network | {"pretrained": mine}}
    failure = train(spec_from_json(TrainSpec, of_another_kind))["failure"]
    assert "differ from the network's" in failure["message"]


def test_a_second_training_finds_what_the_first_one_encoded(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec_from_json(TrainSpec, spec.model_dump() | {"sample": {}, "captioning": {"model": "none"}})
    first = train(quiet)["output"]
    kept = keys(store, "/kept/")
    assert {key.split("/")[3] for key in kept} == {"latents", "texts"}
    for old in keys(store, f"/{JOB}/"):
        asyncio.run(store.delete(old))
    again = train(quiet)["output"]
    assert keys(store, "/kept/") == kept
    assert again["final_loss"] == first["final_loss"]


def test_a_training_whose_captioning_model_is_missing_fails_by_name(
    train: Callable[..., dict[str, Any]], spec: TrainSpec
) -> None:
    asked = {"captioning": {"model": "none", "overwrite": True}}
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | asked))["failure"]
    assert (failure["code"], failure["retryable"]) == ("model_not_available", False)
    assert "'none'" in failure["message"]


def test_a_quantised_base_without_torchao_is_refused_with_what_to_install(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.quantized.find_spec", lambda name: None)
    failure = train(spec_from_json(TrainSpec, spec.model_dump() | {"quantize": {"denoiser": "int8"}}))["failure"]
    assert (failure["code"], failure["retryable"]) == ("config_invalid", False)
    assert "raylora[quantized]" in failure["message"]


def test_a_training_on_a_quantised_base_makes_its_previews_and_an_adapter(
    train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    pytest.importorskip("torchao", reason="quantised base models need raylora[quantized]")
    asked = {"quantize": {"denoiser": "float8", "text_encoders": "int8"}}
    output = train(spec_from_json(TrainSpec, spec.model_dump() | asked))["output"]
    assert len(output["samples"]) == 6
    state = load(get(store, output["loras"][0]["key"]))
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "network",
    [
        {"type": "lokr", "lokr_full_rank": False, "lokr_factor": 4, "rank": 2, "alpha": 1.0, "conv_rank": 2},
        {"type": "lokr"},
        {"type": "loha", "rank": 2},
    ],
    ids=["lokr", "lokr-full", "loha"],
)
def test_lokr_and_loha_are_stored_under_both_names_and_can_be_begun_from(
    network: dict[str, Any], train: Callable[..., dict[str, Any]], spec: TrainSpec, store: InMemoryStore
) -> None:
    quiet = spec.model_dump() | {"network": network}

    def forget() -> None:
        for old in keys(store, f"/{JOB}/"):
            asyncio.run(store.delete(old))

    output = train(spec_from_json(TrainSpec, quiet))["output"]
    assert len(output["samples"]) == 6
    [lora], [export] = output["loras"], output["exports"]
    ours, theirs = load(get(store, lora["key"])), load(get(store, export["key"]))
    part = "hada_w1_a" if network["type"] == "loha" else "lokr_w1"
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert {f"unet.{layer}.{part}", f"unet.{layer}.alpha"} <= ours.keys()
    assert {f"lora_unet_{layer.replace('.', '_')}.{part}"} <= theirs.keys()
    assert len(theirs) == len(ours)
    assert ("unet.mid_block.resnets.0.conv1.alpha" in ours) == ("conv_rank" in network or network == {"type": "lokr"})
    kept = {name: get(store, item["key"]) for name, item in (("a", lora), ("b", export))}
    slow = quiet["train"] | {"learning_rate": 1e-12}
    for name, data in kept.items():
        mine = KEYS.lora_file("train_000000000000", f"{name}.safetensors")
        asyncio.run(store.put(mine, data))
        forget()
        again = spec_from_json(
            TrainSpec, quiet | {"network": network | {"pretrained": mine}, "train": slow, "sample": {}}
        )
        checkpoint = train(again)["output"]["checkpoints"][-1]
        begun = load(get(store, checkpoint["keys"][0]))
        assert max(float((begun[key] - ours[key]).abs().max()) for key in begun) <= 1e-6
    forget()
    other = {"type": "lokr", "lokr_full_rank": False, "rank": 1, "pretrained": mine}
    assert train(spec_from_json(TrainSpec, quiet | {"network": other}))["failure"]["code"] == "config_invalid"
