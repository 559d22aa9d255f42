"""A very small Stable Diffusion folder with random weights, and folders of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.families import Family, load_family
from diffusion.testing import write_clip_tokenizer
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store() -> InMemoryStore:
    return InMemoryStore()


@pytest.fixture
def runner() -> Iterator[LoopThread]:
    thread = LoopThread("test")
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    tokenizer = write_clip_tokenizer(folder / "words", length=16)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, sample_size=32, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model", safe_serialization=True)
    return folder / "model"


@pytest.fixture
def family(model_folder: Path) -> Family:
    return load_family(model_folder, device="cpu", dtype=torch.float32)


@pytest.fixture
def write_pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes plain pictures of the given sizes, `p0.png` and so on, with captions unless told otherwise."""

    def write(*sizes: tuple[int, int], name: str = "pictures", captions: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (40 * i % 256, 200 - 30 * i % 200, 90)).save(folder / f"p{i}.png")
            if captions:
                (folder / f"p{i}.txt").write_text(f"picture {i}")
        return folder

    return write
