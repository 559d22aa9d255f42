from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest
from diffusion.engine.admission import GROW_AFTER_STEPS, BatchLimits
from diffusion.errors import Cancelled, OutOfGpuMemory, SettingNotSupported, SizeNotSupported
from diffusion.families import StableDiffusion1, load_family
from diffusion.families.discrete import SCHEDULERS
from diffusion.testing import ScriptedMemory

TOLERANCE = 1e-4
PLAIN = GenerateRequest(prompt="a red ring", width=64, height=64, steps=4, guidance_scale=7.5, seed=3)


def stock_pixels(pipeline: Any, request: GenerateRequest) -> Tensor:
    """[3, H, W] in 0..1 from the stock pipeline."""
    pixels = pipeline(
        request.prompt, negative_prompt=request.negative_prompt, width=request.width, height=request.height,
        num_inference_steps=request.steps, guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed), output_type="np",
    ).images[0]  # fmt: skip
    return torch.from_numpy(np.asarray(pixels)).permute(2, 0, 1)


def pixels(engine: Engine, *requests: GenerateRequest) -> list[Tensor]:
    return [rendered.pixels_CHW for rendered in engine.render(requests)]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guidance_scale", "negative_prompt"), [(1.0, ""), (7.5, ""), (7.5, "blue")])
def test_a_picture_equals_the_stock_pipelines(
    kind: str, guidance_scale: float, negative_prompt: str, model_folders: dict[str, Path],
    load_stock: Callable[[Path], Any],
) -> None:  # fmt: skip
    engine = Engine(load_family(model_folders[kind], device="cpu", dtype=torch.float32))
    request = dataclasses.replace(PLAIN, steps=3, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    expected = stock_pixels(load_stock(model_folders[kind]), request)
    assert expected.std() > 0.01  # not a flat picture, which anything would equal
    assert difference(pixels(engine, request)[0], expected) < TOLERANCE


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_equals_its_stock_class(name: str, family: StableDiffusion1, stock: Any) -> None:
    stock.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(stock.scheduler.config)
    request = dataclasses.replace(PLAIN, scheduler=name, steps=4)
    [made] = pixels(Engine(family), request)
    assert difference(made, stock_pixels(stock, request)) < TOLERANCE


def test_a_size_other_than_the_models_own_equals_the_stock_pipelines(family: StableDiffusion1, stock: Any) -> None:
    request = dataclasses.replace(PLAIN, width=72, height=40)
    [made] = pixels(Engine(family), request)
    assert made.shape == (3, 40, 72)
    assert difference(made, stock_pixels(stock, request)) < TOLERANCE


def test_pictures_of_a_mixed_batch_equal_the_same_pictures_alone(family: StableDiffusion1) -> None:
    mixed = [
        PLAIN,
        dataclasses.replace(PLAIN, seed=4, steps=2, guidance_scale=1.0),
        dataclasses.replace(PLAIN, prompt="two", negative_prompt="grey", steps=6, scheduler="euler_a"),
        dataclasses.replace(PLAIN, prompt="three", width=32, seed=9),
        dataclasses.replace(PLAIN, seed=12, guidance_scale=3.0, scheduler="unipc", steps=4),
    ]
    engine = Engine(family)
    together = pixels(engine, *mixed)
    for request, made in zip(mixed, together, strict=True):
        assert difference(made, pixels(engine, request)[0]) < TOLERANCE
    assert difference(together[0], together[4]) > 100 * TOLERANCE


def test_pictures_that_join_a_full_batch_later_are_the_same(family: StableDiffusion1) -> None:
    requests = [dataclasses.replace(PLAIN, seed=seed, steps=steps) for seed, steps in enumerate((4, 2, 5, 1, 3))]
    calls: list[int] = []
    at_once = pixels(Engine(family), *requests)
    watch = family.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0]) // 2))
    in_turn = pixels(Engine(family, batch_max=2), *requests)
    watch.remove()
    assert calls == [2, 2, 2, 2, 2, 2, 2, 1]  # 15 steps: a place is taken again in the iteration after it is left
    assert max(difference(a, b) for a, b in zip(at_once, in_turn, strict=True)) < TOLERANCE


