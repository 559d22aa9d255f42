from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion.engine import Engine, GenerateRequest, LoraRef
from diffusion.engine.adapter_cache import AdapterCache
from diffusion.engine.arena import ALIGNMENT, Arena
from diffusion.engine.packed import Allocate, FileStamp
from diffusion.errors import LoraInvalid, LoraMismatch
from diffusion.families import StableDiffusion1
from diffusion.lora import save_lora

PLAIN = GenerateRequest(prompt="a red ring", width=64, height=64, steps=2, guidance_scale=5.0, seed=3)
WriteLora = Callable[..., Path]


class Files:
    """A cache over files of 10 bytes; loads wait for the gate."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gate = threading.Event()
        self.loads: list[str] = []
        self.error: Exception | None = None
        self.arena = Arena(bytes_max=2 * ALIGNMENT)
        self.cache = AdapterCache(self._load, arena=self.arena, bytes_max=20, on_loaded=lambda: None)

    def _load(self, stamp: FileStamp, allocate: Allocate) -> Any:
        assert self.gate.wait(30)
        self.loads.append(Path(stamp[0]).name)
        data = allocate(10)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(size_bytes=10, data=data)

    def path(self, name: str) -> Path:
        (self.folder / name).write_bytes(b"x")
        return self.folder / name


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.gate.set()
    files.cache.close()


def test_a_file_is_loaded_once_however_many_ask(files: Files) -> None:
    path = files.path("a")
    leases = [files.cache.borrow(path) for _ in range(3)]
    assert not leases[0].ready
    files.gate.set()
    assert len({id(lease.adapter()) for lease in leases}) == 1
    assert files.loads == ["a"]


def test_the_least_recently_used_leaves_first_and_never_one_in_use(files: Files) -> None:
    files.gate.set()
    used = files.cache.borrow(files.path("used"))
    used.adapter()
    for name in "abc":
        lease = files.cache.borrow(files.path(name))
        lease.adapter()
        files.cache.release(lease)
    assert (len(files.cache), files.cache.size_bytes) == (2, 20)  # the one in use, and c
    files.cache.borrow(files.folder / "c").adapter()
    files.cache.borrow(files.folder / "used").adapter()
    assert files.loads == ["used", "a", "b", "c"]


def test_a_failed_load_reaches_everyone_who_waits_and_is_tried_again_by_the_next(files: Files) -> None:
    path = files.path("a")
    files.error = LoraInvalid("broken")
    leases = [files.cache.borrow(path) for _ in range(2)]
    files.gate.set()
    for lease in leases:
        with pytest.raises(LoraInvalid, match="broken"):
            lease.adapter()
        files.cache.release(lease)
    files.error = None
    assert files.cache.borrow(path).adapter()


def test_clearing_keeps_what_is_in_use(files: Files) -> None:
    files.gate.set()
    lease = files.cache.borrow(files.path("a"))
    lease.adapter()
    files.cache.clear()
    assert len(files.cache) == 1
    files.cache.release(lease)
    files.cache.clear()
    assert len(files.cache) == 0


def test_adapters_in_use_may_outgrow_the_arena_and_its_budget_holds_again_after(files: Files) -> None:
    files.gate.set()
    leases = [files.cache.borrow(files.path(name)) for name in "abcd"]
    for fill, lease in enumerate(leases):
        lease.adapter().data.fill_(fill)
    assert files.arena.size_bytes == 4 * ALIGNMENT
    assert [int(lease.adapter().data.max()) for lease in leases] == [0, 1, 2, 3]
    for lease in leases:
        files.cache.release(lease)
    assert files.arena.size_bytes == 2 * ALIGNMENT


def test_a_new_adapter_takes_the_place_of_the_one_longest_unused(files: Files) -> None:
    files.gate.set()
    places = []
    for name in "abc":
        lease = files.cache.borrow(files.path(name))
        places.append(lease.adapter().data.data_ptr())
        files.cache.release(lease)
    assert places[2] == places[0] != places[1]
    assert files.arena.size_bytes == 2 * ALIGNMENT


def test_a_failed_load_gives_its_place_back(files: Files) -> None:
    files.gate.set()
    files.error = LoraInvalid("broken")
    for name in "abcdef":
        lease = files.cache.borrow(files.path(name))
        with pytest.raises(LoraInvalid):
            lease.adapter()
    assert files.arena.size_bytes <= 2 * ALIGNMENT


def test_pictures_go_on_while_an_adapter_loads(
    family: StableDiffusion1, write_lora: WriteLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lora("slow")
    gate = threading.Event()
    engine = Engine(family)
    load = engine.adapters._load
    monkeypatch.setattr(engine.adapters, "_load", lambda *given: load(*given) if gate.wait(30) else None)
    waiting = engine.submit([dataclasses.replace(PLAIN, loras=(LoraRef(path),))])
    assert len(engine.render([PLAIN])) == 1
    assert not waiting.finished
    gate.set()
    engine.wait(waiting)
    assert len(waiting.images()) == 1


def test_a_missing_foreign_or_corrupt_adapter_fails_only_its_own_request(
    family: StableDiffusion1, write_lora: WriteLora, tmp_path: Path
) -> None:
    good = write_lora("good")
    foreign, corrupt = tmp_path / "foreign.safetensors", tmp_path / "corrupt.safetensors"
    import torch

    save_lora(
        foreign,
        {"unet.far.lora_A.weight": torch.ones(1, 4), "unet.far.lora_B.weight": torch.ones(4, 1)},
        metadata={},
    )
    corrupt.write_bytes(good.read_bytes()[:200])
    engine = Engine(family)
    fine = engine.submit([dataclasses.replace(PLAIN, loras=(LoraRef(good),))])
    bad = [engine.submit([dataclasses.replace(PLAIN, loras=(LoraRef(path),))]) for path in (foreign, corrupt)]
    with pytest.raises(LoraInvalid):
        engine.submit([dataclasses.replace(PLAIN, loras=(LoraRef(good), LoraRef(tmp_path / "no.safetensors")))])
    engine.wait(fine)
    assert len(fine.images()) == 1
    for ticket, error in zip(bad, (LoraMismatch, LoraInvalid), strict=True):
        engine.wait(ticket)
        with pytest.raises(error):
            ticket.images()
    engine.clear_loras()
    assert len(engine.adapters) == 0  # nothing is still held by those that failed
