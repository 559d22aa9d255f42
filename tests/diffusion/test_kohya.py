"""Adapters under kohya's key names, read back by stock diffusers and by us."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.adapter import ConvLora, attach_lora
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.kohya import to_kohya
from diffusion.lora import LoraLayer, read_lora, save_lora
from diffusion.lora_fit import fit_layers
from diffusion.lora_header import judge
from diffusion.testing import write_tiny_model


def write_adapter(family: Family, path: Path, **options: Any) -> None:
    lora = attach_lora(family, **({"rank": 2, "alpha": 1.0, "targets": "all"} | options))
    generator = torch.Generator().manual_seed(5)
    state = {
        # A magnitude near the layer's own, so that the model still answers in numbers.
        k: t * (1 + 0.1 * torch.randn(t.shape, generator=generator)) if t.ndim == 1
        else 0.3 * torch.randn(t.shape, generator=generator)
        for k, t in lora.state_dict().items()
    }  # fmt: skip
    save_lora(path, state, metadata=lora.metadata(title="a"))
    lora.detach()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", {"components": ["unet", "text_encoder"], "conv": ConvLora(3, 1.5)}),
        ("sdxl", {"components": ["unet", "text_encoder", "text_encoder_2"], "conv": ConvLora(1, 1.0)}),
        # diffusers cuts the single blocks' joined layer at FLUX.1's own widths: see the test below.
        ("flux1", {"only_if_contains": ["transformer.transformer_blocks"]}),
        ("flux1", {"components": ["text_encoder"]}),
        ("flux2_klein", {"alpha": 3.0}),
        ("flux2_dev", {}),
        ("z_image", {}),
        ("qwen_image", {}),
    ],
)
def test_both_key_formats_give_the_same_picture_in_the_stock_pipeline(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_tiny_model(name, tmp_path)
    family = load_family(folder, device="cpu", dtype=torch.float32)
    ours, theirs = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    write_adapter(family, ours, **options)
    state = to_kohya(read_lora(ours).layers(), family)
    assert all(key.startswith("lora_") for key in state)
    if name == "sdxl":
        assert not any("down_blocks" in key or "up_blocks" in key or "mid_block" in key for key in state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, theirs)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for path in (ours, theirs):
        pipe.load_lora_weights(str(path))
        generator = torch.Generator().manual_seed(1)
        pictures.append(
            pipe(
                prompt="a ring", width=32, height=32, num_inference_steps=2, generator=generator, output_type="pt"
            ).images[0]
        )  # fmt: skip
        pipe.unload_lora_weights()
    plain = pipe(
        prompt="a ring", width=32, height=32, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]  # fmt: skip
    assert float((pictures[0] - pictures[1]).abs().max()) <= 2e-5
    assert float((pictures[0] - plain).abs().max()) > 1e-4


def _effects(path: Path, family: Family) -> dict[str, torch.Tensor]:
    """What the file's LoRA adds to each layer's weight."""
    fitted = fit_layers(read_lora(path), family.lora_components)
    return {
        f"{component}.{name}": layer.alpha / layer.rank * layer.B.flatten(1) @ layer.A.flatten(1)
        for component, layers in fitted.items()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd1", {"components": ["unet", "text_encoder"], "conv": ConvLora(3, 1.5)}),
        ("sdxl", {"components": ["unet", "text_encoder", "text_encoder_2"], "conv": ConvLora(3, 1.5)}),
        ("flux1", {"alpha": 3.0}),
        ("flux1", {"components": ["text_encoder"]}),
        ("flux2_klein", {"alpha": 3.0}),
        ("flux2_dev", {"targets": "attention"}),
        ("sd3", {"alpha": 3.0, "components": ["transformer", "text_encoder", "text_encoder_2"]}),
        ("sd3", {"only_if_contains": ["attn.to_q", "attn.to_v", "ff.net"]}),
        ("qwen_image", {"alpha": 3.0}),
        ("z_image", {}),
    ],
)
def test_a_kohya_file_is_read_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    family = load_family(write_tiny_model(name, tmp_path), device="cpu", dtype=torch.float32)
    ours, theirs = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    write_adapter(family, ours, **options)
    state = to_kohya(read_lora(ours).layers(), family)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, theirs)
    assert name in judge({key: tuple(tensor.shape) for key, tensor in state.items()}, {}).families
    written, read = _effects(ours, family), _effects(theirs, family)
    assert written.keys() == read.keys()
    assert all(torch.allclose(written[path], read[path], atol=1e-5) for path in written)


@dataclass
class Wide:
    """A transformer of real width, of which no weight is ever made."""

    name: str
    denoiser: torch.nn.Module


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_stock_diffusers_reads_the_single_blocks_of_a_flux1_of_real_width(tmp_path: Path) -> None:
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=2)
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for block, part in itertools.product(range(2), ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")):
        path = f"single_transformer_blocks.{block}.{part}"
        if path != "single_transformer_blocks.1.attn.to_k":
            outs, ins = transformer.get_submodule(path).weight.shape
            A, B = torch.randn(2, ins, generator=generator), torch.randn(outs, 2, generator=generator)
            layers[f"transformer.{path}"] = LoraLayer(A, B, 0.5)
    wide: Any = Wide("flux1", transformer)
    state = to_kohya(layers, wide)
    assert "lora_unet_single_blocks_1_linear1.alpha" in state
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "a.safetensors")
    read = diffusers.FluxPipeline.lora_state_dict(str(tmp_path / "a.safetensors"))
    transformer.load_lora_adapter(dict(read), prefix="transformer")
    found = {key.removesuffix(".lora_A.weight") for key in read if key.endswith("lora_A.weight")}
    assert layers.keys() <= found
    rows = slice(None, 200)  # of each layer's outputs: the whole product has as many elements as the model
    for path in found:
        effect = read[f"{path}.lora_B.weight"][rows] @ read[f"{path}.lora_A.weight"]
        if path in layers:
            expected = layers[path].alpha / 2 * layers[path].B[rows] @ layers[path].A
            torch.testing.assert_close(effect, expected, atol=1e-5, rtol=1e-4)
        else:
            assert not effect.any()


def test_stacked_layers_of_flux_keep_their_parts_effects(tmp_path: Path) -> None:
    family = load_family(write_tiny_model("flux1", tmp_path), device="cpu", dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    write_adapter(family, path, only_if_contains=["single_transformer_blocks.1"])
    layers = read_lora(path).layers()
    state = to_kohya(layers, family)
    name = "lora_unet_single_blocks_1_linear1"
    rank = state[f"{name}.lora_down.weight"].shape[0]
    scale = float(state[f"{name}.alpha"]) / rank
    whole = scale * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    block = "transformer.single_transformer_blocks.1"
    parts = [
        layer.alpha / layer.rank * layer.B @ layer.A
        for layer in (layers[f"{block}.{part}"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_sd3s_joined_layers_are_those_of_the_original_model(tmp_path: Path) -> None:
    family = load_family(write_tiny_model("sd3", tmp_path), device="cpu", dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    write_adapter(family, path)
    layers = read_lora(path).layers()
    state = to_kohya(layers, family)
    name, block = "lora_unet_joint_blocks_0_context_block_attn_qkv", "transformer.transformer_blocks.0.attn"
    scale = float(state[f"{name}.alpha"]) / state[f"{name}.lora_down.weight"].shape[0]
    whole = scale * state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    parts = [layers[f"{block}.{part}"] for part in ("add_q_proj", "add_k_proj", "add_v_proj")]
    assert torch.allclose(whole, torch.cat([p.alpha / p.rank * p.B @ p.A for p in parts]), atol=1e-5)
    # The last block has no context after its attention.
    assert "lora_unet_joint_blocks_1_context_block_attn_proj.alpha" not in state
    assert "lora_unet_joint_blocks_1_context_block_attn_qkv.alpha" in state


def test_a_family_without_convolutions_says_so(tmp_path: Path) -> None:
    family = load_family(write_tiny_model("sd3", tmp_path), device="cpu", dtype=torch.float32)
    with pytest.raises(SettingNotSupported, match="convolutions"):
        attach_lora(family, rank=2, alpha=2, conv=ConvLora(2, 2.0))


def test_only_the_layers_that_pass_the_filters_are_adapted(tmp_path: Path) -> None:
    family = load_family(write_tiny_model("flux1", tmp_path), device="cpu", dtype=torch.float32)
    lora = attach_lora(
        family, rank=2, alpha=2, targets="all", only_if_contains=["single_transformer_blocks.0"],
        ignore_if_contains=["proj_mlp"],
    )  # fmt: skip
    names = {name.split(".lora_")[0] for name, _ in lora.named_parameters()}
    assert names
    assert all("single_transformer_blocks.0." in name and "proj_mlp" not in name for name in names)
    lora.detach()
    with pytest.raises(SettingNotSupported, match="no layer"):
        attach_lora(family, rank=2, alpha=2, only_if_contains=["nowhere"])


def test_a_dora_gives_the_same_picture_here_as_in_the_stock_pipeline(tmp_path: Path) -> None:
    folder = write_tiny_model("flux1", tmp_path)
    family = load_family(folder, device="cpu", dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    write_adapter(family, path, dora=True)
    assert any("magnitude" in key for key in load_file(path))
    with pytest.raises(SettingNotSupported, match="DoRA"):
        to_kohya(read_lora(path).layers(), family)
    request = GenerateRequest(
        prompt="a ring", width=32, height=32, steps=2, guidance_scale=3.0, seed=1, loras=(LoraRef(path),)
    )
    ours = Engine(family).render([request])[0].pixels_CHW
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(path))
    theirs = pipe(
        "a ring", width=32, height=32, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1), output_type="pt",
    ).images[0]  # fmt: skip
    assert float((ours - theirs).abs().max()) <= 2e-5