def test_the_image_is_the_pixels_rounded_as_the_stock_pipeline_rounds(family: StableDiffusion1, stock: Any) -> None:
    [made] = Engine(family).generate([PLAIN])
    expected = stock(
        PLAIN.prompt, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(3), width=64, height=64
    ).images[0]
    assert made.image.size == (64, 64)
    assert np.abs(np.asarray(made.image).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert (made.seed, made.settings["prompt"], made.settings["steps"]) == (3, "a red ring", 4)
    assert made.warnings == ()


def test_no_requests_make_no_pictures(family: StableDiffusion1) -> None:
    assert Engine(family).generate([]) == []


def test_a_prompt_past_the_tokenizers_limit_is_cut_and_said(family: StableDiffusion1) -> None:
    long = "x " * 75 + "tail end"
    engine = Engine(family)
    [made] = engine.generate([dataclasses.replace(PLAIN, prompt=long, steps=1)])
    assert made.warnings == ("the prompt is too long; left out: tail end",)
    [made] = engine.generate([dataclasses.replace(PLAIN, negative_prompt=long, steps=1)])
    assert made.warnings == ("the negative prompt is too long; left out: tail end",)
    [made] = engine.generate([dataclasses.replace(PLAIN, prompt="x " * 75, steps=1)])
    assert made.warnings == ()


@pytest.mark.parametrize(("width", "height"), [(60, 64), (64, 0), (64, -8), (4, 64)])
def test_a_size_the_model_cannot_make_is_refused_before_any_work(
    width: int, height: int, family: StableDiffusion1
) -> None:
    steps: list[int] = []
    with pytest.raises(SizeNotSupported, match="multiples of 8"):
        Engine(family).generate(
            [PLAIN, dataclasses.replace(PLAIN, width=width, height=height)], on_step=lambda step, _: steps.append(step)
        )
    assert steps == []


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"scheduler": "magic"}, "scheduler"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_setting_outside_the_models_range_is_refused(
    changes: dict[str, Any], setting: str, family: StableDiffusion1
) -> None:
    with pytest.raises(SettingNotSupported) as caught:
        Engine(family).generate([dataclasses.replace(PLAIN, **changes)])
    assert caught.value.setting == setting


def test_steps_are_counted_over_all_pictures(family: StableDiffusion1) -> None:
    seen: list[tuple[int, int]] = []
    Engine(family).generate(
        [dataclasses.replace(PLAIN, steps=3), dataclasses.replace(PLAIN, steps=1)],
        on_step=lambda step, total: seen.append((step, total)),
    )
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_a_stop_is_obeyed_between_two_steps_and_the_engine_goes_on_working(family: StableDiffusion1) -> None:
    engine = Engine(family)
    [before] = pixels(engine, PLAIN)
    seen: list[int] = []
    with pytest.raises(Cancelled) as caught:
        engine.generate([PLAIN], on_step=lambda step, _: seen.append(step), should_stop=lambda: len(seen) == 2)
    assert (caught.value.step, caught.value.total, seen) == (2, 4, [1, 2])
    assert torch.equal(pixels(engine, PLAIN)[0], before)


def test_making_a_picture_leaves_the_global_random_state_alone(family: StableDiffusion1) -> None:
    before = torch.get_rng_state()
    Engine(family).generate([dataclasses.replace(PLAIN, scheduler="euler_a")])
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_in_training_mode_are_back_in_it_after_a_picture(family: StableDiffusion1) -> None:
    family.unet.train()
    Engine(family).generate([dataclasses.replace(PLAIN, steps=1)])
    assert all(module.training for module in family.unet.modules())


def out_of_memory_above(family: StableDiffusion1, rows_max: int) -> list[int]:
    """A CPU never runs out of memory like a GPU, so its failing allocation is stood in for. Returns the rows asked."""
    asked: list[int] = []
    predict = family.predict

    def limited(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(len(latents))
        if len(latents) > rows_max:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return predict(latents, *args, **kwargs)

    family.predict = limited  # type: ignore[method-assign]
    return asked


def test_a_picture_that_does_not_fit_alone_fails_with_the_numbers(family: StableDiffusion1) -> None:
    out_of_memory_above(family, 0)
    engine = Engine(family, memory=ScriptedMemory(3 * 2**20))
    with pytest.raises(OutOfGpuMemory, match=r"1 picture\(s\) of 64x64 at once: 3 MiB free of 3 MiB") as caught:
        engine.generate([PLAIN, PLAIN])
    assert caught.value.__context__ is None  # nothing keeps the failed call's tensors alive
    assert pickle.loads(pickle.dumps(caught.value)).pictures == 1  # noqa: S301 - our own bytes


def test_a_batch_that_does_not_fit_is_split_and_gives_the_same_pictures(family: StableDiffusion1) -> None:
    requests = [dataclasses.replace(PLAIN, seed=seed, steps=3) for seed in range(5)]
    expected = pixels(Engine(family), *requests)
    asked = out_of_memory_above(family, 4)
    made = pixels(Engine(family), *requests)
    assert max(difference(a, b) for a, b in zip(expected, made, strict=True)) < TOLERANCE
    assert asked[:4] == [10, 4, 4, 2]
    assert asked.count(10) == 1  # what did not fit once is not tried at every step


def test_a_limit_set_by_a_shortage_is_left_again() -> None:
    limits = BatchLimits(4)
    limits.ran_out("64x64", 4)
    assert (limits.of("64x64"), limits.of("32x32")) == (2, 4)
    for _ in range(2 * GROW_AFTER_STEPS):
        limits.fitted("64x64", limits.of("64x64"))
    assert limits.of("64x64") == 4
    limits.ran_out("64x64", 1)
    assert limits.of("64x64") == 1


def test_calls_of_several_threads_share_batches_and_get_their_own_pictures(family: StableDiffusion1) -> None:
    engine = Engine(family)
    requests = [dataclasses.replace(PLAIN, seed=seed, steps=4 + seed) for seed in range(4)]
    alone = [pixels(engine, request)[0] for request in requests]
    batches: list[int] = []
    watch = family.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]) // 2))
    tickets = [engine.submit([request]) for request in requests]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(engine.wait, tickets))
    watch.remove()
    assert max(batches) == 4
    assert batches[-1] == 1
    for expected, ticket in zip(alone, tickets, strict=True):
        assert difference(expected, ticket.images()[0].pixels_CHW) < TOLERANCE


