"""LoKr with whole matrices: layers add a Kronecker product instead of a pair, in any batch with everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion import lycoris
from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.lora_slots import LoraSlots
from diffusion.engine.packed import Adapter, load_adapter, stamp_of
from diffusion.engine.slot_layers import give_slot
from diffusion.errors import LoraInvalid, LoraMismatch, SettingNotSupported
from diffusion.families import StableDiffusion1
from diffusion.lora import read_lora
from tests.diffusion.engine.lora_pictures import PLAIN, TOLERANCE, difference, pixels, stock_pixels, with_loras

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.ff.net.0.proj")
WriteLora = Callable[..., Path]


@pytest.fixture(autouse=True)
def _even_small_ones_stay_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lycoris, "CHEAP_RANK_MAX", 1)


def random(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(family: StableDiffusion1, name: str) -> Any:
    component, _, path = name.partition(".")
    return family.lora_components[component].get_submodule(path)


def write_lokr(
    path: Path, family: StableDiffusion1, *, layers: tuple[str, ...] = LAYERS, w1: tuple[int, int] = (4, 2),
    seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """A file of whole matrices; returns what it changes of each layer's weight."""
    state, changes = dict[str, Tensor](), dict[str, Tensor]()
    for i, name in enumerate(layers):
        outs, ins = layer_of(family, name).weight.shape
        first, second = random(*w1, seed=seed + i), random(outs // w1[0], ins // w1[1], seed=seed + 50 + i)
        # The alpha has no say where both are whole.
        state |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second, f"{name}.alpha": torch.tensor(7.0)}
        changes[name] = torch.kron(first, second)
    save_file(state, path)
    return changes


def changed_pixels(pipeline: Any, *changes: tuple[dict[str, Tensor], float]) -> Tensor:
    """The stock pipeline's, with the changes added to its weights."""
    with torch.no_grad():
        for change, scale in changes:
            for name, delta in change.items():
                component, _, path = name.partition(".")
                getattr(pipeline, component).get_submodule(path).weight += scale * delta
    return stock_pixels(pipeline)


def loaded(path: Path, family: StableDiffusion1) -> Adapter:
    return load_adapter(stamp_of(path), family, lambda size: torch.empty(size, dtype=torch.uint8))


sides = st.integers(1, 5)


