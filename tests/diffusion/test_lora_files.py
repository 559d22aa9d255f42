from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import LoraInvalid
from diffusion.families import StableDiffusion1
from diffusion.lora import read_lora, save_lora
from diffusion.lora_fit import fit_layers
from diffusion.lora_keys import LOHA
from diffusion.lora_settings import ADAPTER_METADATA_KEY

WriteLora = Callable[..., Path]
PAIR = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}


def kohya_names(path: str) -> str:
    component, _, module = path.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
    return prefix + module.replace(".", "_")


def write_kohya(path: Path, source: Path, alphas: Callable[[str], float]) -> dict[str, float]:
    """The LoRA in ``source`` under kohya's names, as sd-scripts writes them; returns the alphas by diffusers path."""
    state: dict[str, Tensor] = {}
    written: dict[str, float] = {}
    for module, layer in read_lora(source).layers().items():
        name = kohya_names(module)
        written[module] = alphas(module)
        state |= {
            f"{name}.lora_down.weight": layer.A,
            f"{name}.lora_up.weight": layer.B,
            f"{name}.alpha": torch.tensor(written[module]),
        }
    save_file(state, path)
    return written


def test_a_saved_file_reads_back_the_same(write_lora: WriteLora) -> None:
    lora = read_lora(write_lora("one", rank=3, alpha=6))
    assert (lora.rank, lora.source_format) == (3, "diffusers")
    assert set(lora.alphas.values()) == {6.0}
    assert lora.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (lora.metadata["ss_network_dim"], lora.metadata["ss_network_alpha"]) == ("3", "6")
    assert lora.metadata["modelspec.title"] == "one"


