"""Which replica a generation goes to."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.dispatch.routing import ADAPTERS_REMEMBERED, Needs, WarmFirstRouter, Warmth, needs_of
from serve_app.inference.plan import GenerationRequest, GenerationWork, ResolvedLora
from train_jobs.generate_spec import GenerateSpec


def needs(model: str = "tiny", *adapters: str) -> Needs:
    return Needs(model, frozenset(adapters))


@pytest.fixture
def warmth() -> Warmth:
    return Warmth(default_model="tiny", models_kept=2, model_cost=8)


def test_of_idle_replicas_the_one_that_has_the_adapters_is_first(warmth: Warmth) -> None:
    warmth.sent("b", needs("tiny", "x", "y"))
    warmth.sent("c", needs("tiny", "x"))
    assert warmth.ranked({"a": 0, "b": 0, "c": 0}, needs("tiny", "x", "y")) == [["b"], ["c"], ["a"]]


def test_of_idle_replicas_the_one_that_has_the_model_is_first(warmth: Warmth) -> None:
    warmth.sent("b", needs("large"))
    assert warmth.ranked({"a": 0, "b": 0}, needs("large")) == [["b"], ["a"]]
    assert warmth.ranked({"a": 0, "b": 0}, needs("tiny")) == [["a", "b"]]


def test_a_busy_replica_is_passed_over_however_warm_it_is(warmth: Warmth) -> None:
    warmth.sent("b", needs("large", "x"))
    assert warmth.ranked({"a": 0, "b": 8}, needs("large", "x"))[0] == ["b"]
    assert warmth.ranked({"a": 0, "b": 10}, needs("large", "x"))[0] == ["a"]
    assert warmth.ranked({"a": 0, "b": 2}, needs("tiny", "x"))[0] == ["a"]


def test_every_replica_is_among_the_ranks(warmth: Warmth) -> None:
    warmth.sent("b", needs("large", "x"))
    ranks = warmth.ranked({"a": 3, "b": 0, "c": 100}, needs("large", "x"))
    assert sorted(replica for rank in ranks for replica in rank) == ["a", "b", "c"]


def test_a_model_that_others_have_pushed_out_is_missing(warmth: Warmth) -> None:
    for model in ("large", "larger"):
        warmth.sent("a", needs(model))
    assert warmth.cost("a", needs("tiny")) == 8
    assert warmth.cost("a", needs("large")) == 0


def test_what_is_remembered_of_a_replica_is_bounded_and_ends_with_it(warmth: Warmth) -> None:
    for i in range(ADAPTERS_REMEMBERED + 1):
        warmth.sent("a", needs("tiny", f"x{i}"))
    assert warmth.cost("a", needs("tiny", "x0")) == 1
    assert warmth.cost("a", needs("tiny", "x1")) == 0
    warmth.forget_all_but({"b"})
    assert warmth.cost("a", needs("tiny", "x1")) == 1


def work(*keys: str) -> GenerationWork:
    loras = tuple(ResolvedLora(id=None, key=key, sha256=None, scale=1.0) for key in keys)
    request = GenerationRequest(spec=GenerateSpec(prompts=("a",), model="tiny", seed=1), loras=loras)
    return GenerationWork("gen_1", "matt", request.as_json())


def test_the_needs_are_read_from_the_stored_request() -> None:
    assert needs_of(work("k/1", "k/2")) == needs("tiny", "k/1", "k/2")


class Routed:
    """Serve's router with its collaborators left out, which only its own base class uses."""

    def __init__(self) -> None:
        self.router = WarmFirstRouter.__new__(WarmFirstRouter)
        self.router._replica_queue_len_cache = {}
        self.router.initialize_state(default_model="tiny", models_kept=2, model_cost=8)
        self.replicas: list[Any] = [SimpleNamespace(replica_id=name) for name in "ab"]

    def pending(self, arg: Any, request_id: str = "r") -> Any:
        return SimpleNamespace(
            args=[arg],
            metadata=SimpleNamespace(internal_request_id=request_id),
            routing_context=SimpleNamespace(should_backoff=False),
        )

    def ranks(self, pending: Any) -> list[list[str]]:
        chosen = asyncio.run(self.router.choose_replicas(self.replicas, pending))
        return [[replica.replica_id for replica in rank] for rank in chosen]


def test_a_generation_follows_the_one_before_it_with_the_same_adapter_until_that_replica_is_busier() -> None:
    routed = Routed()
    routed.router.on_request_routed(routed.pending(work("k"), "1"), "b", None)
    routed.router.on_request_completed("b", "1")
    assert routed.ranks(routed.pending(work("k"))) == [["b"], ["a"]]
    for request_id in "23":
        routed.router.on_request_routed(routed.pending(work("k"), request_id), "b", None)
    assert routed.ranks(routed.pending(work("k"))) == [["a"], ["b"]]


def test_serves_own_count_of_what_a_replica_has_counts_too() -> None:
    routed = Routed()
    routed.router._replica_queue_len_cache = {"a": 3}
    assert routed.ranks(routed.pending(work())) == [["b"], ["a"]]


def test_calls_that_are_no_generations_may_go_anywhere_and_wait_between_two_tries() -> None:
    routed = Routed()
    pending = routed.pending("health")
    assert routed.ranks(pending) == [["a", "b"]]
    assert pending.routing_context.should_backoff
    routed.router.on_request_routed(pending, "a", None)
    assert routed.ranks(routed.pending(work())) == [["a", "b"]]
