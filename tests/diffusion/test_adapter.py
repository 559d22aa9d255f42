from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusion.adapter import TrainableLora, attach_lora
from diffusion.errors import LoraMismatch, SettingNotSupported
from diffusion.families import StableDiffusion1


def predict(family: StableDiffusion1) -> torch.Tensor:
    latents = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    return family.predict(latents, torch.tensor([500]), family.encode_prompts(["a"]))


def test_a_new_adapter_changes_nothing_and_one_step_changes_the_prediction(family: StableDiffusion1) -> None:
    before = predict(family)
    lora = attach_lora(family, rank=4, alpha=4)
    assert torch.equal(predict(family), before)
    optimizer = torch.optim.SGD(lora.parameters(), lr=10.0)
    torch.autograd.backward(predict(family).square().mean())
    optimizer.step()
    assert (predict(family) - before).abs().max() > 1e-4


def test_only_the_adapter_is_trained(family: StableDiffusion1) -> None:
    lora = attach_lora(family, rank=4, alpha=4, components=("unet", "text_encoder"))
    wanted = {id(parameter) for parameter in lora.parameters()}
    trained = [p for module in family.lora_components.values() for p in module.parameters() if p.requires_grad]
    assert {id(parameter) for parameter in trained} == wanted
    assert len(trained) == len(lora.state_dict())
    torch.autograd.backward(predict(family).sum())
    b_weights = [p for name, p in lora.named_parameters() if "lora_B" in name]
    assert all(p.grad is not None for p in b_weights)


def test_the_weights_of_a_half_precision_model_are_trained_in_float32(model_folder: Any) -> None:
    family = StableDiffusion1.load(model_folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    lora = attach_lora(family, rank=2, alpha=2)
    assert {parameter.dtype for parameter in lora.parameters()} == {torch.float32}
    torch.autograd.backward(predict(family).float().sum())


def test_the_seed_alone_decides_the_first_weights(family: StableDiffusion1) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.rand(3)
        before = torch.get_rng_state()
        lora = attach_lora(family, rank=2, alpha=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({key: tensor.clone() for key, tensor in lora.state_dict().items()})
        lora.detach()
    same = [all(torch.equal(states[0][key], other[key]) for key in other) for other in states[1:]]
    assert same == [True, False]


def test_the_state_has_diffusers_names_and_loads_back_in_place(family: StableDiffusion1) -> None:
    lora = attach_lora(family, rank=2, alpha=2, components=("unet", "text_encoder"))
    state = {key: torch.randn_like(tensor) for key, tensor in lora.state_dict().items()}
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight" in state
    assert any(key.startswith("text_encoder.") for key in state)
    parameters = lora.parameters()
    lora.load_state_dict(state)
    assert [id(p) for p in lora.parameters()] == [id(p) for p in parameters]
    assert all(torch.equal(tensor, state[key]) for key, tensor in lora.state_dict().items())
    assert [name for name, _ in lora.named_parameters()] != []
    assert {name for name, _ in lora.named_parameters()} == set(state)


def test_a_state_of_another_shape_is_refused(family: StableDiffusion1) -> None:
    lora = attach_lora(family, rank=2, alpha=2)
    state = lora.state_dict()
    wrong: list[dict[str, torch.Tensor]] = [
        {},
        {key: torch.cat([tensor, tensor]) for key, tensor in state.items()},
        state | {"unet.more.lora_A.weight": torch.ones(2, 2)},
    ]
    for other in wrong:
        with pytest.raises(LoraMismatch):
            lora.load_state_dict(other)


def test_detaching_gives_the_model_back_as_it_was(family: StableDiffusion1) -> None:
    names = [name for module in family.lora_components.values() for name, _ in module.named_modules()]
    before = predict(family)
    lora = attach_lora(family, rank=2, alpha=2, components=("unet", "text_encoder"), targets="all")
    lora.load_state_dict({key: torch.ones_like(tensor) for key, tensor in lora.state_dict().items()})
    lora.set_dropout(True)
    lora.detach()
    assert torch.equal(predict(family), before)
    assert [name for module in family.lora_components.values() for name, _ in module.named_modules()] == names
    assert not any(isinstance(module, BaseTunerLayer) for module in family.unet.modules())
    assert not family.unet.training


def test_dropout_is_on_only_where_it_was_turned_on(family: StableDiffusion1) -> None:
    lora = attach_lora(family, rank=2, alpha=2, dropout=0.5)
    lora.load_state_dict({key: torch.ones_like(tensor) for key, tensor in lora.state_dict().items()})
    assert torch.equal(predict(family), predict(family))
    lora.set_dropout(True)
    assert not torch.equal(predict(family), predict(family))
    lora.set_dropout(False)
    assert torch.equal(predict(family), predict(family))


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"components": ("vae",)}, {"components": ()}],
)
def test_settings_that_make_no_adapter_are_refused(options: dict[str, Any], family: StableDiffusion1) -> None:
    with pytest.raises(SettingNotSupported):
        attach_lora(family, **{"rank": 2, "alpha": 2, **options})


def test_a_second_adapter_in_training_is_refused(family: StableDiffusion1) -> None:
    first: TrainableLora = attach_lora(family, rank=2, alpha=2)
    with pytest.raises(SettingNotSupported, match="already"):
        attach_lora(family, rank=2, alpha=2, components=("text_encoder",))
    first.detach()
    attach_lora(family, rank=2, alpha=2)


def test_metadata_says_what_other_programs_ask_for(family: StableDiffusion1) -> None:
    lora = attach_lora(family, rank=8, alpha=2.5)
    metadata = lora.metadata(
        title="ring", steps=120, base_model="tiny", trigger_word="sks", resolution=64,
        created_at=datetime(2026, 1, 2, tzinfo=UTC), extra={"ss_seed": "7"},
    )  # fmt: skip
    assert json.loads(metadata["lora_adapter_metadata"])["unet.lora_alpha"] == 2.5
    expected = {
        "ss_network_dim": "8", "ss_network_alpha": "2.5", "ss_steps": "120", "ss_sd_model_name": "tiny",
        "modelspec.trigger_phrase": "sks", "modelspec.resolution": "64x64", "ss_seed": "7",
        "modelspec.date": "2026-01-02T00:00:00+00:00", "modelspec.architecture": "stable-diffusion-v1/lora",
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert "modelspec.trigger_phrase" not in lora.metadata(title="ring")
