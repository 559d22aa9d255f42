"""The training itself, in plain torch: no Ray, no storage, no clock of its own.

Shape legend: B samples, C latent channels, H W latent rows and columns.

Everything random about a sample comes from (seed, epoch, entry), and the order of samples from (seed, epoch), so a
training continued at step n computes exactly what the unbroken one would have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.families import Family, TextEmbeds
from train_jobs.cache import CachedUse, TrainingCache
from train_jobs.data import Batch, BatchPlan
from train_jobs.errors import NonFiniteLoss
from train_jobs.spec import OptimizeSpec, ScheduleSpec

SMOOTHING_STEPS = 50
HISTORY_POINTS_MAX = 5000


class Peers(Protocol):
    """The workers that train one adapter together."""

    rank: int
    world_size: int

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all workers, in place. Every worker calls it equally often."""
        ...


class Alone:
    """One worker."""

    rank = 0
    world_size = 1

    def sum_(self, tensor: Tensor) -> None:
        """Nothing to add."""


@dataclass(frozen=True)
class Progress:
    """After `step` of `total_steps` updates. `eta_s` is None before the speed is known."""

    step: int
    total_steps: int
    loss: float
    smoothed_loss: float
    learning_rate: float
    steps_per_s: float
    eta_s: float | None


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: after `step` updates; `is_stopped` when it was asked to end before the last one."""

    step: int
    is_stopped: bool
    final_loss: float | None


@dataclass
class LoopState:
    """All that a training consists of besides its spec and data; what a checkpoint holds.

    `optimizer` maps `<slot>.<parameter>` to AdamW's tensors. There is no RNG state: random numbers are derived.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[tuple[int, float]]
    recent_losses: list[float]


@dataclass
class Callbacks:
    """`after_step` runs on every worker after each update, with the loop able to give its state."""

    on_progress: Callable[[Progress], None] = lambda _: None
    after_step: Callable[[TrainingLoop, bool], None] = lambda _loop, _is_last: None
    should_stop: Callable[[], bool] = lambda: False
    clock_s: Callable[[], float] = field(default=lambda: 0.0)


