"""Small random-weight Stable Diffusion folders made of the real component classes, and the stock pipeline on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.adapter import attach_lora
from diffusion.families import StableDiffusion1, load_family
from diffusion.lora import save_lora
from diffusion.testing import write_clip_tokenizer


def pytest_configure(config: pytest.Config) -> None:
    # Raised inside diffusers' schedulers, which hand torch tensors to numpy.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_model(folder: Path, prediction_type: str) -> Path:
    torch.manual_seed(11)
    tokenizer = write_clip_tokenizer(folder / "words")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=4, sample_size=64, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.7,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By prediction type."""
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture
def model_folder(model_folders: dict[str, Path]) -> Path:
    return model_folders["v_prediction"]


@pytest.fixture(scope="session")
def loaded_family(model_folders: dict[str, Path]) -> StableDiffusion1:
    loaded = load_family(model_folders["v_prediction"], device="cpu", dtype=torch.float32)
    assert isinstance(loaded, StableDiffusion1)
    return loaded


@pytest.fixture
def family(loaded_family: StableDiffusion1) -> StableDiffusion1:
    """A copy, which a test may change; copying is several times faster than loading."""
    # The tokenizer stays shared: a copied one decodes differently (its decoder is lost).
    return copy.deepcopy(loaded_family, {id(loaded_family.tokenizer): loaded_family.tokenizer})


@pytest.fixture(scope="session")
def load_stock() -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


@pytest.fixture(scope="session")
def loaded_stock(model_folders: dict[str, Path], load_stock: Callable[[Path], Any]) -> Any:
    return load_stock(model_folders["v_prediction"])


@pytest.fixture
def stock(loaded_stock: Any) -> Any:
    return copy.deepcopy(loaded_stock)


@pytest.fixture
def write_lora(family: StableDiffusion1, tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA of random weights, strong enough to change a picture, and takes it off the family again."""

    def write(name: str, *, seed: int = 5, **options: Any) -> Path:
        lora = attach_lora(family, seed=seed, **{"rank": 4, "alpha": 4, **options})
        generator = torch.Generator().manual_seed(seed)
        state = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in lora.state_dict().items()}
        save_lora(tmp_path / f"{name}.safetensors", state, metadata=lora.metadata(title=name))
        lora.detach()
        return tmp_path / f"{name}.safetensors"

    return write
