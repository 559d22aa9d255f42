"""Which replica a generation goes to: where it is first at work, counting what a replica would have to load for it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.inference.plan import GenerationWork

Replica = TypeVar("Replica", bound=Hashable)
ADAPTERS_REMEMBERED = 256


@dataclass(frozen=True)
class Needs:
    """What a generation needs loaded: a model's alias and the keys of adapters."""

    model: str
    adapters: frozenset[str]


def needs_of(work: GenerationWork) -> Needs:
    request = work.request
    adapters = frozenset(str(lora["key"]) for lora in request.get("loras", ()))
    return Needs(str(request["spec"]["model"]), adapters)


class Warmth:
    """What replicas have loaded, judged by what was sent to them; a wrong guess costs one load.

    A replica begins with `default_model` and keeps the `models_kept` models that it used last. A model that is missing
    counts as `model_cost` generations that are ahead in the queue, a missing adapter as one.
    """

    def __init__(self, *, default_model: str, models_kept: int, model_cost: int) -> None:
        self._default_model = default_model
        self._models_kept = models_kept
        self._model_cost = model_cost
        self._models: dict[Hashable, OrderedDict[str, None]] = {}
        self._adapters: dict[Hashable, OrderedDict[str, None]] = {}

    def sent(self, replica: Hashable, needs: Needs) -> None:
        _remember(self._models_of(replica), [needs.model], self._models_kept)
        _remember(self._adapters.setdefault(replica, OrderedDict()), needs.adapters, ADAPTERS_REMEMBERED)

    def forget_all_but(self, replicas: Collection[Hashable]) -> None:
        for known in (self._models, self._adapters):
            for replica in [replica for replica in known if replica not in replicas]:
                del known[replica]

    def cost(self, replica: Hashable, needs: Needs) -> int:
        missing = len(needs.adapters.difference(self._adapters.get(replica, ())))
        return missing if needs.model in self._models_of(replica) else missing + self._model_cost

    def ranked(self, loads: dict[Replica, int], needs: Needs) -> list[list[Replica]]:
        """`loads`: the generations each replica has. Those that are equally good come in one list, the best first."""
        ranks: dict[int, list[Replica]] = {}
        for replica, load in loads.items():
            ranks.setdefault(load + self.cost(replica, needs), []).append(replica)
        return [ranks[cost] for cost in sorted(ranks)]

    def _models_of(self, replica: Hashable) -> OrderedDict[str, None]:
        return self._models.setdefault(replica, OrderedDict({self._default_model: None}))


def _remember(known: OrderedDict[str, None], names: Collection[str], kept: int) -> None:
    for name in names:
        known[name] = None
        known.move_to_end(name)
    while len(known) > kept:
        known.popitem(last=False)


class WarmFirstRouter(RequestRouter):  # type: ignore[misc]
    """Serve's router of calls to the inference replicas. One dispatcher sends all generations, so what it remembers
    here is all there is to know; calls that are no generations go where the least is under way."""

    def initialize_state(self, *, default_model: str, models_kept: int, model_cost: int) -> None:
        self._warmth = Warmth(default_model=default_model, models_kept=models_kept, model_cost=model_cost)
        self._under_way: dict[str, ReplicaID] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        self._warmth.forget_all_but(replicas)
        if pending_request is None or (work := _work_in(pending_request.args)) is None:
            ranks = [list(replicas)]
        else:
            ranks = self._warmth.ranked(self._loads(list(replicas)), needs_of(work))
        if pending_request is not None:
            # Every replica is among the ranks: where all are full, trying again at once would find the same.
            pending_request.routing_context.should_backoff = True
        return [[replicas[replica] for replica in rank] for rank in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if (work := _work_in(pending_request.args)) is not None:
            self._under_way[pending_request.metadata.internal_request_id] = replica_id
            self._warmth.sent(replica_id, needs_of(work))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._under_way.pop(internal_request_id, None)

    def _loads(self, replicas: Sequence[ReplicaID]) -> dict[ReplicaID, int]:
        """Serve's own count is the newer one, where it has one: it sees calls that have not been answered yet."""
        own = Counter(self._under_way.values())
        return {replica: max(own[replica], self.replica_queue_len_cache.get(replica) or 0) for replica in replicas}


def _work_in(args: Sequence[Any]) -> GenerationWork | None:
    return next((arg for arg in args if isinstance(arg, GenerationWork)), None)
