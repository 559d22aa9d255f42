from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import lr_scheduler

from diffusion.adapter import attach_lora
from diffusion.families import Family, load_family
from train_jobs.cache import TrainingCache, build_cache
from train_jobs.checkpoint import read_checkpoint, write_checkpoint
from train_jobs.data import plan_uses, read_folder
from train_jobs.errors import NonFiniteLoss
from train_jobs.loop import Callbacks, Peers, TrainingLoop, learning_rate_at
from train_jobs.progress import Progress
from train_jobs.spec import DatasetSpec, OptimizeSpec, ScheduleSpec
from train_jobs.testing import ThreadPeers


def _spec(**fields: Any) -> OptimizeSpec:
    defaults = {"steps": 6, "batch_size": 2, "learning_rate": 1e-2, "dtype": "fp32", "seed": 3}
    return OptimizeSpec(**(defaults | fields))


@pytest.fixture
def cache(family: Family, write_pictures: Callable[..., Path]) -> TrainingCache:
    spec = DatasetSpec(dataset="cats", resolutions_px=(16,), bucket_step_px=8, caption_dropout_rate=0.3)
    folder = write_pictures((16, 16), (20, 20), (18, 18), (32, 32))
    built = build_cache(family, plan_uses(read_folder(folder, spec), spec, size_multiple=8))
    assert built is not None
    return built


@pytest.fixture
def make_loop(model_folder: Path, cache: TrainingCache) -> Callable[..., TrainingLoop]:
    """A fresh model with the same new adapter each time."""

    def make(spec: OptimizeSpec, callbacks: Callbacks | None = None, peers: Peers | None = None) -> TrainingLoop:
        family = load_family(model_folder, device="cpu", dtype=torch.float32)
        lora = attach_lora(family, rank=4, alpha=4, seed=1, targets="all")
        return TrainingLoop(family, dict(lora.named_parameters()), cache, spec, peers=peers, callbacks=callbacks)

    return make


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _losses(loop: TrainingLoop) -> list[float]:
    return [loss for _, loss in loop.history]


def _assert_same_training(a: TrainingLoop, b: TrainingLoop) -> None:
    """AdamW divides by the gradient's size, so where it is nearly zero rounding moves parameters, but not the loss."""
    assert _losses(a) == pytest.approx(_losses(b), rel=1e-4)
    assert _difference(a.state().parameters, b.state().parameters) <= 1e-3


def _first_moments(loop: TrainingLoop) -> dict[str, Tensor]:
    """After one update: a tenth of the clipped gradient."""
    assert loop.step == 1
    return {name: tensor for name, tensor in loop.state().optimizer.items() if name.startswith("exp_avg.")}


def test_the_loss_falls(make_loop: Callable[..., TrainingLoop]) -> None:
    """Each epoch has new noise, so means of epochs are compared: each of 4 samples, 15 times."""
    loop = make_loop(_spec(steps=60, batch_size=4, learning_rate=3e-2))
    before = {name: tensor.clone() for name, tensor in loop.state().parameters.items()}
    outcome = loop.run()
    losses = _losses(loop)
    assert len(losses) == 60
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])
    assert _difference(loop.state().parameters, before) > 1e-3
    assert not outcome.is_stopped
    assert outcome.step == 60


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_continued_training_equals_an_unbroken_one(
    make_loop: Callable[..., TrainingLoop], tmp_path: Path, stop_at: int
) -> None:
    spec = _spec(noise_offset=0.1, min_snr_gamma=5.0, schedule=ScheduleSpec(type="cosine"))
    unbroken = make_loop(spec)
    unbroken.run()
    first = make_loop(spec)
    first._callbacks.should_stop = lambda: first.step + 1 >= stop_at
    assert first.run().is_stopped
    write_checkpoint(tmp_path, first.state(), facts={}, write_adapter=lambda path: save_file({}, path))
    second = make_loop(spec)
    torch.manual_seed(12345)
    second.load(read_checkpoint(tmp_path, expected=second.state().parameters).state)
    assert second.step == stop_at
    second.run()
    assert _difference(second.state().parameters, unbroken.state().parameters) <= 1e-6
    assert _difference(second.state().optimizer, unbroken.state().optimizer) <= 1e-6
    assert [step for step, _ in second.history] == list(range(1, 7))
    assert _losses(second) == pytest.approx(_losses(unbroken))
    assert second.smoothed_loss == pytest.approx(unbroken.smoothed_loss)


@pytest.mark.parametrize("steps", [1, 6])
def test_accumulated_batches_equal_one_bigger_batch(make_loop: Callable[..., TrainingLoop], steps: int) -> None:
    big = make_loop(_spec(steps=steps, batch_size=4))
    small = make_loop(_spec(steps=steps, batch_size=1, gradient_accumulation=4))
    big.run()
    small.run()
    _assert_same_training(big, small)
    if steps == 1:
        assert _difference(_first_moments(big), _first_moments(small)) <= 1e-7


def _run_together(loops: list[TrainingLoop]) -> list[NonFiniteLoss | None]:
    errors: list[NonFiniteLoss | None] = [None] * len(loops)

    def run(index: int) -> None:
        try:
            loops[index].run()
        except NonFiniteLoss as error:
            errors[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(loops))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return errors


