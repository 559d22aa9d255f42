"""The training itself, in plain torch: no Ray, no storage, no clock of its own.

Everything random about a sample comes from (seed, epoch, entry), and the order of samples from (seed, epoch), so a
training continued at step n computes exactly what the unbroken one would have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffusion.families import Family
from train_jobs.cache import TrainingCache
from train_jobs.data import Batch, BatchPlan, TurnsPlan
from train_jobs.ema import Average
from train_jobs.errors import NonFiniteLoss
from train_jobs.gpu_memory import gpu_memory
from train_jobs.optimizers import OptimizerState, make_optimizer, read_state, set_rate, write_state
from train_jobs.peers import Alone, Peers
from train_jobs.progress import Progress
from train_jobs.samples import Sampler, derived_seed
from train_jobs.schedules import learning_rate_at
from train_jobs.spec import OptimizeSpec
from train_jobs.validation import Validation

SMOOTHING_STEPS = 50
HISTORY_POINTS_MAX = 5000


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: after `step` updates; `is_stopped` when it was asked to end before the last one.

    A training that the validation ended early is not stopped: it is done.
    """

    step: int
    is_stopped: bool
    final_loss: float | None


@dataclass
class LoopState:
    """All that a training consists of besides its spec and data; what a checkpoint holds.

    `optimizer` maps `<slot>.<parameter>` to the optimizer's tensors, `numbers` to its plain numbers; `group` holds the
    running numbers that it keeps for all parameters. There is no RNG state: random numbers are derived. `validation`
    holds `(step, loss)`.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[tuple[int, float]]
    recent_losses: list[float]
    numbers: dict[str, float] = field(default_factory=dict)
    group: dict[str, float] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Callbacks:
    """`after_step` runs on every worker after each update, with the loop able to give its state.

    `set_dropout` turns the adapter's dropout on for an update and off after it.
    """

    on_progress: Callable[[Progress], None] = lambda _: None
    after_step: Callable[[TrainingLoop, bool], None] = lambda _loop, _is_last: None
    should_stop: Callable[[], bool] = lambda: False
    clock_s: Callable[[], float] = field(default=lambda: 0.0)
    set_dropout: Callable[[bool], None] = lambda _: None


class TrainingLoop:
    """Trains `parameters` (by name, in the family's modules) on cached latents and texts.

    The loss of a step is the mean over all its samples on all workers, however they are cut into batches; so gradient
    accumulation equals a bigger batch. A step has the batches of `share_of` workers (default: as many as there are),
    which those that there are divide among themselves. Raises NonFiniteLoss, and whatever the model raises.
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
        validation: Validation | None = None,
        share_of: int | None = None,
    ) -> None:
        self._family = family
        self._parameters = dict(sorted(parameters.items()))
        self._cache = cache
        self._spec = spec
        self._peers: Peers = peers or Alone()
        self._callbacks = callbacks or Callbacks()
        self._batches_per_step = spec.gradient_accumulation * (share_of or self._peers.world_size)
        self._plan = _plan(cache, spec)
        denoiser = next(iter(family.lora_components))
        text_rate = spec.text_encoder_learning_rate or spec.learning_rate
        self._sampler = Sampler(
            family, cache, spec, trains_text=any(not name.startswith(f"{denoiser}.") for name in self._parameters)
        )
        self._optimizer = make_optimizer(
            spec.optimizer, self._parameters, spec.learning_rate,
            lambda name: 1.0 if name.startswith(f"{denoiser}.") else text_rate / spec.learning_rate,
        )  # fmt: skip
        self._average = None if spec.ema_decay is None else Average(self._parameters, spec.ema_decay)
        self._validation = validation
        self.step = 0
        self._history: list[tuple[int, float]] = []
        self._recent: deque[float] = deque(maxlen=SMOOTHING_STEPS)

    def run(self) -> Outcome:
        """Train to the last step, to an early end by the validation, or until any worker's `should_stop` is true; that
        worker's wish holds for all."""
        started_s, first_step = self._callbacks.clock_s(), self.step
        is_stopped = False
        while self.step < self._spec.steps and not is_stopped and not self.is_stalled:
            loss, is_stopped = self._update()
            self.step += 1
            self._note(loss)
            self._validate()
            self._callbacks.on_progress(self._progress(loss, first_step, started_s))
            is_last = is_stopped or self.is_stalled or self.step == self._spec.steps
            self._callbacks.after_step(self, is_last)
        done = self.step == self._spec.steps or self.is_stalled
        return Outcome(self.step, is_stopped and not done, self.smoothed_loss)

    @property
    def is_stalled(self) -> bool:
        """Whether the validation loss has not fallen for as long as it was given."""
        return self._validation is not None and self._validation.is_stalled

    @property
    def validation(self) -> Validation | None:
        return self._validation

    @property
    def best_step(self) -> int | None:
        """The step with the lowest validation loss so far; None without any."""
        return None if self._validation is None else self._validation.best_step

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters are what the training would result in: their average, where one is kept."""
        return nullcontext() if self._average is None else self._average.applied()

    def _validate(self) -> None:
        if self._validation is None or not self._validation.is_due(self.step, self._spec.steps):
            return
        with self.averaged():
            self._validation.run(self._sampler, self._peers, self.step)

    @property
    def smoothed_loss(self) -> float | None:
        """Mean of the last losses; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def history(self) -> list[tuple[int, float]]:
        """`(step, loss)`, thinned to a few thousand points."""
        return list(self._history)

    def check_weights(self) -> None:
        """Raises NonFiniteLoss where the last update left weights that are no numbers; on every worker or on none."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._parameters.values()):
            raise NonFiniteLoss(self.step, ())

    def state(self) -> LoopState:
        """A copy of everything needed to continue, on the CPU."""
        parameters = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}
        optimizer = read_state(self._optimizer, self._parameters)
        return LoopState(
            self.step,
            parameters,
            optimizer.tensors,
            list(self._history),
            list(self._recent),
            numbers=optimizer.numbers,
            group=optimizer.group,
            average={} if self._average is None else self._average.state(),
            validation=[] if self._validation is None else list(self._validation.losses),
        )

    def load(self, state: LoopState) -> None:
        """Continue from `state`, whose names and shapes have been checked by `checkpoint.read_checkpoint`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.parameters[name])
        write_state(self._optimizer, self._parameters, OptimizerState(state.optimizer, state.numbers, state.group))
        if self._average is not None:
            self._average.load(state.average)
        if self._validation is not None:
            self._validation.losses = list(state.validation)
        self.step = state.step
        self._history = list(state.history)
        self._recent = deque(state.recent_losses, maxlen=SMOOTHING_STEPS)

    def _update(self) -> tuple[float, bool]:
        """One optimizer update. Returns its loss and whether to stop, the same on every worker."""
        batches, names, count = self._batches()
        set_rate(self._optimizer, learning_rate_at(self.step, self._spec))
        self._optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self._family.device)
        for index, batch, counts in batches:
            self._seed_dropout(index)
            losses_B = self._sampler.losses(batch.entries, batch.epoch)
            self._check(losses_B.detach(), [self._cache.entry(i).name for i in batch.entries])
            share = losses_B.sum() / count if counts else losses_B.sum() * 0.0
            share.backward()  # type: ignore[no-untyped-call]
            loss_sum += share.detach().float()
        self._callbacks.set_dropout(False)
        loss, wants_stop = self._combine(loss_sum)
        if not math.isfinite(loss):
            raise NonFiniteLoss(self.step + 1, names)
        norm = nn.utils.clip_grad_norm_(list(self._parameters.values()), self._spec.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise NonFiniteLoss(self.step + 1, names)
        self._optimizer.step()
        if self._average is not None:
            self._average.update()
        return loss, wants_stop

    def _seed_dropout(self, index: int) -> None:
        """Dropout draws from torch's own generator: seeded by the step and the place of the batch in it, so that a
        continued training repeats it, with however many workers."""
        torch.manual_seed(derived_seed(self._spec.seed, self.step, index))
        self._callbacks.set_dropout(True)

    def _batches(self) -> tuple[list[tuple[int, Batch, bool]], list[str], int]:
        """This worker's batches of the current step, and the names and number of all workers' samples in it.

        A batch comes with its place in the step and whether it counts: of a split model all workers compute equally
        many, and one that has fewer computes its last once more.
        """
        first, workers = self.step * self._batches_per_step, self._peers.world_size
        every = [self._plan.batch(first + i) for i in range(self._batches_per_step)]
        names = sorted({self._cache.entry(i).name for batch in every for i in batch.entries})
        own = [(i, every[i], True) for i in range(self._peers.rank, len(every), workers)]
        if self._spec.strategy == "fsdp" and len(own) * workers < len(every):
            index, batch, _ = own[-1]
            own.append((index, batch, False))
        return own, names, sum(len(batch.entries) for batch in every)

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

    def _note(self, loss: float) -> None:
        self._recent.append(loss)
        every = max(1, self._spec.steps // HISTORY_POINTS_MAX)
        if self.step % every == 0 or self.step == self._spec.steps:
            self._history.append((self.step, loss))

    def _progress(self, loss: float, first_step: int, started_s: float) -> Progress:
        elapsed_s = self._callbacks.clock_s() - started_s
        steps_per_s = (self.step - first_step) / elapsed_s if elapsed_s > 0 else 0.0
        memory = gpu_memory(self._family.device)
        return Progress(
            step=self.step,
            total_steps=self._spec.steps,
            loss=loss,
            smoothed_loss=self.smoothed_loss or 0.0,
            learning_rate=learning_rate_at(self.step - 1, self._spec),
            steps_per_s=steps_per_s,
            eta_s=(self._spec.steps - self.step) / steps_per_s if steps_per_s > 0 else None,
            validation_loss=None if self._validation is None else self._validation.latest,
            best_step=self.best_step,
            gpu_memory_peak_bytes=None if memory is None else memory.peak_bytes,
            gpu_memory_total_bytes=None if memory is None else memory.total_bytes,
        )


def _plan(cache: TrainingCache, spec: OptimizeSpec) -> BatchPlan | TurnsPlan:
    """Everything but the validation's pictures; regularisation pictures, where there are any, take turns."""

    def plan(entries: list[int]) -> BatchPlan:
        return BatchPlan(cache.buckets(), batch_size=spec.batch_size, seed=spec.seed, entries=entries)

    own = cache.choose(lambda use: not use.is_validation and not use.is_regularisation)
    regularisation = cache.choose(lambda use: use.is_regularisation and not use.is_validation)
    if not own or not regularisation:
        return plan(own or regularisation)
    return TurnsPlan(plan(own), plan(regularisation))


__all__ = [
    "Alone",
    "Callbacks",
    "LoopState",
    "Outcome",
    "Peers",
    "Progress",
    "TrainingLoop",
    "learning_rate_at",
]
