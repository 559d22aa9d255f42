"""A very small Stable Diffusion folder with random weights, and folders of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion.families import Family, load_family
from diffusion.testing import write_clip_tokenizer
from storage.datasets import write_dataset
from storage.loop_thread import LoopThread
from storage.objects import ObjectStore
from storage.settings import BreakerSettings, S3Settings
from storage.testing import InMemoryStore
from tests.train_jobs.training_runs import JOB, KEYS, NOW, Told
from train_jobs.artifacts import Artifacts
from train_jobs.loop import Alone
from train_jobs.spec import TrainSpec
from train_jobs.spec_json import spec_from_json
from train_jobs.training import Training
from train_jobs.worker import WorkerConfig


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


@pytest.fixture
def spec(store: InMemoryStore, runner: LoopThread, write_pictures: Callable[..., Path]) -> TrainSpec:
    folder = write_pictures((32, 32), (32, 32), (32, 16))
    files = [(path.name, path, None) for path in sorted(folder.iterdir())]
    runner.run_blocking(write_dataset(store, KEYS, "cats", files, now=NOW))
    return spec_from_json(
        TrainSpec,
        {
            "name": "my_lora",
            "model": "tiny",
            "datasets": [{"dataset": "cats", "resolutions_px": [32], "bucket_step_px": 8, "trigger_word": "ohwx"}],
            "network": {"rank": 2, "alpha": 4},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "dtype": "bf16"},
            "save": {"every_steps": 2, "keep": 1, "dtype": "fp16"},
            "sample": {
                "previews": [{"prompt": "ohwx a cat"}, {"prompt": "a dog", "seed": 9}],
                "every_steps": 2,
                "width_px": 16,
                "height_px": 16,
                "steps": 2,
                "walk_seed": True,
                "format": "png",
            },
            "trigger_word": "ohwx",
        },
    )


@pytest.fixture
def train(
    store: InMemoryStore, runner: LoopThread, model_folder: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    count = iter(range(100))

    def run(
        spec: TrainSpec,
        reporter: Told | None = None,
        *,
        reports: list[Any] | None = None,
        objects: ObjectStore = store,
        process_id: str = JOB,
    ) -> dict[str, Any]:
        scratch = tmp_path / f"scratch-{next(count)}"
        scratch.mkdir()
        config = WorkerConfig(
            process_id=process_id,
            tenant="default",
            spec=spec.model_dump(mode="json"),
            models={"tiny": str(model_folder)},
            paths_allowed=False,
            s3=S3Settings(),
            breaker=BreakerSettings(),
            use_gpu=False,
        )
        return Training(
            config,
            Artifacts(objects, runner, KEYS, process_id, scratch, continues=spec.continues),
            scratch,
            torch.device("cpu"),
            Alone(),
            reporter or Told(),
            agree=lambda value: value,
            report_to_train=(reports if reports is not None else []).append,
        ).run()

    return run