def _pair(make_loop: Callable[..., TrainingLoop], spec: OptimizeSpec) -> list[TrainingLoop]:
    return [make_loop(spec, Callbacks(), peers) for peers in ThreadPeers.together(2)]


@pytest.mark.parametrize("steps", [1, 6])
def test_two_workers_train_what_one_with_a_bigger_batch_would(
    make_loop: Callable[..., TrainingLoop], steps: int
) -> None:
    alone = make_loop(_spec(steps=steps, batch_size=4))
    alone.run()
    pair = _pair(make_loop, _spec(steps=steps, batch_size=2))
    assert _run_together(pair) == [None, None]
    assert _difference(pair[0].state().parameters, pair[1].state().parameters) == 0
    _assert_same_training(pair[0], alone)
    if steps == 1:
        assert _difference(_first_moments(pair[0]), _first_moments(alone)) <= 1e-7


def test_one_workers_wish_to_stop_stops_all_at_the_same_step(make_loop: Callable[..., TrainingLoop]) -> None:
    pair = _pair(make_loop, _spec())
    pair[1]._callbacks.should_stop = lambda: pair[1].step >= 1
    assert _run_together(pair) == [None, None]
    assert [loop.step for loop in pair] == [2, 2]


def test_a_loss_that_is_not_finite_stops_with_its_step_and_samples(
    make_loop: Callable[..., TrainingLoop], cache: TrainingCache
) -> None:
    cache.uses[2].mean_CHW.fill_(math.nan)
    loop = make_loop(_spec(batch_size=4))
    before = loop.state().parameters
    with pytest.raises(NonFiniteLoss) as caught:
        loop.run()
    assert caught.value.step == 1
    assert caught.value.names == ("p2.png",)
    assert _difference(loop.state().parameters, before) == 0


def test_workers_stop_together_when_one_has_a_loss_that_is_not_finite(
    make_loop: Callable[..., TrainingLoop], cache: TrainingCache
) -> None:
    cache.uses[2].mean_CHW.fill_(math.nan)
    errors = _run_together(_pair(make_loop, _spec()))
    assert all(isinstance(error, NonFiniteLoss) and "p2.png" in error.names for error in errors)


def test_progress_tells_step_speed_and_time_left(make_loop: Callable[..., TrainingLoop]) -> None:
    seen: list[Progress] = []
    ticks = iter(range(100))
    loop = make_loop(_spec(steps=4), Callbacks(on_progress=seen.append, clock_s=lambda: 2.0 * next(ticks)))
    loop.run()
    assert [p.step for p in seen] == [1, 2, 3, 4]
    assert seen[1].steps_per_s == pytest.approx(0.5)
    assert seen[1].eta_s == pytest.approx(4.0)
    assert seen[-1].eta_s == 0.0
    assert seen[-1].smoothed_loss == pytest.approx(sum(p.loss for p in seen) / 4)


def test_the_last_step_is_announced_whether_it_was_stopped_or_not(make_loop: Callable[..., TrainingLoop]) -> None:
    seen: list[tuple[int, bool]] = []
    callbacks = Callbacks(after_step=lambda loop, is_last: seen.append((loop.step, is_last)))
    make_loop(_spec(steps=3), callbacks).run()
    assert seen == [(1, False), (2, False), (3, True)]
    seen.clear()
    callbacks.should_stop = lambda: True
    assert make_loop(_spec(steps=3), callbacks).run().is_stopped
    assert seen == [(1, True)]


def test_only_the_adapter_is_trained(family: Family, cache: TrainingCache) -> None:
    lora = attach_lora(family, rank=2, alpha=2)
    trained = {id(p) for p in lora.parameters()}
    frozen = {n: p.detach().clone() for n, p in family.denoiser.named_parameters() if id(p) not in trained}
    TrainingLoop(family, dict(lora.named_parameters()), cache, _spec(steps=2)).run()
    assert all(torch.equal(p, frozen[n]) for n, p in family.denoiser.named_parameters() if id(p) not in trained)


@pytest.mark.parametrize("total", [None, 10])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_a_schedule_is_torchs(kind: str, total: int | None) -> None:
    schedule = ScheduleSpec(
        type=kind, total_steps=total, start_factor=0.3, end_factor=0.9, min_learning_rate=1e-5, factor=0.5
    )
    spec = OptimizeSpec(steps=20, learning_rate=1e-3, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    steps = total or 20
    reference = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=steps),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=1e-5),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, start_factor=0.3, end_factor=0.9, total_iters=steps),
    }[kind]()
    for step in range(20):
        assert learning_rate_at(step, spec) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


@given(step=st.integers(0, 100), warmup=st.integers(0, 50))
def test_warmup_rises_to_the_rate_and_stays(step: int, warmup: int) -> None:
    schedule = ScheduleSpec(type="constant_with_warmup", warmup_steps=warmup)
    rate = learning_rate_at(step, OptimizeSpec(learning_rate=1e-3, schedule=schedule))
    assert rate == pytest.approx(1e-3 * (min(1.0, step / warmup) if warmup else 1.0))