def test_weights_can_be_cast_when_saved(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_lora(path, PAIR, metadata={"note": "yes"}, dtype=torch.float16)
    lora = read_lora(path)
    assert {tensor.dtype for tensor in lora.state.values()} == {torch.float16}
    assert lora.metadata["note"] == "yes"


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_lora(path, PAIR, metadata={})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_lora(path, PAIR, metadata={"number": 3})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_settings_alpha_is_the_rank(tmp_path: Path) -> None:
    save_lora(tmp_path / "one.safetensors", PAIR, metadata={})
    assert read_lora(tmp_path / "one.safetensors").alphas == {"unet.conv_in": 2.0}


def test_peft_settings_decide_alpha_per_layer_and_rank_stabilised_scale(tmp_path: Path) -> None:
    state = PAIR | {key.replace("conv_in", "conv_out"): tensor.clone() for key, tensor in PAIR.items()}
    settings = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"^conv_out": 3}}
    path = tmp_path / "one.safetensors"
    save_lora(path, state, metadata={ADAPTER_METADATA_KEY: json.dumps(settings)})
    assert read_lora(path).alphas == {"unet.conv_in": 8.0, "unet.conv_out": 3.0}
    save_lora(path, state, metadata={ADAPTER_METADATA_KEY: json.dumps(settings | {"unet.use_rslora": True})})
    assert read_lora(path).alphas["unet.conv_in"] == pytest.approx(8 * math.sqrt(2))


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("diffusion_model.", {"transformer.lora_alpha": 8}),
        ("base_model.model.", {"unet.lora_alpha": 8}),
        ("", {"r": 2, "lora_alpha": 8}),
        ("lora_unet_", {"unet.lora_alpha": 3, "unet.alpha_pattern": {"conv_in": 8}}),
    ],
)
def test_peft_settings_are_found_for_names_that_tell_no_component(
    prefix: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    state = {key.replace("unet.", prefix): tensor for key, tensor in PAIR.items()}
    save_lora(path, state, metadata={ADAPTER_METADATA_KEY: json.dumps(settings)})
    assert list(read_lora(path).alphas.values()) == [8.0]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_kohya_file_is_read_with_every_layer_and_its_own_alpha(
    targets: str, write_lora: WriteLora, family: StableDiffusion1, tmp_path: Path
) -> None:
    source = write_lora("one", targets=targets, components=("unet", "text_encoder"))
    alphas = write_kohya(tmp_path / "kohya.safetensors", source, lambda module: 1.0 + len(module) % 3)
    lora = read_lora(tmp_path / "kohya.safetensors")
    assert lora.source_format == "kohya"
    expected = fit_layers(read_lora(source), family.lora_components)
    found = fit_layers(lora, family.lora_components)
    assert {name: set(layers) for name, layers in found.items()} == {n: set(layers) for n, layers in expected.items()}
    for component, layers in found.items():
        for path, layer in layers.items():
            assert layer.alpha == alphas[f"{component}.{path}"]
            assert torch.equal(layer.A, expected[component][path].A)
            assert torch.equal(layer.B, expected[component][path].B)


def test_a_kohya_picture_equals_the_stock_pipelines(
    write_lora: WriteLora, family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    source = write_lora("one")
    path = tmp_path / "kohya.safetensors"
    write_kohya(path, source, lambda _: 2.0)
    stock.load_lora_weights(str(path), adapter_name="one")
    expected = stock(
        "a", width=64, height=64, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(1),
        output_type="pt",
    ).images[0]  # fmt: skip
    request = GenerateRequest(prompt="a", width=64, height=64, steps=2, seed=1, loras=(LoraRef(path),))
    [made] = Engine(family).render([request])
    assert float((made.pixels_CHW - expected).abs().max()) < 1e-4


def test_what_diffusers_converts_to_kohya_reads_back(
    write_lora: WriteLora, family: StableDiffusion1, tmp_path: Path
) -> None:
    source = read_lora(write_lora("one"))
    path = tmp_path / "kohya.safetensors"
    save_file(convert_state_dict_to_kohya(dict(source.state)), path)
    expected, found = (fit_layers(lora, family.lora_components)["unet"] for lora in (source, read_lora(path)))
    assert found.keys() == expected.keys()
    assert {name: layer.alpha for name, layer in found.items()} == {n: layer.alpha for n, layer in expected.items()}


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_a_lokr_that_is_too_wide_for_a_pair_stays_a_product_of_two_matrices(
    is_decomposed: bool, tmp_path: Path
) -> None:
    w1, down, up = torch.randn(48, 48), torch.randn(40, 40), torch.randn(40, 40)
    second = {"lokr_w2_a": up, "lokr_w2_b": down} if is_decomposed else {"lokr_w2": up @ down}
    parts = {"lokr_w1": w1, "alpha": torch.tensor(10.0), **second}
    state = PAIR | {f"unet.x.to_q.{name}": tensor for name, tensor in parts.items()}
    save_lora(tmp_path / "one.safetensors", state, metadata={})
    lora = read_lora(tmp_path / "one.safetensors")
    assert lora.layers().keys() == {"unet.conv_in"}
    product = lora.products["unet.x.to_q"]
    assert (product.outs, product.ins, lora.rank) == (1920, 1920, 2)
    # As LyCORIS: alpha / rank counts only where a matrix is decomposed.
    torch.testing.assert_close(product.w1, w1 * (10 / 40 if is_decomposed else 1))
    torch.testing.assert_close(product.w2, up @ down)


def test_a_lokr_of_a_convolution_or_with_a_magnitude_has_a_pair(tmp_path: Path) -> None:
    whole = {"lokr_w1": torch.randn(16, 16), "lokr_w2": torch.randn(20, 20)}
    state = {f"unet.{path}.{name}": tensor.clone() for path in ("a.b", "a.c") for name, tensor in whole.items()}
    state |= {"unet.a.c.dora_scale": torch.ones(320), "unet.a.d.lokr_w1": torch.randn(16, 16)}
    state["unet.a.d.lokr_w2"] = torch.randn(20, 20, 3, 3)
    save_lora(tmp_path / "one.safetensors", state, metadata={})
    lora = read_lora(tmp_path / "one.safetensors")
    assert set(lora.products) == {"unet.a.b"}
    assert {path: layer.rank for path, layer in lora.layers().items()} == {"unet.a.c": 320, "unet.a.d": 320}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ""])
