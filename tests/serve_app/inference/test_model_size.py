"""What a model will take, against what it takes once it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion.errors import ModelNotFound
from diffusion.families import load_family
from diffusion.quantized import Quantization, Weights
from diffusion.testing import MAKERS, write_tiny_model
from serve_app.inference.model_size import MIB, ModelSize


def stored_bytes(tensor: Any) -> int:
    """Of a rounded tensor, its integers and scales."""
    inner = [getattr(tensor, name) for name in ("qdata", "scale", "zero_point") if hasattr(tensor, name)]
    state = getattr(tensor, "quant_state", None)
    return sum(part.nbytes for part in inner if isinstance(part, Tensor)) or tensor.data.nbytes + (
        0 if state is None else state.absmax.nbytes
    )


def loaded_bytes(folder: Path, dtype: torch.dtype, quantization: Quantization | None) -> int:
    family = load_family(folder, device="cpu", dtype=dtype, quantization=quantization)
    parts = [part for part in vars(family).values() if isinstance(part, nn.Module)]
    return sum(stored_bytes(p) for p in {id(p): p for part in parts for p in part.parameters()}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("flux1", tmp_path_factory.mktemp("flux"), width=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_that_of_the_dtype_that_the_model_is_loaded_in(folder: Path, dtype: torch.dtype) -> None:
    size = ModelSize(dtype)
    assert size.whole(0)(str(folder)) == pytest.approx(loaded_bytes(folder, dtype, None), rel=0.01)
    assert size.whole(3)(str(folder)) == size.whole(0)(str(folder)) + 3 * MIB
    assert size.largest_part(0)(str(folder)) == max(size.part_bytes(str(folder)).values())


@pytest.mark.parametrize(("weights", "package"), [("int8", "torchao"), ("float8", "torchao"), ("nf4", "bitsandbytes")])
def test_rounded_weights_count_as_what_they_become(folder: Path, weights: Weights, package: str) -> None:
    pytest.importorskip(package)
    quantization = Quantization(weights, None)
    expected = ModelSize(torch.float32, quantization).whole(0)(str(folder))
    loaded = loaded_bytes(folder, torch.float32, quantization)
    assert expected == pytest.approx(loaded, rel=0.05)
    assert expected < 0.6 * ModelSize(torch.float32).whole(0)(str(folder))


@pytest.mark.parametrize("name", MAKERS)
def test_the_size_of_every_family_is_that_of_the_parts_it_loads(name: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path)
    size = ModelSize(torch.float32)
    expected = size.part_bytes(str(folder))
    family = load_family(folder, device="cpu", dtype=torch.float32)
    parts = [part for part in vars(family).values() if isinstance(part, nn.Module)]
    tensors = {tensor.data_ptr(): tensor for part in parts for tensor in part.state_dict().values()}
    assert sum(expected.values()) == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.01)
    weights = next((folder / "vae").glob("*.safetensors")).read_bytes()
    for file in ("flux1-dev.safetensors", "safety_checker/model.safetensors", "text_encoders/t5.safetensors"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(weights)
    assert size.part_bytes(str(folder)) == expected


def test_a_folder_that_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="model_index"):
        ModelSize(torch.float32).part_bytes(str(tmp_path))


def test_the_same_weights_in_two_files_count_once_and_an_unreadable_file_as_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    weights = next((folder / "vae").glob("*.safetensors"))
    for name in ("a.safetensors", "a.fp16.safetensors"):
        (tmp_path / "vae").mkdir(exist_ok=True)
        (tmp_path / "vae" / name).write_bytes(weights.read_bytes())
    assert ModelSize(torch.float32).part_bytes(str(tmp_path))["vae"] == pytest.approx(weights.stat().st_size, rel=0.1)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "b.safetensors").write_bytes(bytes(30))
    assert ModelSize(torch.float32).part_bytes(str(tmp_path))["transformer"] == 30
