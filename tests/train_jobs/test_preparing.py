from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion.adapter import attach_lora
from diffusion.errors import SettingNotSupported
from diffusion.families import Family, load_family
from diffusion.kohya import to_kohya
from diffusion.lora import read_lora, save_lora
from diffusion.lora_fit import fit_layers
from diffusion.testing import write_tiny_model
from storage.datasets import write_dataset
from storage.jobs import utc_now
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS
from tests.train_jobs.ui_files import ui_file
from train_jobs.aitoolkit import parse_train_yaml
from train_jobs.artifacts import Artifacts
from train_jobs.errors import ModelNotAvailable
from train_jobs.preparing import begin_from, load_model, read_pictures, without_effect
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("flux1", tmp_path_factory.mktemp("flux1"))


def _spec(**fields: Any) -> TrainSpec:
    plain = {"name": "a", "model": "m", "datasets": [{"dataset": "cats"}], "network": {"rank": 2}}
    return spec_from_json(TrainSpec, plain | fields)


def _gradients(family: Family, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *family.latent_shape(32, 32), generator=generator)
    with torch.no_grad():
        text = family.encode_prompts(["a"])
    for index, parameter in enumerate(parameters.values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.1
        parameter.grad = None
    family.predict(latents, torch.tensor([400.0]), text).square().mean().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def test_masks_are_those_of_the_pinned_upload(
    store: InMemoryStore, runner: LoopThread, write_pictures: Callable[..., Path], tmp_path: Path
) -> None:
    def uploaded(dataset: str, side_px: int) -> str:
        folder = write_pictures((side_px, side_px), name=f"{dataset}-{side_px}", captions=False)
        files = [(path.name, path, None) for path in folder.iterdir()]
        return runner.run_blocking(write_dataset(store, KEYS, dataset, files, now=utc_now())).upload_id

    dataset = {"dataset": "cats", "upload_id": uploaded("cats", 32), "mask_dataset": "masks"}
    dataset["mask_upload_id"] = uploaded("masks", 32)
    later = uploaded("masks", 16)
    assert later > dataset["mask_upload_id"]
    pictures = read_pictures(_spec(datasets=[dataset]), Artifacts(store, runner, KEYS, JOB, tmp_path / "scratch"), {})
    assert pictures.uploads == {"cats": dataset["upload_id"], "masks": dataset["mask_upload_id"]}


def test_a_model_of_another_family_than_the_config_says_is_refused(flux: Path) -> None:
    with pytest.raises(ModelNotAvailable, match="flux1"):
        load_model(_spec(family="sdxl"), {"m": str(flux)}, CPU, paths_allowed=False)
    family, _ = load_model(_spec(family="flux1"), {"m": str(flux)}, CPU, paths_allowed=False)
    assert family.name == "flux1"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("z_image", {"train": {"train_text_encoder": True}}),
        ("z_image", {"network": {"only_if_contains": ["nowhere"]}}),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path)
    with pytest.raises(SettingNotSupported):
        load_model(_spec(**change), {"m": str(folder)}, CPU, paths_allowed=False)


@pytest.mark.parametrize(("name", "is_told"), [("flux1", True), ("sd1", False)])
def test_a_conv_rank_for_a_model_without_convolutions_is_left_out_and_said(
    name: str, is_told: bool, tmp_path: Path
) -> None:
    folder = write_tiny_model(name, tmp_path)
    spec = _spec(network={"conv_rank": 4})
    family, lora = load_model(spec, {"m": str(folder)}, CPU, paths_allowed=False)
    assert bool(without_effect(spec, family)) == is_told
    assert any("conv1" in parameter for parameter, _ in lora.named_parameters()) == (not is_told)


def test_a_configs_locon_adapts_what_lies_in_the_unets_blocks(tmp_path: Path) -> None:
    folder = write_tiny_model("sdxl", tmp_path)
    found: dict[str, set[str]] = {}
    for kind in ("lora", "locon"):
        text = ui_file("sdxl", network__type=kind, network__linear=2, network__conv=3, model__name_or_path="m")
        _, lora = load_model(parse_train_yaml(text).spec, {"m": str(folder)}, CPU, paths_allowed=False)
        found[kind] = {name.split(".lora_")[0] for name, _ in lora.named_parameters()}
    outside = {"conv_in", "conv_out", *(f"{part}_embedding.linear_{n}" for part in ("time", "add") for n in (1, 2))}
    assert found["lora"] - found["locon"] == {f"unet.{name}" for name in outside}
    assert all("_blocks." in name or "mid_block." in name for name in found["locon"])


