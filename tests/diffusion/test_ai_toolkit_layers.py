"""Which layers ai-toolkit adapts, by its rule (`toolkit/lora_special.py`), and that they go into a file and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion.adapter import ConvLora, TrainableLora, attach_lora
from diffusion.families import Family, load_family
from diffusion.kohya import to_kohya
from diffusion.lora import read_lora, save_lora
from diffusion.lora_fit import fit_layers
from diffusion.testing import MAKERS, write_tiny_model

BLOCKS = {
    "sd3": "transformer_blocks",
    "flux1": "transformer_blocks",
    "flux2_klein": "transformer_blocks",
    "flux2_dev": "transformer_blocks",
    "qwen_image": "transformer_blocks",
    "z_image": "layers",
}
"""What the name of an adapted layer holds; of FLUX.2 the blocks have other names there, and are the same."""


@pytest.fixture(params=sorted(MAKERS))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return load_family(write_tiny_model(request.param, tmp_path / "model"), device="cpu", dtype=torch.float32)


def _adapted(lora: TrainableLora) -> dict[str, int]:
    """Ranks by layer."""
    end = ".lora_A.weight"
    return {name.removesuffix(end): p.shape[0] for name, p in lora.named_parameters() if name.endswith(end)}


def _expected(family: Family, rank: int, conv_rank: int | None) -> dict[str, int]:
    denoiser = next(iter(family.lora_components))
    ranks: dict[str, int] = {}
    for name, module in family.denoiser.named_modules():
        is_small = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if BLOCKS.get(family.name, "") not in name:
            continue
        if isinstance(module, nn.Linear) or is_small:
            ranks[f"{denoiser}.{name}"] = rank
        elif isinstance(module, nn.Conv2d) and conv_rank is not None:
            ranks[f"{denoiser}.{name}"] = conv_rank
    return ranks


def test_the_layers_of_ai_toolkit_are_adapted_and_no_others(family: Family) -> None:
    expected = _expected(family, 2, None)
    assert _adapted(attach_lora(family, rank=2, alpha=2, targets="ai_toolkit")) == expected


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_conv_rank_is_for_all_other_convolutions_of_a_unet(name: str, tmp_path: Path) -> None:
    family = load_family(write_tiny_model(name, tmp_path), device="cpu", dtype=torch.float32)
    expected = _expected(family, 2, 3)
    assert set(expected.values()) == {2, 3}
    assert _adapted(attach_lora(family, rank=2, alpha=2, targets="ai_toolkit", conv=ConvLora(3, 3.0))) == expected


def test_they_go_into_a_file_and_come_back(family: Family, tmp_path: Path) -> None:
    components = list(family.lora_components)
    conv = ConvLora(3, 6.0) if family.conv_target_modules(components[0]) else None
    lora = attach_lora(family, rank=2, alpha=1, targets="ai_toolkit", components=components, conv=conv)
    state = {name: torch.randn(tensor.shape) for name, tensor in lora.state_dict().items()}
    path = tmp_path / "a.safetensors"
    save_lora(path, state, metadata=lora.metadata(title="a"))
    adapted = _adapted(lora)
    lora.detach()
    fitted = fit_layers(read_lora(path), family.lora_components)
    read = {f"{component}.{name}": layer for component, layers in fitted.items() for name, layer in layers.items()}
    assert {name: layer.rank for name, layer in read.items()} == adapted
    for name, layer in read.items():
        assert torch.equal(layer.A, state[f"{name}.lora_A.weight"])
        assert torch.equal(layer.B, state[f"{name}.lora_B.weight"])
        assert layer.alpha == (6 if layer.rank == 3 else 1)
    kohya = to_kohya(read_lora(path).layers(), family)
    save_file({key: tensor.contiguous() for key, tensor in kohya.items()}, tmp_path / "kohya.safetensors")
    again = fit_layers(read_lora(tmp_path / "kohya.safetensors"), family.lora_components)
    assert {f"{component}.{name}" for component, layers in again.items() for name in layers} == adapted.keys()
