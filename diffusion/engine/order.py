"""Which batch is next, and who joins it."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field

from diffusion.engine.sample import Sample
from diffusion.engine.ticket import Ticket

Shape = tuple[int, ...]


@dataclass(eq=False)
class Group:
    """Pictures of one latent shape. ``active`` keeps places: who leaves is replaced by the last, the others stay."""

    shape: Shape
    active: list[Sample] = field(default_factory=list)
    tickets: deque[Ticket] = field(default_factory=deque)
    spent: float = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.active or self.tickets)

    def next_waiting(self) -> tuple[Ticket, Sample] | None:
        """One picture of each waiting ticket in turn, so that a large request does not shut out a small one."""
        while self.tickets:
            ticket = self.tickets.popleft()
            sample = next((s for s in ticket.waiting if s.shape == self.shape), None)
            if sample is None or ticket.finished:
                continue
            ticket.waiting.remove(sample)
            self.tickets.append(ticket)
            return ticket, sample
        return None

    def leave(self, samples: set[Sample]) -> None:
        for place in reversed(range(len(self.active))):
            if self.active[place] in samples:
                last = self.active.pop()
                if place < len(self.active):
                    self.active[place] = last


class FairOrder:
    """Gives each shape the same share of the work, measured in latent elements: small pictures take more turns.

    Start-time fair queueing (Goyal et al. 1996): the group that has been given least goes next; one that was away
    comes back level with the others, without credit for its absence.
    """

    def __init__(self) -> None:
        self._groups: dict[Shape, Group] = {}
        self._clock = 0.0

    def add(self, ticket: Ticket) -> None:
        for shape in dict.fromkeys(sample.shape for sample in ticket.samples):
            group = self._groups.setdefault(shape, Group(shape))
            if not group.busy:
                group.spent = max(group.spent, self._clock)
            group.tickets.append(ticket)

    def next(self) -> Group | None:
        for shape in [shape for shape, group in self._groups.items() if not group.busy]:
            del self._groups[shape]
        if not self._groups:
            return None
        group = min(self._groups.values(), key=lambda group: group.spent)
        self._clock = group.spent
        return group

    def charge(self, group: Group, rows: int) -> None:
        group.spent += rows * math.prod(group.shape)

    def remove(self, ticket: Ticket) -> None:
        """Its pictures leave, wherever they are."""
        own = set(ticket.samples)
        for group in self._groups.values():
            group.leave(own)
            if ticket in group.tickets:
                group.tickets.remove(ticket)


class Turns:
    """A lock whose waiters are served in the order in which they came. For several engines on one device."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._serving = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._serving == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._serving += 1
            self._changed.notify_all()
