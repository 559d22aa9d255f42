"""LoKr and LoHa in training: what they change, what is stored, and that the engine serves it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.lokr.layer import Linear as LoKrLinear
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from diffusion.adapter import ConvLora, TrainableLora, attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.packed import load_adapter, stamp_of
from diffusion.errors import LoraInvalid, SettingNotSupported
from diffusion.families import StableDiffusion1, load_family
from diffusion.kohya import to_kohya_factors
from diffusion.lora import read_factors, read_lora, save_lora
from diffusion.lycoris_layers import Lycoris, ProductLinear
from diffusion.testing import write_tiny_model

REQUEST = GenerateRequest(prompt="a red ring", width=64, height=64, steps=2, guidance_scale=5.0, seed=3)
CASES: dict[str, dict[str, Any]] = {
    "lokr": {"lycoris": Lycoris("lokr", 4), "rank": 2, "alpha": 1.0},
    "lokr-conv": {"lycoris": Lycoris("lokr"), "rank": 2, "alpha": 3.0, "conv": ConvLora(1, 2.0)},
    "lokr-full": {"lycoris": Lycoris("lokr", 8, full_rank=True), "rank": 2, "alpha": 5.0, "conv": ConvLora(2, 5.0)},
    "loha": {"lycoris": Lycoris("loha"), "rank": 2, "alpha": 1.0, "conv": ConvLora(1, 0.5)},
}


def attach(family: StableDiffusion1, name: str, **options: Any) -> TrainableLora:
    return attach_lora(family, **({"targets": "all"} | CASES[name] | options))


def predict(family: StableDiffusion1) -> torch.Tensor:
    latents = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    return family.predict(latents, torch.tensor([500]), family.encode_prompts(["a"]))


def randomise(lora: TrainableLora) -> None:
    generator = torch.Generator().manual_seed(5)
    state = {key: 0.4 * torch.randn(t.shape, generator=generator) for key, t in lora.state_dict().items()}
    lora.load_state_dict(state)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_makes_the_picture_of_the_trained_layers_in_a_stock_pipeline(
    name: str, family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    served = Engine(copy.deepcopy(family, {id(family.tokenizer): family.tokenizer}))
    lora = attach(family, name, components=["unet", "text_encoder"])
    randomise(lora)
    save_lora(tmp_path / "own.safetensors", lora.file_state(), metadata=lora.metadata(title=name))
    named = to_kohya_factors(lora.file_state(), family)
    save_file({key: tensor.contiguous() for key, tensor in named.items()}, tmp_path / "kohya.safetensors")
    stock.unet, stock.text_encoder = family.unet, family.text_encoder
    expected = stock(
        REQUEST.prompt, width=64, height=64, num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip
    expected_CHW = torch.from_numpy(np.asarray(expected)).permute(2, 0, 1)
    requests = [REQUEST] + [
        dataclasses.replace(REQUEST, loras=(LoraRef(tmp_path / f"{file}.safetensors"),)) for file in ("own", "kohya")
    ]
    plain, *made = [rendered.pixels_CHW for rendered in served.render(requests)]
    assert max(float((picture - expected_CHW).abs().max()) for picture in made) < 1e-4
    assert float((plain - expected_CHW).abs().max()) > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_a_new_network_changes_nothing_and_one_step_changes_the_prediction(name: str, family: StableDiffusion1) -> None:
    before = predict(family)
    lora = attach(family, name)
    assert torch.equal(predict(family), before)
    assert {n for n, _ in lora.named_parameters()} == set(lora.state_dict())
    optimizer = torch.optim.SGD(lora.parameters(), lr=100.0)
    torch.autograd.backward(predict(family).square().mean())
    optimizer.step()
    assert (predict(family) - before).abs().max() > 1e-4
    trained = [p for module in family.lora_components.values() for p in module.parameters() if p.requires_grad]
    assert len(trained) == len(lora.parameters())
    lora.detach()
    assert torch.equal(predict(family), before)


@pytest.mark.parametrize("lycoris", [Lycoris("lokr", 4), Lycoris("lokr", 4, full_rank=True)])
def test_a_linear_lokr_equals_pefts_own_and_never_makes_a_matrix_of_the_layers_size(
    lycoris: Lycoris, family: StableDiffusion1, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = attach_lora(family, rank=2, alpha=3, targets="attention", lycoris=lycoris)
    randomise(lora)

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(predict(family).square().mean(), lora.parameters())

    with monkeypatch.context() as patch:
        patch.setattr(LoKrLayer, "get_delta_weight", None)
        prediction, own = predict(family).detach(), gradients()
    monkeypatch.setattr(ProductLinear, "_get_delta_activations", LoKrLinear._get_delta_activations)
    torch.testing.assert_close(prediction, predict(family), rtol=1e-4, atol=1e-5)
    for ours, pefts in zip(own, gradients(), strict=True):
        torch.testing.assert_close(ours, pefts, rtol=1e-3, atol=1e-5)


def test_the_seed_alone_decides_the_first_weights(family: StableDiffusion1) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.rand(3)
        before = torch.get_rng_state()
        lora = attach(family, "lokr", seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({key: tensor.clone() for key, tensor in lora.state_dict().items()})
        lora.detach()
    same = [all(torch.equal(states[0][key], other[key]) for key in other) for other in states[1:]]
    assert same == [True, False]


def test_a_half_precision_model_trains_the_layers_in_float32(model_folder: Path) -> None:
    family = load_family(model_folder, device="cpu", dtype=torch.bfloat16)
    assert isinstance(family, StableDiffusion1)
    lora = attach(family, "lokr-full")
    assert {parameter.dtype for parameter in lora.parameters()} == {torch.float32}
    torch.autograd.backward(predict(family).float().sum())


def test_a_whole_lokr_holds_two_matrices_and_no_scale(family: StableDiffusion1, tmp_path: Path) -> None:
    lora = attach(family, "lokr-full")
    state = lora.file_state()
    assert {key.rpartition(".")[2] for key in state} == {"lokr_w1", "lokr_w2", "alpha"}
    randomise(lora)
    save_lora(tmp_path / "a.safetensors", lora.file_state(), metadata={}, dtype=torch.float16)
    layer = read_lora(tmp_path / "a.safetensors").layers()["unet.mid_block.resnets.0.conv1"]
    assert layer.alpha == layer.rank
    kept = load_file(tmp_path / "a.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are so small that the tiny models' layers are too wide for them, as full-size transformers' are."""
    monkeypatch.setattr("diffusion.lycoris.RANK_MAX", 24)
    monkeypatch.setattr("diffusion.lycoris_layers.RANK_MAX", 24)
    monkeypatch.setattr("diffusion.lycoris.CHEAP_RANK_MAX", 8)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("lycoris", [Lycoris("lokr", full_rank=True), Lycoris("lokr", 2)], ids=["whole", "decomposed"])