def test_one_calls_stop_ends_its_own_pictures_only(family: StableDiffusion1) -> None:
    engine = Engine(family)
    stopping = {"now": False}
    stopped = engine.submit([PLAIN, PLAIN], should_stop=lambda: stopping["now"])
    other = engine.submit([dataclasses.replace(PLAIN, seed=8)])
    engine.step()
    stopping["now"] = True
    engine.wait(other)
    with pytest.raises(Cancelled) as caught:
        stopped.images()
    assert (caught.value.step, caught.value.total) == (2, 8)
    assert difference(other.images()[0].pixels_CHW, pixels(engine, dataclasses.replace(PLAIN, seed=8))[0]) < TOLERANCE


def test_an_error_in_one_calls_callback_ends_that_call_only(family: StableDiffusion1) -> None:
    def failing(step: int, total: int) -> None:
        raise RuntimeError("the listener broke")

    engine = Engine(family)
    broken, other = engine.submit([PLAIN], on_step=failing), engine.submit([PLAIN])
    engine.wait(other)
    assert len(other.images()) == 1
    with pytest.raises(RuntimeError, match="listener"):
        broken.images()


def test_small_and_large_pictures_both_move(family: StableDiffusion1) -> None:
    engine = Engine(family)
    areas: list[int] = []
    family.unet.register_forward_pre_hook(lambda _, inputs: areas.append(inputs[0].shape[-1] ** 2))
    large = engine.submit([dataclasses.replace(PLAIN, width=128, height=128, steps=8)])
    small = engine.submit([dataclasses.replace(PLAIN, width=32, height=32, steps=20)])
    engine.wait(small)
    assert not large.finished
    assert areas.count(32 * 32) >= 1  # the large one had its turns meanwhile
    assert areas.count(8 * 8) == 20
    engine.wait(large)


def test_a_call_with_many_pictures_does_not_shut_out_one_with_few(family: StableDiffusion1) -> None:
    engine = Engine(family, batch_max=2)
    many = engine.submit([dataclasses.replace(PLAIN, seed=seed, steps=2) for seed in range(6)])
    few = engine.submit([dataclasses.replace(PLAIN, steps=2)])
    engine.wait(few)
    assert not many.finished
    engine.wait(many)


def test_an_error_of_the_denoiser_ends_only_the_call_that_meets_it(family: StableDiffusion1) -> None:
    engine = Engine(family)
    expected = pixels(engine, PLAIN)[0]
    predict = family.predict

    def failing(*args: Any, guidance_B: Tensor, **kwargs: Any) -> Tensor:
        if 9.0 in guidance_B:
            raise RuntimeError("this one cannot be drawn")
        return predict(*args, guidance_B=guidance_B, **kwargs)

    family.predict = failing  # type: ignore[method-assign]
    beside, small = engine.submit([PLAIN]), engine.submit([dataclasses.replace(PLAIN, width=32, height=32)])
    with pytest.raises(RuntimeError, match="cannot be drawn"):
        engine.render([dataclasses.replace(PLAIN, guidance_scale=9.0)])
    for ticket in (beside, small):
        engine.wait(ticket)
    assert len(small.images()) == 1
    assert difference(beside.images()[0].pixels_CHW, expected) < TOLERANCE


