"""How much each noise level counts in the loss of a flow model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.families import Family, load_family
from diffusion.families.flow_weights import weight_at
from diffusion.testing import write_tiny_model
from train_jobs.cache import TrainingCache, build_cache
from train_jobs.data import plan_uses, read_folder
from train_jobs.samples import Sampler
from train_jobs.spec import DatasetSpec, OptimizeSpec, TimestepSpec


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return load_family(write_tiny_model("z_image", tmp_path / "model"), device="cpu", dtype=torch.float32)


@pytest.fixture
def cache(family: Family, write_pictures: Callable[..., Path]) -> TrainingCache:
    spec = DatasetSpec(dataset="cats", resolutions_px=(32,), bucket_step_px=16)
    uses = plan_uses(read_folder(write_pictures((32, 32), (32, 32)), spec), spec, size_multiple=family.size_multiple)
    built = build_cache(family, uses)
    assert built is not None
    return built


def _sampler(family: Family, cache: TrainingCache, weighting: str) -> Sampler:
    timesteps = TimestepSpec.model_validate({"kind": "linear", "weighting": weighting})
    return Sampler(family, cache, OptimizeSpec(dtype="fp32", timesteps=timesteps))


@pytest.mark.parametrize("weighting", ["bell", "measured"])
@torch.no_grad()
def test_a_weighting_multiplies_each_samples_loss_and_not_the_validations(
    family: Family, cache: TrainingCache, weighting: str
) -> None:
    plain, weighted = _sampler(family, cache, "none"), _sampler(family, cache, weighting)
    drawn = [plain._draw(entry, 0, plain._levels, 0.0).timestep_1 for entry in (0, 1)]
    expected = plain.losses([0, 1], 0) * weight_at(torch.cat(drawn), weighting)  # type: ignore[arg-type]
    assert torch.allclose(weighted.losses([0, 1], 0), expected, rtol=1e-5)
    assert torch.equal(weighted.validation_losses([0, 1], 0.25), plain.validation_losses([0, 1], 0.25))