class TrainingLoop:
    """Trains `parameters` (by name, in the family's modules) on cached latents and texts.

    The loss of a step is the mean over all its samples on all workers, however they are cut into batches; so gradient
    accumulation equals a bigger batch. Raises NonFiniteLoss, and whatever the model raises.
    """

    def __init__(
        self,
        family: Family,
        parameters: Mapping[str, nn.Parameter],
        cache: TrainingCache,
        spec: OptimizeSpec,
        *,
        peers: Peers | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self._family = family
        self._parameters = dict(sorted(parameters.items()))
        self._cache = cache
        self._spec = spec
        self._peers: Peers = peers or Alone()
        self._callbacks = callbacks or Callbacks()
        self._plan = BatchPlan(cache.buckets(), batch_size=spec.batch_size, seed=spec.seed)
        optimizer = spec.optimizer
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=spec.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.step = 0
        self._history: list[tuple[int, float]] = []
        self._recent: deque[float] = deque(maxlen=SMOOTHING_STEPS)

    def run(self) -> Outcome:
        """Train to the last step, or until any worker's `should_stop` is true; that worker's wish holds for all."""
        started_s, first_step = self._callbacks.clock_s(), self.step
        is_stopped = False
        while self.step < self._spec.steps and not is_stopped:
            loss, is_stopped = self._update()
            self.step += 1
            self._note(loss)
            self._callbacks.on_progress(self._progress(loss, first_step, started_s))
            self._callbacks.after_step(self, is_stopped or self.step == self._spec.steps)
        return Outcome(self.step, is_stopped and self.step < self._spec.steps, self.smoothed_loss)

    @property
    def smoothed_loss(self) -> float | None:
        """Mean of the last losses; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def history(self) -> list[tuple[int, float]]:
        """`(step, loss)`, thinned to a few thousand points."""
        return list(self._history)

    def state(self) -> LoopState:
        """A copy of everything needed to continue, on the CPU."""
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for slot, tensor in self._optimizer.state.get(parameter, {}).items():
                optimizer[f"{slot}.{name}"] = torch.as_tensor(tensor).detach().cpu().clone()
        parameters = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}
        return LoopState(self.step, parameters, optimizer, list(self._history), list(self._recent))

    def load(self, state: LoopState) -> None:
        """Continue from `state`, whose names and shapes have been checked by `checkpoint.read_checkpoint`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.parameters[name])
        for name, parameter in self._parameters.items():
            slots = {
                slot: tensor
                for slot in ("step", "exp_avg", "exp_avg_sq")
                if (tensor := state.optimizer.get(f"{slot}.{name}")) is not None
            }
            if slots:
                self._optimizer.state[parameter] = {
                    slot: tensor.clone() if slot == "step" else tensor.to(parameter.device, parameter.dtype)
                    for slot, tensor in slots.items()
                }
        self.step = state.step
        self._history = list(state.history)
        self._recent = deque(state.recent_losses, maxlen=SMOOTHING_STEPS)

    def _update(self) -> tuple[float, bool]:
        """One optimizer update. Returns its loss and whether to stop, the same on every worker."""
        batches, names, count = self._batches()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self._spec)
        self._optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self._family.device)
        for batch in batches:
            losses_B = self._losses(batch)
            self._check(losses_B.detach(), [self._cache.entry(i).name for i in batch.entries])
            share = losses_B.sum() / count
            share.backward()  # type: ignore[no-untyped-call]
            loss_sum += share.detach().float()
        loss, wants_stop = self._combine(loss_sum)
        if not math.isfinite(loss):
            raise NonFiniteLoss(self.step + 1, names)
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), self._spec.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteLoss(self.step + 1, names)
        self._optimizer.step()
        return loss, wants_stop

    def _batches(self) -> tuple[list[Batch], list[str], int]:
        """This worker's batches of the current step, and the names and number of all workers' samples in it."""
        workers, accumulation = self._peers.world_size, self._spec.gradient_accumulation
        first = self.step * accumulation * workers
        every = [self._plan.batch(first + i) for i in range(accumulation * workers)]
        names = sorted({self._cache.entry(i).name for batch in every for i in batch.entries})
        return every[self._peers.rank :: workers], names, sum(len(batch.entries) for batch in every)

    def _check(self, losses_B: Tensor, names: list[str]) -> None:
        """With several workers the sum is checked instead, so that all of them stop together."""
        if self._peers.world_size > 1:
            return
        is_finite = torch.isfinite(losses_B).tolist()
        if not all(is_finite):
            broken = {name for name, fine in zip(names, is_finite, strict=True) if not fine}
            raise NonFiniteLoss(self.step + 1, sorted(broken))

    def _combine(self, loss_sum: Tensor) -> tuple[float, bool]:
        """Sum gradients, loss and the wish to stop over the workers, in one exchange."""
        wants_stop = self._callbacks.should_stop()
        if self._peers.world_size == 1:
            return float(loss_sum), wants_stop
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters.values()]
        tail = torch.stack([loss_sum, torch.full_like(loss_sum, float(wants_stop))])
        flat = torch.cat([*(g.detach().float().reshape(-1) for g in gradients), tail])
        self._peers.sum_(flat)
        offset = 0
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            size = gradient.numel()
            parameter.grad = flat[offset : offset + size].reshape(gradient.shape).to(gradient.dtype)
            offset += size
        return float(flat[-2]), bool(flat[-1] > 0)

    def _losses(self, batch: Batch) -> Tensor:
        """Per-sample weighted mean squared errors, `[B]`, with gradients."""
        family, device = self._family, self._family.device
        samples = [self._draw(entry, batch.epoch) for entry in batch.entries]
        latents_BCHW = torch.stack([s.latents_CHW for s in samples]).to(device)
        noise_BCHW = torch.stack([s.noise_CHW for s in samples]).to(device)
        timesteps_B = torch.cat([s.timestep_1 for s in samples]).to(device)
        text = TextEmbeds.cat([s.text for s in samples]).to(device=device, dtype=family.dtype)
        noisy_BCHW = family.add_noise(latents_BCHW, noise_BCHW, timesteps_B).to(family.dtype)
        target_BCHW = family.prediction_target(latents_BCHW, noise_BCHW, timesteps_B)
        with self._precision():
            predicted_BCHW = family.predict(noisy_BCHW, timesteps_B, text)
        error_B = (predicted_BCHW.float() - target_BCHW.float()).square().flatten(1).mean(1)
        return error_B * family.loss_weight(timesteps_B, self._spec.min_snr_gamma).float()

    def _precision(self) -> AbstractContextManager[object]:
        family = self._family
        if family.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(family.device.type, dtype=family.dtype)

    def _draw(self, entry: int, epoch: int) -> _Sample:
        """A sample's random parts, the same whichever worker, batch or attempt draws them."""
        use: CachedUse = self._cache.entry(entry)
        seed = np.random.SeedSequence([self._spec.seed, epoch, entry]).generate_state(1, np.uint64)[0]
        random = torch.Generator().manual_seed(int(seed) & (2**63 - 1))
        timestep_1 = self._family.sample_timesteps(1, random)
        is_dropped = float(torch.rand((), generator=random)) < use.caption_dropout_rate
        latents_CHW = use.mean_CHW + use.std_CHW * torch.randn(use.mean_CHW.shape, generator=random)
        noise_CHW = torch.randn(use.mean_CHW.shape, generator=random)
        if self._spec.noise_offset:
            offset_C11 = torch.randn((noise_CHW.shape[0], 1, 1), generator=random)
            noise_CHW = noise_CHW + self._spec.noise_offset * offset_C11
        row = self._cache.empty_text_row if is_dropped else use.text_row
        return _Sample(latents_CHW, noise_CHW, timestep_1, self._cache.texts[row])

    def _note(self, loss: float) -> None:
        self._recent.append(loss)
        every = max(1, self._spec.steps // HISTORY_POINTS_MAX)
        if self.step % every == 0 or self.step == self._spec.steps:
            self._history.append((self.step, loss))

    def _progress(self, loss: float, first_step: int, started_s: float) -> Progress:
        elapsed_s = self._callbacks.clock_s() - started_s
        steps_per_s = (self.step - first_step) / elapsed_s if elapsed_s > 0 else 0.0
        return Progress(
            step=self.step,
            total_steps=self._spec.steps,
            loss=loss,
            smoothed_loss=self.smoothed_loss or 0.0,
            learning_rate=learning_rate_at(self.step - 1, self._spec),
            steps_per_s=steps_per_s,
            eta_s=(self._spec.steps - self.step) / steps_per_s if steps_per_s > 0 else None,
        )


@dataclass(frozen=True)
class _Sample:
    latents_CHW: Tensor
    noise_CHW: Tensor
    timestep_1: Tensor
    text: TextEmbeds


def learning_rate_at(step: int, spec: OptimizeSpec) -> float:
    """The rate of update `step`, counted from 0. Formulas: torch.optim.lr_scheduler's closed forms."""
    schedule: ScheduleSpec = spec.schedule
    rate, total = spec.learning_rate, schedule.total_steps or spec.steps
    if schedule.type == "cosine":
        low = schedule.min_learning_rate
        return low + (rate - low) * (1 + math.cos(math.pi * step / total)) / 2
    if schedule.type == "linear":
        done = min(step, total) / total
        return rate * (schedule.start_factor + (schedule.end_factor - schedule.start_factor) * done)
    if schedule.type == "constant_with_warmup":
        return rate * min(1.0, step / max(1, schedule.warmup_steps)) if schedule.warmup_steps else rate
    return rate * schedule.factor if step < total else rate
