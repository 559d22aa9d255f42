"""The weights of the loss along a flow's way."""

from __future__ import annotations

import pytest
import torch

from diffusion.families.flow_weights import weight_at, weights

MEASURED = {
    0: 0.9057, 13: 1.1149, 24: 1.2114, 60: 1.4132, 124: 1.5227, 300: 1.2636, 500: 0.9254, 780: 0.7138, 870: 0.7325,
    950: 0.5854, 999: 0.4473,
}  # fmt: skip
"""By step, as ostris/ai-toolkit publishes them in `toolkit/timestep_weighing/default_weighing_scheme.py`."""


def test_the_bell_is_a_gaussian_that_begins_at_nothing() -> None:
    step = torch.arange(1000, dtype=torch.float64)
    bell = torch.exp(-2 * ((step - 500) / 1000) ** 2)
    bell = bell - bell[0]
    assert torch.allclose(weights("bell").double(), bell * 1000 / bell.sum(), atol=1e-6)


def test_the_measured_weights_are_those_that_were_published() -> None:
    found = weights("measured")
    assert {step: float(found[step]) for step in MEASURED} == pytest.approx(MEASURED, rel=0.02)
    late = {step: weight for step, weight in MEASURED.items() if step >= 25}
    assert {step: float(found[step]) for step in late} == pytest.approx(late, rel=0.01)


@pytest.mark.parametrize("weighting", ["bell", "measured"])
def test_weights_have_a_mean_of_one_and_begin_at_pure_noise(weighting: str) -> None:
    found = weights(weighting)  # type: ignore[arg-type]
    assert float(found.mean()) == pytest.approx(1)
    at = weight_at(torch.tensor([1000.0, 999.5, 999.0, 500.0, 0.4, 0.0]), weighting)  # type: ignore[arg-type]
    assert torch.equal(at, found[[0, 0, 1, 500, 999, 999]])