@given(slots=st.integers(1, 3), rows=st.integers(1, 3), w1=st.tuples(sides, sides), w2=st.tuples(sides, sides))
def test_a_layer_adds_each_slots_product_to_its_rows(
    slots: int, rows: int, w1: tuple[int, int], w2: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(w1[1] * w2[1], w1[0] * w2[0])
    x = torch.randn(slots * rows, 4, layer.in_features)
    plain = layer(x).detach()
    first, second = torch.randn(slots, *w1), torch.randn(slots, *w2)
    give_slot(layer).products = (
        (first, second),
        (second.new_zeros(slots, 1, 1), torch.randn(slots, *plain.shape[2:], layer.in_features)),
    )
    with torch.no_grad():
        added = layer(x) - plain
    for row in range(slots * rows):
        change = torch.kron(first[row // rows], second[row // rows])
        torch.testing.assert_close(added[row], x[row] @ change.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_kind_of_slot")
@pytest.mark.parametrize("w1", [(4, 2), (8, 16)])
def test_a_picture_equals_the_stock_pipelines_with_the_change_merged(
    w1: tuple[int, int], family: StableDiffusion1, stock: Any, tmp_path: Path
) -> None:
    layers = (*LAYERS, "text_encoder.encoder.layers.0.self_attn.q_proj")
    changes = write_lokr(tmp_path / "a.safetensors", family, layers=layers, w1=w1)
    base, made = pixels(Engine(family), PLAIN, with_loras(LoraRef(tmp_path / "a.safetensors", 0.8)))
    assert difference(made, changed_pixels(stock, (changes, 0.8))) < TOLERANCE
    assert difference(made, base) > 10 * TOLERANCE


def test_several_of_them_on_one_picture_add_up(family: StableDiffusion1, stock: Any, tmp_path: Path) -> None:
    same = write_lokr(tmp_path / "a.safetensors", family, seed=1)
    again = write_lokr(tmp_path / "b.safetensors", family, seed=2)
    other = write_lokr(tmp_path / "c.safetensors", family, layers=LAYERS[1:], w1=(2, 8), seed=3)
    scales = {"a": 0.5, "b": -0.7, "c": 0.9}
    [made] = pixels(
        Engine(family), with_loras(*(LoraRef(tmp_path / f"{n}.safetensors", scale) for n, scale in scales.items()))
    )
    expected = changed_pixels(stock, (same, 0.5), (again, -0.7), (other, 0.9))
    assert difference(made, expected) < TOLERANCE


@pytest.mark.usefixtures("each_kind_of_slot")
def test_they_share_a_batch_with_every_other_kind(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lokr(a, family, seed=1)
    write_lokr(b, family, w1=(2, 8), seed=2)
    plain = write_lora("plain", rank=7, components=("unet", "text_encoder"), targets="all")
    requests = [
        with_loras(LoraRef(a, 0.6)),
        PLAIN,
        with_loras(LoraRef(plain, 0.4), LoraRef(b, 0.5)),
        dataclasses.replace(with_loras(LoraRef(b, 0.5), LoraRef(a, -0.4)), steps=4),
        with_loras(LoraRef(plain, 0.9)),
    ]
    engine = Engine(family)
    for request, made in zip(requests, pixels(engine, *requests), strict=True):
        assert difference(made, pixels(Engine(family), request)[0]) < TOLERANCE
    # What one batch has left behind is nowhere in the next.
    for request in reversed(requests):
        assert difference(pixels(engine, request)[0], pixels(Engine(family), request)[0]) < TOLERANCE
    assert difference(pixels(engine, PLAIN)[0], pixels(Engine(family), PLAIN)[0]) == 0.0


def test_a_picture_is_the_same_whether_it_stays_a_product_or_becomes_a_pair(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a DoRA as well, which scales what came before it."""
    write_lokr(tmp_path / "a.safetensors", family)
    source = read_lora(write_lora("source", targets="all"))
    magnitudes = {
        f"{name}.lora_magnitude_vector": layer_of(family, name).weight.detach().norm(dim=1) * 1.3 for name in LAYERS
    }
    pairs = {key: t for key, t in source.state.items() if key.startswith(LAYERS)}
    save_file(pairs | magnitudes, tmp_path / "dora.safetensors")
    request = with_loras(LoraRef(tmp_path / "dora.safetensors", 0.7), LoraRef(tmp_path / "a.safetensors", 0.6))
    assert loaded(tmp_path / "a.safetensors", family).products
    [as_product] = pixels(Engine(family), request)
    monkeypatch.setattr(lycoris, "CHEAP_RANK_MAX", 10**6)
    assert not loaded(tmp_path / "a.safetensors", family).products
    [as_pair] = pixels(Engine(family), request)
    assert difference(as_product, as_pair) < TOLERANCE


def test_a_dora_after_one_on_the_same_layers_fails_alone_and_says_what_to_do(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    write_lokr(tmp_path / "a.safetensors", family, layers=LAYERS[:1])
    write_lokr(
        tmp_path / "elsewhere.safetensors",
        family,
        layers=("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",),
    )
    source = read_lora(write_lora("source"))
    norm = layer_of(family, LAYERS[0]).weight.detach().norm(dim=1)
    pair = {key: tensor for key, tensor in source.state.items() if key.startswith(LAYERS[0])}
    save_file(pair | {f"{LAYERS[0]}.lora_magnitude_vector": norm}, tmp_path / "dora.safetensors")
    engine = Engine(family)
    other = engine.submit([PLAIN])
    dora = LoraRef(tmp_path / "dora.safetensors")
    refused = engine.submit([with_loras(LoraRef(tmp_path / "a.safetensors"), dora)])
    fine = engine.submit([with_loras(LoraRef(tmp_path / "elsewhere.safetensors"), dora)])
    while not (other.finished and refused.finished and fine.finished):
        engine.step()
    assert len(other.images()) == len(fine.images()) == 1
    with pytest.raises(SettingNotSupported, match="name it first"):
        refused.images()


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_no_graph_is_compiled_once_their_shapes_have_been_seen(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for i, path in enumerate(paths):
        write_lokr(path, family, seed=i)
    plain = write_lora("plain", rank=4)
    torch._dynamo.reset()
    engine = Engine(family, compiled="eager", batch_max=4)

    def batch(size: int, first: int) -> list[GenerateRequest]:
        return [with_loras(LoraRef(plain, 0.3), LoraRef(paths[(first + i) % 4], 0.5)) for i in range(size)]

    for size in (4, 2, 1):
        engine.render(batch(size, 0))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for first in range(1, 4):
        engine.render([*batch(4, first), PLAIN, with_loras(LoraRef(paths[first], -0.2))])
    assert counters["stats"]["unique_graphs"] == graphs


def test_on_a_convolution_it_is_a_pair(
    family: StableDiffusion1, stock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another model of the same architecture the layer may be a linear one."""
    name = "unet.down_blocks.0.attentions.0.proj_in"
    outs, ins, *kernel = layer_of(family, name).weight.shape
    assert kernel == [1, 1]
    first, second = random(4, 2, seed=1), random(outs // 4, ins // 2, seed=2)
    save_file({f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}, tmp_path / "a.safetensors")
    adapter = loaded(tmp_path / "a.safetensors", family)
    assert not adapter.products
    assert adapter.components == {"unet"}
    [made] = pixels(Engine(family), with_loras(LoraRef(tmp_path / "a.safetensors", 0.8)))
    change = torch.kron(first, second)[:, :, None, None]
    assert difference(made, changed_pixels(stock, ({name: change}, 0.8))) < TOLERANCE
    monkeypatch.setattr(lycoris, "RANK_MAX", 2)
    with pytest.raises(LoraInvalid, match="2 is the most"):
        loaded(tmp_path / "a.safetensors", family)


def test_their_table_is_counted_before_it_is_made(family: StableDiffusion1, tmp_path: Path) -> None:
    write_lokr(tmp_path / "a.safetensors", family)
    adapter = loaded(tmp_path / "a.safetensors", family)
    elements = sum(4 * 2 + layer_of(family, name).weight.numel() // (4 * 2) for name in LAYERS)
    assert adapter.size_bytes == 4 * elements
    slots, combos = LoraSlots(family), [((adapter, 1.0),)] * 3
    needed = slots.growth_bytes("unet", combos)
    assert needed == 4 * 4 * elements
    slots.arrange("unet", combos)
    assert slots.size_bytes == needed
    assert slots.growth_bytes("unet", combos) == 0
    slots.remove()
    assert slots.size_bytes == 0
    assert type(layer_of(family, LAYERS[0])) is nn.Linear


def test_one_for_another_model_or_with_broken_numbers_is_refused(family: StableDiffusion1, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{LAYERS[0]}.lokr_w1": torch.ones(5, 5), f"{LAYERS[0]}.lokr_w2": torch.ones(7, 7)}, path)
    with pytest.raises(LoraMismatch, match=r"the LoKr was made for \(35, 35\)"):
        loaded(path, family)
    save_file({f"{LAYERS[0]}.lokr_w1": torch.full((2, 2), torch.inf), f"{LAYERS[0]}.lokr_w2": torch.ones(8, 8)}, path)
    with pytest.raises(LoraInvalid, match="finite"):
        loaded(path, family)