@pytest.mark.parametrize("error", [RuntimeError("broken kernel"), KeyboardInterrupt()])
def test_an_error_of_the_denoiser_for_everyone_ends_every_call_and_the_engine_goes_on(
    error: BaseException, family: StableDiffusion1
) -> None:
    engine = Engine(family)
    predict = family.predict

    def failing(*_: Any, **__: Any) -> Tensor:
        raise error

    family.predict = failing  # type: ignore[method-assign]
    other = engine.submit([PLAIN])
    with pytest.raises(type(error)):
        engine.generate([PLAIN])
    assert other.finished
    family.predict = predict  # type: ignore[method-assign]
    assert len(engine.generate([PLAIN])) == 1


def test_a_request_without_a_size_gets_the_models_own(family: StableDiffusion1) -> None:
    native = family.native_size_px
    (picture,) = Engine(family).generate([dataclasses.replace(PLAIN, width=None, height=None, steps=1)])
    assert picture.image.size == (native, native)
    assert (picture.settings["width"], picture.settings["height"]) == (native, native)


def test_a_pictures_settings_tell_the_scheduler_that_drew_it(family: StableDiffusion1) -> None:
    own, euler = Engine(family).generate(
        [dataclasses.replace(PLAIN, scheduler=name, steps=1) for name in (None, "euler")]
    )
    assert (own.settings["scheduler"], euler.settings["scheduler"]) == ("ddim", "euler")
    by_name = dataclasses.replace(PLAIN, scheduler="ddim")
    assert difference(pixels(Engine(family), by_name)[0], pixels(Engine(family), PLAIN)[0]) < TOLERANCE


def test_a_scheduler_that_only_the_model_itself_asks_for_is_told_by_its_class(family: StableDiffusion1) -> None:
    class OfTheModel(diffusers.DDIMScheduler):
        pass

    assert family.scheduler_name(OfTheModel()) == "OfTheModel"


def test_the_time_of_an_iteration_is_told_while_it_lasts(family: StableDiffusion1) -> None:
    now = {"s": 100.0}
    engine = Engine(family, clock=lambda: now["s"])
    told: list[float] = []

    def slow(*_: Any) -> None:
        now["s"] += 700.0
        told.append(engine.iteration_s())

    family.unet.register_forward_pre_hook(slow)
    engine.render([dataclasses.replace(PLAIN, steps=2)])
    assert (told, engine.iteration_s()) == ([700.0, 700.0], 0.0)


def out_of_memory_in_the_vae(family: StableDiffusion1, *, whole_max: int, tiles_fit: bool = True) -> list[int]:
    """More than ``whole_max`` pictures fit only in tiles. Returns the pictures of each call."""
    asked: list[int] = []
    decode = family.decode

    def limited(latents: Tensor) -> Tensor:
        asked.append(len(latents))
        if not (tiles_fit if family.vae.use_tiling else len(latents) <= whole_max):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(latents)

    family.decode = limited  # type: ignore[method-assign]
    return asked


def test_pictures_that_end_together_are_decoded_together_and_are_what_they_are_alone(family: StableDiffusion1) -> None:
    requests = [dataclasses.replace(PLAIN, seed=seed, steps=2) for seed in range(5)]
    expected = pixels(Engine(family), *requests)
    asked = out_of_memory_in_the_vae(family, whole_max=2)
    made = pixels(Engine(family, decode_max=4), *requests)
    assert asked == [4, 2, 2, 1]
    assert max(difference(a, b) for a, b in zip(expected, made, strict=True)) < TOLERANCE


def test_a_picture_that_the_vae_cannot_hold_is_decoded_in_tiles(family: StableDiffusion1, stock: Any) -> None:
    large = dataclasses.replace(PLAIN, width=96, height=128, steps=2)
    stock.vae.enable_tiling()
    expected = stock_pixels(stock, large)
    asked = out_of_memory_in_the_vae(family, whole_max=0)
    assert difference(pixels(Engine(family), large)[0], expected) < TOLERANCE
    assert asked == [1, 1]
    assert not family.vae.use_tiling
    assert difference(pixels(Engine(family, tiled=True), large)[0], expected) < TOLERANCE
    assert asked == [1, 1, 1]


@pytest.mark.parametrize("tiled", [False, True])
def test_a_picture_that_does_not_fit_even_in_tiles_fails_alone(family: StableDiffusion1, tiled: bool) -> None:
    out_of_memory_in_the_vae(family, whole_max=0, tiles_fit=False)
    engine = Engine(family, tiled=tiled)
    with pytest.raises(OutOfGpuMemory):
        engine.generate([PLAIN])
    del family.decode  # type: ignore[attr-defined]
    assert len(engine.generate([PLAIN])) == 1
