"""What the workers of one training share out, and what one of them says to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage.keys import Keys
from storage.loop_thread import LoopThread
from storage.testing import InMemoryStore
from train_jobs import captioner
from train_jobs.captioner import caption_all
from train_jobs.data import read_folder
from train_jobs.errors import ImageUnreadable
from train_jobs.kept import Kept
from train_jobs.peers import Peers
from train_jobs.sharing import PeerFailed, share_out, together
from train_jobs.spec import CaptioningSpec, DatasetSpec
from train_jobs.testing import ThreadPeers


def _in_each(work: Callable[[Peers], Any], count: int = 3) -> list[Any]:
    """What `work` returns or raises on each of the workers."""

    def run(peers: Peers) -> Any:
        try:
            return work(peers)
        except Exception as error:  # noqa: BLE001 - handed back to be looked at
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, ThreadPeers.together(count)))


def _squares(
    peers: Peers, made: list[int], *, found: Sequence[int] = (), fails_at: int | None = None,
    error: Exception | None = None,
    stops: bool = False,
) -> Any:  # fmt: skip
    def make(batch: Sequence[int]) -> dict[int, int]:
        if fails_at in batch and error is not None:
            raise error
        made.extend(batch)
        return {n: n * n for n in batch}

    return share_out(
        peers,
        range(8),
        fetch=lambda own: {n: n * n for n in own if n in found},
        batches=lambda missing: [missing[i : i + 2] for i in range(0, len(missing), 2)],
        make=make,
        on_done=lambda _: None,
        should_stop=lambda: stops and peers.rank == 1,
    )


def test_every_piece_is_made_once_and_known_to_all() -> None:
    made: list[int] = []
    assert _in_each(lambda peers: _squares(peers, made)) == [{n: n * n for n in range(8)}] * 3
    assert sorted(made) == list(range(8))


def test_what_one_worker_finds_is_made_by_none() -> None:
    made: list[int] = []
    assert _in_each(lambda peers: _squares(peers, made, found=(0, 3, 4))) == [{n: n * n for n in range(8)}] * 3
    assert sorted(made) == [1, 2, 5, 6, 7]


def test_one_worker_that_is_to_stop_stops_all() -> None:
    assert _in_each(lambda peers: _squares(peers, [], stops=True)) == [None] * 3


def test_an_error_that_a_user_can_mend_is_the_same_on_all_workers() -> None:
    raised = _in_each(lambda peers: _squares(peers, [], fails_at=4, error=ImageUnreadable(["a.png"])))
    assert [(type(error), error.names) for error in raised] == [(ImageUnreadable, ("a.png",))] * 3


def test_another_error_of_one_worker_ends_the_others_too() -> None:
    raised = _in_each(lambda peers: _squares(peers, [], fails_at=4, error=ZeroDivisionError()))
    assert [type(error) for error in raised] == [PeerFailed, ZeroDivisionError, PeerFailed]
    alone = _in_each(lambda peers: together(peers, lambda: 1 // peers.rank))
    assert [type(error) for error in alone] == [ZeroDivisionError, PeerFailed, PeerFailed]
    assert _in_each(lambda peers: together(peers, lambda: peers.rank)) == [0, 1, 2]


def test_a_picture_is_captioned_by_one_worker(
    write_pictures: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Model:
        def __init__(self, *_: Any) -> None:
            pass

        def caption(self, path: Path) -> str:
            asked.append(path.name)
            return f"a picture named {path.stem}"

    monkeypatch.setattr(captioner, "Captioner", Model)
    dataset = DatasetSpec(dataset="cats")
    pictures = ((dataset, read_folder(write_pictures((16, 16), (16, 24), (24, 16), captions=False), dataset)),)
    runner, store = LoopThread("test"), InMemoryStore()

    def work(peers: Peers) -> list[str]:
        captioned = caption_all(
            CaptioningSpec(model="m"), pictures, kept=Kept(store, runner, Keys("raylora", "default"), None),
            models={"m": str(tmp_path)}, device=Any, paths_allowed=False, on_progress=lambda *_: None,  # type: ignore[arg-type]
            should_stop=None, peers=peers,
        )  # fmt: skip
        assert captioned is not None
        return [picture.text for picture in captioned[0][1]]

    expected = ["a picture named p0", "a picture named p1", "a picture named p2"]
    assert _in_each(work, 2) == [expected] * 2
    assert sorted(asked) == ["p0.png", "p1.png", "p2.png"]
    assert _in_each(work, 2) == [expected] * 2
    assert len(asked) == 3
    runner.stop()
