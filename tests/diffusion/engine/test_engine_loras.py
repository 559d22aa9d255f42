from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from diffusion.adapter import attach_lora
from diffusion.engine import Engine, LoraRef
from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.families import StableDiffusion1
from diffusion.lora import read_lora, save_lora
from tests.diffusion.engine.lora_pictures import PLAIN, TOLERANCE, difference, pixels, stock_pixels, with_loras

WriteLora = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4, "alpha": 4}, 1.0),
        ({"rank": 4, "alpha": 1}, 0.4),
        ({"rank": 3, "alpha": 6.5, "targets": "all"}, 0.4),
        ({"rank": 2, "alpha": 4, "components": ("unet", "text_encoder")}, 0.4),
        ({"rank": 2, "alpha": 4, "components": ("text_encoder",), "targets": "all"}, 1.0),
    ],
)
@pytest.mark.usefixtures("each_kind_of_slot")
def test_a_lora_picture_equals_the_stock_pipelines(
    options: dict[str, Any], scale: float, family: StableDiffusion1, stock: Any, write_lora: WriteLora
) -> None:
    path = write_lora("one", **options)
    stock.load_lora_weights(str(path), adapter_name="one")
    stock.set_adapters(["one"], [scale])
    base, made = pixels(Engine(family), PLAIN, with_loras(LoraRef(path, scale)))
    assert difference(made, stock_pixels(stock)) < TOLERANCE
    assert difference(made, base) > 10 * TOLERANCE


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.usefixtures("each_kind_of_slot")
def test_two_loras_of_different_ranks_at_once_equal_the_stock_pipelines(
    family: StableDiffusion1, stock: Any, write_lora: WriteLora
) -> None:
    first = write_lora("first", seed=1, rank=2, alpha=1)
    second = write_lora("second", seed=2, rank=5, components=("unet", "text_encoder"))
    for name, path in (("first", first), ("second", second)):
        stock.load_lora_weights(str(path), adapter_name=name)
    stock.set_adapters(["first", "second"], [0.7, -0.5])
    [made] = pixels(Engine(family), with_loras(LoraRef(first, 0.7), LoraRef(second, -0.5)))
    assert difference(made, stock_pixels(stock)) < TOLERANCE


@pytest.mark.usefixtures("each_kind_of_slot")
def test_the_base_picture_is_bit_equal_before_beside_and_after_loras(
    family: StableDiffusion1, write_lora: WriteLora
) -> None:
    path = write_lora("one", components=("unet", "text_encoder"))
    engine = Engine(family)
    [before] = pixels(engine, PLAIN)
    _, beside = pixels(engine, with_loras(LoraRef(path)), PLAIN)
    [after] = pixels(engine, PLAIN)
    assert difference(before, beside) < 1e-5  # what the size of the batch alone makes
    assert torch.equal(before, after)


def test_requests_with_different_loras_each_get_their_own(family: StableDiffusion1, write_lora: WriteLora) -> None:
    first, second = write_lora("first", seed=1), write_lora("second", seed=2)
    requests = [with_loras(LoraRef(first)), PLAIN, with_loras(LoraRef(second)), with_loras(LoraRef(first, 0.2))]
    engine = Engine(family)
    together = pixels(engine, *requests)
    for request, made in zip(requests, together, strict=True):
        assert difference(made, pixels(engine, request)[0]) < TOLERANCE
    assert min(difference(together[0], other) for other in together[1:]) > 10 * TOLERANCE


@pytest.mark.usefixtures("each_kind_of_slot")
def test_the_same_lora_twice_counts_with_the_sum_of_its_scales(family: StableDiffusion1, write_lora: WriteLora) -> None:
    path = write_lora("one")
    twice, once = pixels(
        Engine(family), with_loras(LoraRef(path, 0.25), LoraRef(path, 0.5)), with_loras(LoraRef(path, 0.75))
    )
    assert torch.equal(twice, once)


def test_a_file_replaced_under_the_same_name_is_read_again(family: StableDiffusion1, write_lora: WriteLora) -> None:
    path = write_lora("one", seed=1)
    engine = Engine(family)
    [old] = pixels(engine, with_loras(LoraRef(path)))
    status = path.stat()
    write_lora("one", seed=2)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    [new] = pixels(engine, with_loras(LoraRef(path)))
    assert difference(old, new) > 10 * TOLERANCE


