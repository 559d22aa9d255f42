"""Memory before a batch: a scripted device stands in for a GPU's, the models and the engine are real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.engine import Engine, GenerateRequest
from diffusion.engine.admission import HEADROOM, TRIED_EVERY, Admission, Cost, PeakMemory, Shortage
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.memory import HostMemory
from diffusion.errors import InsufficientMemory
from diffusion.families import StableDiffusion1
from diffusion.families.base import TextEmbeds
from diffusion.testing import ScriptedMemory

PLAIN = GenerateRequest(prompt="a red ring", width=64, height=64, steps=4, guidance_scale=7.5, seed=3)
MIB = 2**20
ROW = 4 * 16 * 16
"""Latent elements of a row of PLAIN's."""
FIXED, PER_ROW, DECODE = 2 * MIB, 10 * MIB, 30 * MIB
"""What the scripted device holds during a call."""


def hold(family: StableDiffusion1, memory: ScriptedMemory) -> list[int]:
    """Calls of the family take memory of the device. Returns the rows of each call of the denoiser."""
    rows: list[int] = []
    predict, decode = family.predict, family.decode

    def held_predict(latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(latents))
        with memory.holding(FIXED + PER_ROW * latents.numel() // ROW):
            return predict(latents, *args, **kwargs)

    def held_decode(latents: Tensor) -> Tensor:
        with memory.holding(DECODE * latents.numel() // ROW // (4 if family.vae.use_tiling else 1)):
            return decode(latents)

    family.predict = held_predict  # type: ignore[method-assign]
    family.decode = held_decode  # type: ignore[method-assign]
    return rows


def four(**changes: Any) -> list[GenerateRequest]:
    return [dataclasses.replace(PLAIN, seed=seed, **changes) for seed in range(4)]


def test_the_first_call_is_of_one_picture_and_the_next_of_as_many_as_fit(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(75 * MIB)
    rows = hold(family, memory)
    Engine(family, memory=memory).render(four(steps=2))
    # Six rows would take 62 MiB and fit; eight would not.
    assert rows == [2, 6, 6, 2]
    assert memory.given_back == 0  # it never came to running out


def test_what_is_free_now_decides_not_what_was_free(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(120 * MIB)
    rows = hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render(four(steps=2))
    assert rows == [2, 6, 8]
    rows.clear()
    with memory.holding(70 * MIB):
        engine.render(four(steps=1))
    engine.render(four(steps=1))
    assert rows == [4, 4, 8]
    assert memory.given_back == 0


def test_a_batch_in_parts_gives_the_same_pictures(family: StableDiffusion1) -> None:
    expected = [rendered.pixels_CHW for rendered in Engine(family).render(four())]
    memory = ScriptedMemory(50 * MIB)
    rows = hold(family, memory)
    made = [rendered.pixels_CHW for rendered in Engine(family, memory=memory).render(four())]
    assert max(rows) == 4
    assert max(float((a - b).abs().max()) for a, b in zip(expected, made, strict=True)) < 1e-4


def test_a_picture_known_not_to_fit_fails_before_any_work_with_the_numbers(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(100 * MIB)
    rows = hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render([PLAIN])
    rows.clear()
    with memory.holding(90 * MIB), pytest.raises(InsufficientMemory) as caught:
        engine.render([PLAIN])
    assert str(caught.value) == "insufficient GPU memory: a picture of 64x64 needs 22 MiB, 10 MiB are free"
    assert (caught.value.code, rows) == ("insufficient_gpu_memory", [])
    assert len(engine.render([PLAIN])) == 1  # once the memory is there again


def test_a_larger_picture_is_known_not_to_fit_where_a_smaller_one_does_not(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(100 * MIB)
    hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render([PLAIN])
    with memory.holding(90 * MIB), pytest.raises(InsufficientMemory, match="96x64 needs 22 MiB, 10 MiB are free"):
        engine.render([dataclasses.replace(PLAIN, width=96)])


def test_a_picture_of_which_it_is_only_expected_is_tried(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(100 * MIB)
    rows = hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render([PLAIN])
    with memory.holding(57 * MIB):  # 42 MiB needed; 44 expected, and the headroom
        engine.render([dataclasses.replace(PLAIN, width=128, steps=1)])
    assert rows[-1] == 2


def test_a_shortage_that_shows_only_in_the_call_is_still_met_by_halves(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(120 * MIB)
    rows = hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render(four(steps=2))
    rows.clear()
    measure = memory.measure
    with memory.holding(70 * MIB):
        memory.measure = lambda: dataclasses.replace(measure(), free_bytes=120 * MIB)  # type: ignore[method-assign]
        engine.render(four(steps=1))
    assert rows == [8, 4, 4]
    assert memory.given_back == 1


def test_pictures_are_decoded_as_many_at_once_as_fit(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(100 * MIB)
    hold(family, memory)
    engine = Engine(family, memory=memory, decode_max=4)
    decoded: list[int] = []
    decode = family.decode
    family.decode = lambda latents: (decoded.append(len(latents)), decode(latents))[1]  # type: ignore[method-assign,func-returns-value]
    engine.render(four(steps=1))
    assert decoded == [1, 3]
    assert memory.given_back == 0


def test_a_picture_known_not_to_fit_the_vae_goes_in_tiles_at_once(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(100 * MIB)
    hold(family, memory)
    engine = Engine(family, memory=memory)
    engine.render([dataclasses.replace(PLAIN, steps=1)])
    with memory.holding(75 * MIB):
        engine.render([dataclasses.replace(PLAIN, steps=1)])
    assert memory.given_back == 0


def hold_prompts(family: StableDiffusion1, memory: ScriptedMemory, each_bytes: int) -> list[int]:
    """Calls of the text encoder take memory. Returns the prompts of each call."""
    prompts: list[int] = []
    encode = family.encode_prompts

    def held_encode(texts: Sequence[str]) -> TextEmbeds:
        prompts.append(len(texts))
        with memory.holding(each_bytes * len(texts)):
            return encode(texts)

    family.encode_prompts = held_encode  # type: ignore[method-assign]
    return prompts


def test_prompts_are_encoded_as_many_at_once_as_fit(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(75 * MIB)
    alone = Engine(family).render([PLAIN])[0].pixels_CHW
    prompts = hold_prompts(family, memory, 20 * MIB)
    requests = [PLAIN, *(dataclasses.replace(PLAIN, prompt=f"number {seed}", seed=seed) for seed in range(5))]
    made = Engine(family, memory=memory).render(requests)[0].pixels_CHW
    # The negative prompt, which all share, and six others; four would take 80 MiB.
    assert prompts == [1, 3, 3]
    assert memory.given_back == 0
    assert float((made - alone).abs().max()) < 1e-4


def test_prompts_that_turn_out_not_to_fit_go_in_halves(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(75 * MIB)
    prompts = hold_prompts(family, memory, 20 * MIB)
    engine = Engine(family, memory=memory)
    engine.render([PLAIN])
    family.encode_prompts = hold_more(family.encode_prompts, memory)  # type: ignore[method-assign]
    engine.render([dataclasses.replace(PLAIN, prompt=f"number {seed}", seed=seed) for seed in range(3)])
    assert prompts == [1, 1, 3, 1, 2]
    assert memory.given_back == 1


def hold_more(encode: Callable[[Sequence[str]], TextEmbeds], memory: ScriptedMemory) -> Callable[..., TextEmbeds]:
    """Others take memory as soon as a call has begun."""

    def held_encode(texts: Sequence[str]) -> TextEmbeds:
        with memory.holding(20 * MIB):
            return encode(texts)

    return held_encode


def test_a_prompt_known_not_to_fit_fails_alone_with_the_numbers(family: StableDiffusion1) -> None:
    memory = ScriptedMemory(75 * MIB)
    hold_prompts(family, memory, 20 * MIB)
    engine = Engine(family, memory=memory)
    engine.render([PLAIN])
    with memory.holding(60 * MIB):
        known = engine.submit([dataclasses.replace(PLAIN, seed=4)])
        other = engine.submit([dataclasses.replace(PLAIN, prompt="another")])
        while engine.step():
            pass
        known.images()
        with pytest.raises(InsufficientMemory, match="a prompt needs 20 MiB, 15 MiB are free"):
            other.images()


def test_a_device_that_tells_no_peaks_is_not_asked(family: StableDiffusion1) -> None:
    class Silent(HostMemory):
        def measure(self) -> Any:
            raise AssertionError("asked")

    rows: list[int] = []
    family.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    Engine(family, memory=Silent()).render(four(steps=1))
    assert rows == [8]


def test_room_that_adapters_will_take_in_slots_counts(
    family: StableDiffusion1, write_lora: Callable[..., Path], each_kind_of_slot: None
) -> None:
    engine, slots = Engine(family), LoraSlots(family)
    lease = engine.adapters.borrow(write_lora("a", rank=4))
    combo = ((lease.adapter(), 1.0),)
    held_bytes = 0
    for count in (1, 3):
        grows = slots.growth_bytes("unet", [combo] * count, table="t")
        slots.arrange("unet", [combo] * count, table="t")
        table = slots._components["unet"]._pairs._tables["t"]
        assert grows == table.factor_bytes - held_bytes > 0
        held_bytes = table.factor_bytes
    assert slots.growth_bytes("unet", [combo] * 4, table="t") == 0
    assert slots.growth_bytes("unet", [()] * 4, table="t") == 0


@given(
    st.integers(0, 10**9), st.integers(1, 10**6), st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    st.integers(1, 5000),
)  # fmt: skip
def test_of_calls_with_a_fixed_part_and_one_in_proportion_the_bounds_hold(
    fixed: int, per_element: int, seen: list[int], size: int
) -> None:
    peaks = PeakMemory(seen[0], fixed + per_element * seen[0])
    for one in seen[1:]:
        peaks.learn(one, fixed + per_element * one)
    assert peaks.least_bytes(size) <= fixed + per_element * size <= peaks.most_bytes(size) + 1
    if size in seen:
        assert peaks.least_bytes(size) == peaks.most_bytes(size)


def test_the_latest_call_of_a_size_counts_and_memory_of_sizes_is_bounded() -> None:
    peaks = PeakMemory(1, 500)
    peaks.learn(1, 100)
    assert peaks.most_bytes(1) == 100
    for size in range(2, 2000):
        peaks.learn(size, 100 * size)
    assert len(peaks._peaks) <= 256
    assert peaks.least_bytes(1) == 0


def test_a_peak_that_others_took_part_in_refuses_for_a_while_only() -> None:
    memory = ScriptedMemory(100)
    admission = Admission(memory)
    with admission.learning("k", 10), memory.holding(60):  # of which others took 55
        pass
    memory.held_bytes = 50
    refusals = [admission.refusal("k", lambda _: Cost(10)) for _ in range(TRIED_EVERY)]
    assert refusals == [Shortage(60, 50, 100)] * (TRIED_EVERY - 1) + [None]
    with admission.learning("k", 10), memory.holding(5):
        pass
    assert admission.refusal("k", lambda _: Cost(10)) is None


def test_remembered_prompts_hold_their_own_rows_only(family: StableDiffusion1) -> None:
    engine = Engine(family)
    engine.render([dataclasses.replace(PLAIN, prompt=f"number {seed}", steps=1) for seed in range(3)])
    prompts = engine._prompts._cache.values()
    assert len(prompts) == 4
    for tensor in (tensor for embeds in prompts for tensor in embeds.tensors().values()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_call_that_failed_teaches_nothing() -> None:
    admission = Admission(ScriptedMemory(100))
    with pytest.raises(torch.OutOfMemoryError), admission.learning("k", 10):
        raise torch.OutOfMemoryError
    assert admission.admits("k", 4, Cost) == 1
    with admission.learning("k", 10), admission.memory.holding(20):  # type: ignore[attr-defined]
        pass
    assert admission.admits("k", 4, lambda count: Cost(10 * count)) == int(100 / HEADROOM / 20)
    assert admission.admits("k", 4, lambda count: Cost(10 * count, 30 * count)) == 1
