"""Work that the workers of one training share out before its first step: each piece is done once, and all know it.

Every worker calls these functions at the same places and with the same pieces. An error of one worker is an error of
all, so that none waits for another that has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from train_jobs.errors import TrainingError
from train_jobs.failures import as_training_error
from train_jobs.peers import Peers

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class PeerFailed(RuntimeError):
    """Another worker could not do its part; the reason is in that worker's own error."""


@dataclass(frozen=True)
class _Said(Generic[T]):
    """What one worker tells the others: a value, or that it failed, with an error that they would meet too."""

    value: T | None
    has_failed: bool = False
    error: TrainingError | None = None


def together(peers: Peers, work: Callable[[], T]) -> T:
    """This worker's result of `work`, once every worker has its own. Raises its own error, or another worker's."""
    [result] = _told(peers, work, keep_own=True)
    return result


def share_out(
    peers: Peers,
    pieces: Sequence[K],
    *,
    fetch: Callable[[Sequence[K]], Mapping[K, V]],
    batches: Callable[[Sequence[K]], Sequence[Sequence[K]]],
    make: Callable[[Sequence[K]], Mapping[K, V]],
    on_done: Callable[[int], None],
    should_stop: Callable[[], bool] | None,
) -> dict[K, V] | None:
    """All pieces, each looked up or made by one worker; None when any worker's `should_stop` said so.

    A worker looks up its part with `fetch`, makes what is missing in the `batches` it wants, and tells the others after
    each; `on_done` gets the number of pieces that all workers have by then. Raises as `together` does.
    """
    own = pieces[peers.rank :: peers.world_size]
    waiting: list[Sequence[K]] | None = None
    done: dict[K, V] = {}

    def turn() -> tuple[Mapping[K, V], bool, bool]:
        nonlocal waiting
        found: Mapping[K, V] = {}
        if waiting is None:
            found = fetch(own)
            waiting = list(batches([piece for piece in own if piece not in found]))
        elif waiting:
            found = make(waiting.pop(0))
        return found, bool(waiting), should_stop is not None and should_stop()

    while True:
        said = _told(peers, turn)
        for found, _, _ in said:
            done.update(found)
        on_done(len(done))
        if any(wants_stop for _, _, wants_stop in said):
            return None
        if not any(has_more for _, has_more, _ in said):
            return done


def _told(peers: Peers, work: Callable[[], T], *, keep_own: bool = False) -> list[T]:
    """Every worker's result, in the order of ranks; with `keep_own` only this worker's, which then does not travel."""
    own: T | None = None
    failed: Exception | None = None
    try:
        own = work()
    except Exception as error:  # noqa: BLE001 - raised below, when the others know
        failed = error
    known = None if failed is None else as_training_error(failed)
    said = peers.gather(_Said(None if keep_own else own, failed is not None, known))
    if failed is not None:
        raise failed
    for other in said:
        if other.has_failed:
            raise other.error or PeerFailed("another worker failed")
    return [own] if keep_own else [other.value for other in said]  # type: ignore[list-item,misc]