@pytest.mark.usefixtures("each_kind_of_slot")
def test_clearing_gives_every_layer_its_own_class_back(family: StableDiffusion1, write_lora: WriteLora) -> None:
    plain = [(name, type(module)) for name, module in family.unet.named_modules()]
    engine = Engine(family)
    pixels(engine, with_loras(LoraRef(write_lora("one", targets="all"))))
    assert [name for name, _ in family.unet.named_modules()] == [name for name, _ in plain]
    assert [(name, type(module)) for name, module in family.unet.named_modules()] != plain
    engine.clear_loras()
    assert [(name, type(module)) for name, module in family.unet.named_modules()] == plain
    assert len(engine.adapters) == 0


def test_a_lora_in_training_is_off_in_pictures_and_trains_on_after_them(
    family: StableDiffusion1, write_lora: WriteLora
) -> None:
    path = write_lora("one")
    engine = Engine(family, adapter_bytes_max=0)
    base, styled = pixels(engine, PLAIN, with_loras(LoraRef(path)))
    engine.clear_loras()
    lora = attach_lora(family, rank=2, alpha=2, dropout=0.5, components=("unet",))
    lora.load_state_dict({key: torch.full_like(value, 0.5) for key, value in lora.state_dict().items()})
    lora.set_dropout(True)
    made = pixels(engine, PLAIN, with_loras(LoraRef(path)))
    assert difference(made[0], base) < TOLERANCE
    assert difference(made[1], styled) < TOLERANCE
    trainable = {id(parameter) for parameter in family.unet.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in lora.parameters()}
    text = family.encode_prompts(["a"])
    torch.autograd.backward(family.predict(torch.ones(1, 4, 16, 16), torch.tensor([5]), text).sum())
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_previewing_the_lora_in_training_through_its_file_shows_it(family: StableDiffusion1, tmp_path: Path) -> None:
    engine = Engine(family)
    lora = attach_lora(family, rank=2, alpha=2)
    lora.load_state_dict({key: torch.full_like(value, 0.3) for key, value in lora.state_dict().items()})
    save_lora(tmp_path / "now.safetensors", lora.state_dict(), metadata=lora.metadata(title="now"))
    base, preview = pixels(engine, PLAIN, with_loras(LoraRef(tmp_path / "now.safetensors")))
    assert difference(base, preview) > 10 * TOLERANCE
    engine.clear_loras()
    lora.detach()
    [served] = pixels(engine, with_loras(LoraRef(tmp_path / "now.safetensors")))
    assert difference(preview, served) < TOLERANCE


def test_loading_a_lora_leaves_the_global_random_state_alone(family: StableDiffusion1, write_lora: WriteLora) -> None:
    path = write_lora("one")
    before = torch.get_rng_state()
    pixels(Engine(family), with_loras(LoraRef(path)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lora_for_another_model_is_refused_and_leaves_no_trace(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    state = {key: tensor.clone() for key, tensor in read_lora(write_lora("one")).state.items()}
    key = next(key for key in state if key.endswith("attn2.to_k.lora_A.weight"))
    engine = Engine(family)
    [before] = pixels(engine, PLAIN)
    wrong = {
        "wide": state | {key: torch.zeros(4, 768)},
        "deep": state | {k.replace("unet.mid_block", "unet.far_block"): v.clone() for k, v in state.items()},
        "other": {k.replace("unet.", "transformer."): v for k, v in state.items()},
        "norm": {"unet.conv_norm_out.lora_A.weight": torch.zeros(4, 16),
                 "unet.conv_norm_out.lora_B.weight": torch.zeros(16, 4)},
    }  # fmt: skip
    for name, weights in wrong.items():
        path = tmp_path / f"{name}.safetensors"
        save_lora(path, weights, metadata={})
        with pytest.raises(LoraMismatch):
            engine.generate([with_loras(LoraRef(path))])
    assert torch.equal(pixels(engine, PLAIN)[0], before)
    assert not any(isinstance(module, BaseTunerLayer) for module in family.unet.modules())


def test_a_missing_lora_file_is_an_error_without_its_path(family: StableDiffusion1, tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid) as caught:
        Engine(family).generate([with_loras(LoraRef(tmp_path / "gone.safetensors"))])
    assert str(tmp_path) not in str(caught.value)


def test_a_pictures_settings_name_its_loras_without_their_path(family: StableDiffusion1, write_lora: WriteLora) -> None:
    path = write_lora("one")
    [made] = Engine(family).generate([with_loras(LoraRef(path, 0.5), LoraRef(path, 0.1, name="mine"))])
    assert made.settings["loras"] == [{"name": "one", "scale": 0.5}, {"name": "mine", "scale": 0.1}]