@pytest.mark.parametrize("initial", ["gaussian", "uniform"])
def test_an_adapter_begins_with_the_weights_that_were_asked_for(flux: Path, initial: str) -> None:
    spec = _spec(network={"rank": 64, "initial": initial})
    _, lora = load_model(spec, {"m": str(flux)}, CPU, paths_allowed=False)
    for name, parameter in lora.named_parameters():
        if name.endswith(".lora_B.weight"):
            assert not parameter.any()
        elif initial == "uniform":
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound
        else:
            assert float(parameter.detach().std()) == pytest.approx(1 / 64, rel=0.2)


def test_the_guidance_embedding_is_bypassed_where_there_is_one(flux: Path, tmp_path: Path) -> None:
    spec = _spec(train={"bypass_guidance_embedding": True})
    family, _ = load_model(spec, {"m": str(flux)}, CPU, paths_allowed=False)
    assert family.bypasses_guidance
    assert without_effect(spec, family) == []
    assert not load_model(_spec(), {"m": str(flux)}, CPU, paths_allowed=False)[0].bypasses_guidance
    other = write_tiny_model("z_image", tmp_path)
    family, _ = load_model(spec, {"m": str(other)}, CPU, paths_allowed=False)
    assert "FLUX.1" in without_effect(spec, family)[0]


@pytest.mark.parametrize(("chosen", "parts"), [([2], {"unet", "text_encoder_2"}), ([], {"unet"})])
def test_only_the_chosen_text_encoders_are_adapted(chosen: list[int], parts: set[str], tmp_path: Path) -> None:
    folder = write_tiny_model("sdxl", tmp_path)
    spec = _spec(train={"train_text_encoder": True, "trained_text_encoders": chosen})
    _, lora = load_model(spec, {"m": str(folder)}, CPU, paths_allowed=False)
    assert {name.partition(".")[0] for name, _ in lora.named_parameters()} == parts


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inside torch
def test_checkpointed_and_compiled_denoisers_have_the_same_gradients(flux: Path) -> None:
    models = {"m": str(flux)}
    family, lora = load_model(_spec(), models, CPU, paths_allowed=False)
    plain = _gradients(family, dict(lora.named_parameters()))
    checkpointing: Any = family.denoiser
    checkpointing.enable_gradient_checkpointing()
    assert checkpointing.is_gradient_checkpointing
    again = _gradients(family, dict(lora.named_parameters()))
    # Compiled blocks, run eagerly: what is compared is that the blocks are the adapted ones.
    torch.compiler.set_stance("force_eager")
    try:
        compiled, compiled_lora = load_model(_spec(train={"compile": True}), models, CPU, paths_allowed=False)
        blocks = list(compiled.denoiser.get_submodule("transformer_blocks"))
        assert all(block._compiled_call_impl is not None for block in blocks)
        third = _gradients(compiled, dict(compiled_lora.named_parameters()))
    finally:
        torch.compiler.set_stance("default")
    assert plain.keys() == again.keys() == third.keys()
    for other in (again, third):
        assert max(float((plain[name] - other[name]).abs().max()) for name in plain) <= 1e-6


def test_half_precision_loads_as_such_where_there_is_a_gpu(flux: Path) -> None:
    assert load_family(flux, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    family, lora = load_model(_spec(train={"dtype": "bf16"}), {"m": str(flux)}, CPU, paths_allowed=False)
    assert family.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in lora.parameters())


def test_a_bf16_model_trains_its_adapter_in_full_precision(flux: Path) -> None:
    family = load_family(flux, device="cpu", dtype=torch.bfloat16)
    lora = attach_lora(family, rank=2, alpha=2, targets="all")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = _gradients(family, dict(lora.named_parameters()))
    assert gradients
    assert all(
        gradient.dtype == torch.float32 and bool(torch.isfinite(gradient).all()) for gradient in gradients.values()
    )


@pytest.mark.parametrize("kohya", [False, True])
def test_a_training_begins_with_the_effect_of_a_file_whatever_its_alpha_and_names(kohya: bool, tmp_path: Path) -> None:
    family = load_family(write_tiny_model("flux1", tmp_path), device="cpu", dtype=torch.float32)
    path = tmp_path / "a.safetensors"
    first = attach_lora(family, rank=2, alpha=6.0)
    first.load_state_dict({key: torch.randn_like(tensor) for key, tensor in first.state_dict().items()})
    save_lora(path, first.state_dict(), metadata=first.metadata(title="a"))
    first.detach()
    expected = fit_layers(read_lora(path), family.lora_components)["transformer"]
    if kohya:
        save_file({k: t.contiguous() for k, t in to_kohya(read_lora(path).layers(), family).items()}, path)
    lora = attach_lora(family, rank=2, alpha=1.0)
    begin_from(lora, family, path)
    state = lora.state_dict()
    for name, layer in expected.items():
        A, B = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(0.5 * B @ A, 3 * layer.B @ layer.A, atol=1e-4, rtol=1e-4)
    lora.detach()