def test_pickle_formats_are_refused_unopened(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(LoraInvalid, match=r"only \.safetensors"):
        read_lora(tmp_path / f"missing{suffix}")
    with pytest.raises(LoraInvalid, match=r"only \.safetensors"):
        save_lora(tmp_path / f"new{suffix}", PAIR, metadata={})


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sly.safetensors"
    torch.save(PAIR, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(LoraInvalid, match="damaged"):
        read_lora(path)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_lora(path, PAIR, metadata={})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(LoraInvalid, match="damaged"):
        read_lora(path)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({}, "no LoRA weights"),
        ({"unet.conv_in.weight": torch.ones(2, 2)}, "unknown weight name"),
        ({"unet.conv_in.lora_A.weight": torch.ones(2, 4)}, "do not belong together"),
        (PAIR | {"unet.conv_in.lora_B.weight": torch.ones(8, 3, 1, 1)}, "do not belong together"),
        (PAIR | {"unet.conv_in.lora_A.weight": torch.full((2, 4, 3, 3), math.nan)}, "finite"),
        (PAIR | {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3, dtype=torch.int8)}, "finite"),
        (PAIR | {"unet.conv_in.lora_A.weight": torch.ones(2)}, "finite"),
        (PAIR | {"unet.conv_in.dora_scale": torch.ones(2)}, "DoRA magnitude"),
        (PAIR | {"unet.conv_in.dora_scale": torch.full((8,), math.inf)}, "finite"),
        (PAIR | {"unet.other.dora_scale": torch.ones(8)}, "no pair of weights for 'unet.other'"),
        (PAIR | {"unet.conv_in.dora_scale": torch.ones(1, 4, 1, 1)}, "one number per input.*wd_on_output=True"),
        (PAIR | {"unet.conv_in.lora_A.default.weight": torch.ones(2, 4, 3, 3)}, "a weight twice"),
        (PAIR | {f"base_model.model.{key}": tensor.clone() for key, tensor in PAIR.items()}, "a layer twice"),
        (PAIR | {"unet.conv_in.alpha": torch.ones(2)}, "alpha of 'unet.conv_in' is not one number"),
        (PAIR | {"unet.conv_in.alpha": torch.tensor(math.nan)}, "alpha of 'unet.conv_in' is not one number"),
        (PAIR | {"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "mixed with those of another kind"),
        (PAIR | {f"unet.conv_in.{name}": torch.ones(2, 2) for name in LOHA}, "mixed with those of another kind"),
        (PAIR | {"unet.conv_in.scalar": torch.ones(())}, "scalar is not supported: 'unet.conv_in.scalar'"),
        (PAIR | {"unet.conv_norm_out.diff_b": torch.ones(8)}, "difference of a weight.*'unet.conv_norm_out.diff_b'"),
        (PAIR | {"unet.conv_in.lora_B.bias": torch.ones(8)}, "with biases.*'unet.conv_in.lora_B.bias'"),
        ({"lora_unet_mid_block.lokr_w1": torch.ones(2, 2)}, "LoKr.*incomplete"),
        ({"lora_unet_mid_block.hada_w1_a": torch.ones(2, 2)}, "LoHa.*incomplete"),
        ({"lora_unet_mid_block.hada_t1": torch.ones(2, 2, 3, 3)}, "Tucker LoHa"),
        ({"lora_unet_mid_block.oft_blocks": torch.ones(2, 2)}, "OFT"),
        (
            {"x.lokr_w1": torch.ones(30, 30), "x.lokr_w2": torch.ones(60, 60), "x.dora_scale": torch.ones(1800)},
            "1800; 1536 is the most",
        ),
        ({"x.y.lokr_w1": torch.ones(4), "x.y.lokr_w2": torch.ones(6, 6)}, "not a matrix"),
        ({"x.y.lokr_w1": torch.ones(0, 5), "x.y.lokr_w2": torch.ones(60, 60)}, "have rank 0"),
        (
            {"x.y.lokr_w1": torch.ones(9, 9), "x.y.lokr_w2": torch.ones(60, 60), "x.y.alpha": torch.ones(2)},
            "one number",
        ),
        ({"x.y.lokr_w1": torch.ones(2, 2), "x.y.lokr_w2": torch.ones(6, 6), "x.y.alpha": torch.ones(2)}, "one number"),
        ({"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2)}, "'lora_unet_mid_block'.*one is missing"),
        ({"lora_unet_mid_block.other": torch.ones(2, 2)}, "unknown weight name 'lora_unet_mid_block.other'"),
        ({"lora_unet_mid_block.alpha": torch.ones(())}, "no pair of weights for 'lora_unet_mid_block'"),
    ],
)
def test_a_file_without_usable_weights_is_refused_with_the_reason(
    state: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "one.safetensors"
    save_file(state, path)
    with pytest.raises(LoraInvalid, match=reason) as caught:
        read_lora(path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("settings", ["{", "[]", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": 3}'])
def test_damaged_settings_are_refused(settings: str, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_lora(path, PAIR, metadata={ADAPTER_METADATA_KEY: settings})
    with pytest.raises(LoraInvalid, match="damaged"):
        read_lora(path)


def test_the_names_diffusers_used_before_peft_are_read(tmp_path: Path) -> None:
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    old = {
        "unet.mid_block.attentions.0.attn1.processor.to_q_lora.down.weight": a,
        "unet.mid_block.attentions.0.attn1.processor.to_q_lora.up.weight": b,
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight": a.clone(),
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight": b.clone(),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": a.clone(),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": b.clone(),
        "unet.mid_block.attentions.0.attn1.processor.to_out_lora.down.weight": a.clone(),
        "unet.mid_block.attentions.0.attn1.processor.to_out_lora.up.weight": b.clone(),
        "unet.mid_block.attentions.0.proj_in.lora.down.weight": a.clone(),
        "unet.mid_block.attentions.0.proj_in.lora.up.weight": b.clone(),
    }
    save_file(old, tmp_path / "old.safetensors")
    assert set(read_lora(tmp_path / "old.safetensors").alphas) == {
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "unet.mid_block.attentions.0.attn1.to_out.0",
        "unet.mid_block.attentions.0.proj_in",
        "unet.mid_block.attentions.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    }