def test_a_lokr_wider_than_any_pair_is_trained_saved_and_served(lycoris: Lycoris, tmp_path: Path) -> None:
    trained: Any = load_family(write_tiny_model("flux1", tmp_path), device="cpu", dtype=torch.float32)
    served: Any = load_family(tmp_path / "model", device="cpu", dtype=torch.float32)
    lora = attach_lora(trained, rank=14, alpha=7, targets="all", lycoris=lycoris)
    randomise(lora)
    path = tmp_path / "a.safetensors"
    save_lora(path, lora.file_state(), metadata=lora.metadata(title="wide"))
    adapter = load_adapter(stamp_of(path), served, lambda size: torch.empty(size, dtype=torch.uint8))
    assert adapter.products
    latents = torch.linspace(-1, 1, math.prod(served.latent_shape(64, 64))).reshape(1, *served.latent_shape(64, 64))

    def predicted(family: Any) -> torch.Tensor:
        with torch.no_grad():
            made: torch.Tensor = family.predict(latents, torch.tensor([500.0]), served.encode_prompts(["a"]))
        return made

    plain = predicted(served)
    LoraSlots(served).arrange("transformer", [((adapter, 1.0),)])
    torch.testing.assert_close(predicted(served), predicted(trained), rtol=1e-4, atol=1e-5)
    assert float((predicted(served) - plain).abs().max()) > 0.1


@pytest.mark.usefixtures("narrow")
def test_a_convolution_needs_a_pair_and_is_refused_where_it_has_none(family: StableDiffusion1) -> None:
    with pytest.raises(SettingNotSupported, match=r"conv.*would have rank 32, and 24 is the most"):
        attach(family, "lokr-full")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lycoris": Lycoris("loha"), "rank": 40, "alpha": 40}, "rank 1600, and 1536.*a smaller rank"),
        ({"lycoris": Lycoris("lokr"), "rank": 2, "alpha": 2, "dropout": 0.1}, "neither dropout"),
        ({"lycoris": Lycoris("loha"), "rank": 2, "alpha": 2, "dora": True}, "neither dropout nor DoRA"),
    ],
)
def test_a_network_that_cannot_be_trained_or_served_is_refused_by_name(
    options: dict[str, Any], reason: str, family: StableDiffusion1
) -> None:
    with pytest.raises(SettingNotSupported, match=reason):
        attach_lora(family, **options)
    assert not any(isinstance(module, BaseTunerLayer) for module in family.unet.modules())
    attach(family, "lokr")


def test_metadata_names_the_algorithm_and_nothing_that_diffusers_takes_for_a_lora(family: StableDiffusion1) -> None:
    metadata = attach(family, "lokr-full").metadata(title="ring")
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "lokr", "factor": "8", "full_matrix": "True"}
    assert "lora_adapter_metadata" not in metadata
    assert Lycoris("loha").network_args() == {"algo": "loha"}


@pytest.mark.parametrize("name", ["flux1", "sd3"])
def test_families_without_such_names_have_no_kohya_file(name: str, tmp_path: Path) -> None:
    family = load_family(write_tiny_model(name, tmp_path), device="cpu", dtype=torch.float32)
    lora = attach_lora(family, rank=2, alpha=2, lycoris=Lycoris("lokr"))
    with pytest.raises(SettingNotSupported, match="kohya key names"):
        to_kohya_factors(lora.file_state(), family)


def test_only_files_of_factors_are_read_as_factors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for state in ({"x.lora_A.weight": torch.ones(2, 2)}, {"x.alpha": torch.ones(())}):
        save_file(state, path)
        with pytest.raises(LoraInvalid, match="no LoKr or LoHa"):
            read_factors(path)
