"""How much the loss counts along a flow's way from noise to picture, as ai-toolkit weighs it.

Both weightings have 1000 steps, the first at pure noise, and a mean of 1.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

LossWeighting = Literal["none", "bell", "measured"]
STEPS = 1000

_MEASURED = {
    0: 0.889, 12: 1.087, 28: 1.252, 50: 1.381, 80: 1.488, 125: 1.523, 160: 1.502, 220: 1.410, 400: 1.080, 500: 0.923,
    570: 0.834, 640: 0.768, 690: 0.735, 740: 0.716, 780: 0.713, 830: 0.722, 870: 0.735, 905: 0.713, 920: 0.679,
    935: 0.637, 960: 0.544, 986: 0.456, 999: 0.444,
}  # fmt: skip
"""Weights by step, straight between them. They are a least-squares fit of ours to the 1000 weights that ai-toolkit's
author measured on Flex.1-alpha for its ``timestep_type: weighted``, and for which there is no formula
(``toolkit/timestep_weighing/default_weighing_scheme.py``, August 2026). The measured weights scatter; the fit is within
2 % of each of the first 25 and within 1 % of all others, 0.2 % in the mean square."""


@functools.cache
def weights(weighting: Literal["bell", "measured"]) -> Tensor:
    """``[1000]`` float32. The bell is a Gaussian around the middle, lowered to 0 at pure noise."""
    steps = np.arange(STEPS)
    if weighting == "bell":
        raw = np.exp(-2 * ((steps - STEPS / 2) / STEPS) ** 2) - math.exp(-0.5)
    else:
        raw = np.interp(steps, list(_MEASURED), list(_MEASURED.values()))
    return torch.from_numpy(raw / raw.mean()).float()


def weight_at(timesteps_B: Tensor, weighting: Literal["bell", "measured"]) -> Tensor:
    """``[B]`` float32 on the timesteps' device, of timesteps in 0..1000."""
    step_B = (STEPS - timesteps_B.float()).floor().long().clamp(0, STEPS - 1)
    return weights(weighting).to(timesteps_B.device)[step_B]
