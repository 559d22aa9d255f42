from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.engine import arena as arena_module
from diffusion.engine.arena import ALIGNMENT, Arena, Piece

SLAB = 16 * ALIGNMENT
BUDGET = 3 * SLAB


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "SLAB_BYTES", SLAB)


def span(piece: Piece) -> tuple[int, int]:
    return piece.data.data_ptr(), piece.data.data_ptr() + len(piece.data)


def gap_bytes(arena: Arena) -> int:
    return sum(end - start for slab in arena._slabs for start, end in slab.gaps)


Step = tuple[str, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 2 * SLAB)),
        st.tuples(st.just("grow"), st.integers(1, BUDGET + SLAB)),
        st.tuples(st.just("free"), st.integers(0, 100)),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(STEPS, st.booleans())
def test_pieces_never_overlap_nothing_leaks_and_the_budget_is_kept(steps: list[Step], fenced: bool) -> None:
    arena = Arena(bytes_max=BUDGET, fence=(lambda: lambda: None) if fenced else None)
    held: dict[Piece, int] = {}
    grown = False
    for number, (kind, size) in enumerate(steps):
        if kind == "free":
            if held:
                piece = list(held)[size % len(held)]
                assert torch.all(piece.data == held.pop(piece))  # nobody else has written there
                arena.free(piece)
            continue
        piece = arena.take(size) if kind == "take" else arena.grow(size)
        if piece is None:
            continue
        grown |= kind == "grow"
        assert len(piece.data) == size
        assert (piece.start % ALIGNMENT, piece.end % ALIGNMENT) == (0, 0)
        held[piece] = number % 256
        piece.data.fill_(number % 256)
        places = sorted(span(piece) for piece in held)
        assert all(before[1] <= after[0] for before, after in pairwise(places))
        assert arena.size_bytes <= BUDGET or grown
        if not fenced:
            assert gap_bytes(arena) + sum(piece.end - piece.start for piece in held) == arena.size_bytes
    for piece in held:
        arena.free(piece)
    # All of it is free again, in one piece for each slab, and may be taken whole.
    assert arena.take(BUDGET) is not None
    assert arena.size_bytes == BUDGET
    assert gap_bytes(arena) == 0


def test_neighbours_that_are_freed_in_any_order_are_one_gap() -> None:
    arena = Arena(bytes_max=SLAB)
    pieces = [arena.grow(SLAB // 4) for _ in range(4)]
    assert arena.take(1) is None
    for index in (2, 0, 1):
        arena.free(pieces[index])
    assert arena.take(3 * SLAB // 4) is not None
    assert arena.size_bytes == SLAB


def test_the_tightest_gap_is_taken_so_that_a_large_one_stays() -> None:
    arena = Arena(bytes_max=SLAB)
    sizes = [4, 1, 2, 1, 8]
    pieces = [arena.grow(size * ALIGNMENT) for size in sizes]
    arena.free(pieces[0])
    arena.free(pieces[2])
    tight = arena.grow(2 * ALIGNMENT)
    assert tight.start == pieces[2].start
    assert arena.take(4 * ALIGNMENT) is not None


def test_many_small_pieces_share_a_slab_and_one_above_it_has_its_own() -> None:
    arena = Arena(bytes_max=BUDGET)
    for _ in range(16):
        arena.grow(1)
    assert arena.size_bytes == SLAB
    arena.grow(SLAB + 1)
    assert arena.size_bytes == BUDGET  # rounded up to a power of two, which is what pinning it costs


def test_empty_slabs_make_way_for_a_piece_that_none_of_them_holds() -> None:
    arena = Arena(bytes_max=BUDGET)
    small = [arena.grow(SLAB) for _ in range(3)]
    for piece in small:
        arena.free(piece)
    assert arena.size_bytes == BUDGET
    assert arena.take(2 * SLAB) is not None
    assert arena.size_bytes == BUDGET


def test_a_slab_beyond_the_budget_goes_with_its_last_piece() -> None:
    arena = Arena(bytes_max=0)
    assert arena.take(1) is None
    piece = arena.grow(10)
    assert arena.size_bytes == ALIGNMENT
    arena.free(piece)
    assert arena.size_bytes == 0


def test_a_freed_piece_is_used_again_only_after_the_device_is_done_with_it() -> None:
    done = threading.Event()
    arena = Arena(bytes_max=SLAB, fence=lambda: lambda: done.wait(30))
    old = arena.grow(SLAB)
    arena.free(old)  # does not wait
    with ThreadPoolExecutor(1) as threads:
        taken = threads.submit(arena.take, SLAB)
        assert not taken.done()
        done.set()
        piece = taken.result(30)
    assert piece is not None
    assert span(piece) == span(old)


def test_the_fuller_slab_is_filled_so_that_an_emptier_one_may_become_empty() -> None:
    arena = Arena(bytes_max=BUDGET)
    first, second = arena.grow(SLAB), arena.grow(SLAB - ALIGNMENT)
    arena.free(first)
    assert arena.grow(1).slab is second.slab
