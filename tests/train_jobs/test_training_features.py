"""What the config can ask of a training beyond the plain one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import lr_scheduler

from diffusion.adapter import attach_lora
from diffusion.families import Family, load_family
from diffusion.lycoris_layers import Lycoris
from train_jobs.cache import TrainingCache, build_cache, mask_weight
from train_jobs.captions import CaptionRules, varied
from train_jobs.charts import loss_png, smoothed, tensorboard_file
from train_jobs.checkpoint import read_checkpoint, steps_to_prune, write_checkpoint
from train_jobs.data import BatchPlan, TurnsPlan, choose_held_out, load_mask, plan_uses, read_folder
from train_jobs.loop import Callbacks, TrainingLoop
from train_jobs.peers import Alone
from train_jobs.samples import Sampler
from train_jobs.schedules import learning_rate_at
from train_jobs.spec import DatasetSpec, OptimizerSpec, OptimizeSpec, ScheduleSpec, ValidationSpec
from train_jobs.testing import ThreadPeers
from train_jobs.validation import Validation

Write = Callable[..., Path]
Make = Callable[..., TrainingLoop]


def _spec(**fields: Any) -> OptimizeSpec:
    defaults = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "dtype": "fp32", "seed": 3}
    return OptimizeSpec(**(defaults | fields))


def _dataset(**fields: Any) -> DatasetSpec:
    return DatasetSpec(**({"dataset": "cats", "resolutions_px": (16,), "bucket_step_px": 8} | fields))


def _cache(family: Family, folder: Path, spec: DatasetSpec, **options: Any) -> TrainingCache:
    built = build_cache(family, plan_uses(read_folder(folder, spec), spec, size_multiple=8, **options))
    assert built is not None
    return built


@pytest.fixture
def make(model_folder: Path, family: Family, write_pictures: Write) -> Make:
    """A loop over four pictures of one bucket, and a fifth that is held out, on a fresh model each time."""
    folder = write_pictures((16, 16), (20, 20), (18, 18), (32, 32), (24, 24))
    spec = _dataset(shuffle_tokens=True, caption_dropout_rate=0.2)
    cache = _cache(family, folder, spec, held_out=frozenset({"p4.png"}))

    def build(
        train: OptimizeSpec, *, peers: Any = None, patience: int | None = None, dropout: float = 0.0,
        components: list[str] | None = None, dora: bool = False, lycoris: Lycoris | None = None,
    ) -> TrainingLoop:  # fmt: skip
        loaded = load_family(model_folder, device="cpu", dtype=torch.float32)
        lora = attach_lora(
            loaded, rank=2, alpha=2, seed=1, targets="all", dropout=dropout, components=components, dora=dora,
            lycoris=lycoris,
        )  # fmt: skip
        watched = ValidationSpec(every_steps=2, patience=patience, places=(0.25, 0.75))
        return TrainingLoop(
            loaded, dict(lora.named_parameters()), cache, train, peers=peers,
            callbacks=Callbacks(set_dropout=lora.set_dropout),
            validation=Validation(watched, cache, batch_size=train.batch_size),
        )  # fmt: skip

    return build


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in a), default=0.0)


CASES: list[dict[str, Any]] = [
    {"optimizer": "adamw", "ema": 0.9, "dropout": 0.3},
    {"optimizer": "adafactor"},
    {"optimizer": "prodigy", "ema": 0.5},
    {"optimizer": "lion", "dora": True},
    {"optimizer": "adam", "components": ["unet", "text_encoder"]},
    {"optimizer": "adamw", "ema": 0.9, "lycoris": Lycoris("lokr", 4), "components": ["unet", "text_encoder"]},
    {"optimizer": "adamw", "lycoris": Lycoris("lokr", 2, full_rank=True)},
    {"optimizer": "prodigy", "lycoris": Lycoris("loha")},
]


def _named(case: dict[str, Any]) -> str:
    lycoris = case.get("lycoris")
    kind = "" if lycoris is None else f"-{lycoris.kind}{'-full' if lycoris.full_rank else ''}"
    return f"{case['optimizer']}{kind}"


@pytest.mark.parametrize("case", CASES, ids=_named)
def test_every_optimizer_continues_exactly_where_it_stopped(make: Make, tmp_path: Path, case: dict[str, Any]) -> None:
    rate = 1.0 if case["optimizer"] == "prodigy" else 1e-3
    spec = _spec(
        learning_rate=rate, optimizer=OptimizerSpec(type=case["optimizer"]), ema_decay=case.get("ema"),
        noise_offset=0.05,
    )  # fmt: skip
    options = {key: case[key] for key in ("dropout", "components", "dora", "lycoris") if key in case}
    unbroken = make(spec, **options)
    unbroken.run()
    first = make(spec, **options)
    first._callbacks.should_stop = lambda: first.step + 1 >= 2
    assert first.run().is_stopped
    write_checkpoint(tmp_path, first.state(), facts={}, write_adapter=lambda path: save_file({}, path))
    second = make(spec, **options)
    torch.manual_seed(999)
    second.load(read_checkpoint(tmp_path, expected=second.state().parameters).state)
    second.run()
    ours, theirs = second.state(), unbroken.state()
    assert _difference(ours.parameters, theirs.parameters) <= 1e-6
    assert _difference(ours.optimizer, theirs.optimizer) <= 1e-6
    assert _difference(ours.average, theirs.average) <= 1e-6
    assert ours.numbers == pytest.approx(theirs.numbers)
    assert ours.group == pytest.approx(theirs.group)
    assert [loss for _, loss in ours.validation] == pytest.approx([loss for _, loss in theirs.validation], abs=1e-6)
    assert [step for step, _ in ours.validation] == [step for step, _ in theirs.validation] == [2, 4]


def test_the_average_follows_the_weights_by_its_decay(make: Make) -> None:
    loop = make(_spec(steps=1, ema_decay=0.75))
    before = loop.state().parameters
    loop.run()
    after = loop.state()
    expected = {name: 0.75 * before[name] + 0.25 * after.parameters[name] for name in before}
    assert _difference(after.average, expected) <= 1e-6
    with loop.averaged():
        assert _difference(loop.state().parameters, expected) <= 1e-6
    assert _difference(loop.state().parameters, after.parameters) == 0


def test_dropout_is_on_in_the_update_only(make: Make) -> None:
    plain, dropped = make(_spec(steps=2)), make(_spec(steps=2), dropout=0.9)
    plain.run()
    dropped.run()
    assert _difference(plain.state().parameters, dropped.state().parameters) > 1e-4
    modules = [m for m in dropped._family.denoiser.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.9]
    assert modules
    assert not any(module.training for module in modules)


def test_text_encoders_train_at_their_own_rate(make: Make) -> None:
    spec = _spec(steps=2, text_encoder_learning_rate=1e-9)
    loop = make(spec, components=["unet", "text_encoder"])
    before = loop.state().parameters
    loop.run()
    after = loop.state().parameters
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert 0 < max(value for name, value in moved.items() if name.startswith("text_encoder.")) < 1e-7
    assert max(value for name, value in moved.items() if name.startswith("unet.")) > 1e-3


def test_one_two_and_four_workers_have_the_same_losses_for_the_same_global_batch(make: Make) -> None:
    alone = make(_spec(batch_size=4))
    alone.run()
    losses = {1: [loss for _, loss in alone.history]}
    watched = {1: [loss for _, loss in alone.state().validation]}
    for count in (2, 4):
        loops = [make(_spec(batch_size=4 // count), peers=peers) for peers in ThreadPeers.together(count)]
        threads = [threading.Thread(target=loop.run) for loop in loops]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        losses[count] = [loss for _, loss in loops[0].history]
        watched[count] = [loss for _, loss in loops[-1].state().validation]
    for count in (2, 4):
        assert losses[count] == pytest.approx(losses[1], rel=1e-4)
        assert watched[count] == pytest.approx(watched[1], rel=1e-4)
    assert len(losses[1]) == 4


def test_a_validation_that_does_not_get_better_ends_the_training(make: Make) -> None:
    loop = make(_spec(steps=40, learning_rate=1e-9), patience=2)
    assert loop.validation is not None
    loop.validation.losses = [(0, 0.0)]
    outcome = loop.run()
    assert not outcome.is_stopped
    assert (outcome.step, loop.is_stalled, loop.validation.best_step) == (4, True, 0)


def test_a_held_out_picture_is_validated_and_never_trained_on(
    family: Family, make: Make, write_pictures: Write
) -> None:
    folder = write_pictures((16, 16), (16, 16), name="held")
    spec = _dataset(repeats=3, flip_x=True)
    cache = _cache(family, folder, spec, held_out=frozenset({"p1.png"}))
    assert [cache.entry(i).name for i in cache.choose(lambda use: use.is_validation)] == ["p1.png"]
    assert len(cache.choose(lambda use: not use.is_validation)) == 6
    validation = Validation(ValidationSpec(), cache, batch_size=2)
    sampler = Sampler(family, cache, _spec())
    losses = {validation.run(sampler, Alone(), step) for step in (1, 2)}
    assert len(losses) == 1
    assert validation.best_step == 1


def test_some_pictures_are_held_out_and_never_all(write_pictures: Write) -> None:
    pictures = read_folder(write_pictures(*[(16, 16)] * 10), _dataset())
    assert len(choose_held_out(pictures, 0.3, 1)) == 3
    assert choose_held_out(pictures, 0.3, 1) == choose_held_out(pictures, 0.3, 1)
    assert len(choose_held_out(pictures, 0.01, 1)) == 1
    assert choose_held_out(pictures[:1], 0.5, 1) == frozenset()


def test_the_loss_counts_where_the_mask_is_white(tmp_path: Path, family: Family) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / "a.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    mask.save(tmp_path / "masks" / "a.jpg", quality=100)
    spec = _dataset(mask_dataset="masks", mask_min_value=0.2, flip_x=True)
    plain, flipped = plan_uses(
        read_folder(tmp_path / "images", spec, tmp_path / "masks"), spec, size_multiple=family.size_multiple
    )
    found = load_mask(plain)
    assert found is not None
    assert (found[0, 0], found[0, -1]) == (pytest.approx(1.0, abs=0.02), pytest.approx(0.2, abs=0.02))
    other = load_mask(flipped)
    assert other is not None
    assert np.allclose(other, found[:, ::-1])
    weight = mask_weight(found, (4, 4))
    assert weight is not None
    assert float(weight.mean()) == pytest.approx(1.0)
    assert float(weight[0, 0, 0] / weight[0, 0, -1]) == pytest.approx(5.0, rel=0.1)
    inverted = load_mask(plan_uses([plain.picture], spec.model_copy(update={"invert_mask": True}), size_multiple=8)[0])
    assert inverted is not None
    assert inverted[0, -1] > inverted[0, 0]


def test_a_pictures_own_transparency_can_be_its_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 16, 8))
    image.save(tmp_path / "a.png")
    spec = _dataset(alpha_mask=True)
    found = load_mask(plan_uses(read_folder(tmp_path, spec), spec, size_multiple=8)[0])
    assert found is not None
    assert (found[0, 0], found[-1, 0]) == (1.0, 0.0)


def test_masked_parts_do_not_change_the_loss(family: Family, write_pictures: Write) -> None:
    cache = _cache(family, write_pictures((16, 16)), _dataset())
    use = cache.uses[0]
    half = torch.zeros(1, *use.mean_CHW.shape[-2:])
    half[..., : half.shape[-1] // 2] = 2.0
    whole = Sampler(family, cache, _spec()).losses([0], 0)
    object.__setattr__(use, "weight_1HW", half)
    left = Sampler(family, cache, _spec()).losses([0], 0)
    object.__setattr__(use, "weight_1HW", 2.0 - half)
    right = Sampler(family, cache, _spec()).losses([0], 0)
    assert float((left + right).detach() / 2) == pytest.approx(float(whole.detach()), rel=1e-5)
    object.__setattr__(use, "weight_1HW", None)
    object.__setattr__(use, "loss_weight", 3.0)
    tripled = Sampler(family, cache, _spec()).losses([0], 0)
    assert float(tripled.detach()) == pytest.approx(3 * float(whole.detach()), rel=1e-6)


def test_flips_in_both_directions_use_a_picture_four_times(write_pictures: Write) -> None:
    spec = _dataset(flip_x=True, flip_y=True, loss_multiplier=0.5, is_regularisation=True)
    uses = plan_uses(read_folder(write_pictures((16, 16)), spec), spec, size_multiple=8, regularisation_weight=0.5)
    assert {(u.is_flipped, u.is_flipped_y) for u in uses} == {(a, b) for a in (False, True) for b in (False, True)}
    assert {(u.loss_weight, u.is_regularisation) for u in uses} == {(0.25, True)}


def test_regularisation_batches_take_turns_with_the_others() -> None:
    own = BatchPlan(["a"] * 6, batch_size=2, seed=1, entries=[0, 1, 2])
    other = BatchPlan(["a"] * 6, batch_size=2, seed=1, entries=[3, 4, 5])
    plan = TurnsPlan(own, other)
    for number in range(8):
        assert set(plan.batch(number).entries) <= ({0, 1, 2} if number % 2 == 0 else {3, 4, 5})


def test_kept_tokens_stay_in_place_and_the_trigger_word_comes_first() -> None:
    rules = CaptionRules(shuffle_tokens=True, keep_tokens=1, trigger_word="ohwx")
    texts = {varied("a dog, red, big, wet", rules, torch.Generator().manual_seed(seed)) for seed in range(20)}
    assert all(text.startswith("ohwx a dog, ") for text in texts)
    assert len(texts) > 3
    assert {frozenset(text.removeprefix("ohwx a dog, ").split(", ")) for text in texts} == {
        frozenset({"red", "big", "wet"})
    }
    none_left = CaptionRules(token_dropout_rate=1.0, keep_tokens=1)
    assert varied("a dog, red", none_left, torch.Generator()) == "a dog"


@pytest.mark.parametrize("kind", ["cosine_with_restarts", "step"])
def test_a_repeating_schedule_is_torchs(kind: str) -> None:
    schedule = ScheduleSpec(type=kind, total_steps=7, min_learning_rate=1e-5, step_size=6, gamma=0.5)
    spec = OptimizeSpec(steps=20, learning_rate=1e-3, schedule=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    reference: Any = (
        lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.5)
        if kind == "step"
        else lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7, eta_min=1e-5)
    )
    for step in range(20):
        assert learning_rate_at(step, spec) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


def test_the_best_checkpoint_is_never_pruned() -> None:
    assert steps_to_prune([10, 20, 30, 40], keep=1, best=20) == [10, 30]


def test_losses_become_a_picture_and_tensorboard_events(tmp_path: Path) -> None:
    history = [(step, 1.0 / step) for step in range(1, 30)]
    data = loss_png(history, [(10, 0.5), (20, 0.4)])
    assert data.startswith(b"\x89PNG")
    assert smoothed([(1, 2.0), (2, 2.0)]) == [(1, pytest.approx(2.0)), (2, pytest.approx(2.0))]
    events = tensorboard_file(tmp_path, history, [(10, 0.5)])
    assert events.count(b"loss/smoothed") == 29
    assert events.count(b"loss/validation") == 1
