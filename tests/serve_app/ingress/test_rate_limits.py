"""How often and how many at once: by key, in one place for all replicas, and alone where that place is away."""

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.dispatch.rates import Claim, Grant, Rate, RateLedger
from serve_app.errors import ServiceUnavailable, TooManyAtOnce, TooManyRequests
from serve_app.ingress.rate_limits import BLOCK_MAX, RateGate, operation_of
from serve_app.settings import OperationLimit, RateLimitSettings
from serve_app.testing import OTHER_KEY, LocalServer, local_server
from storage.jobs_testing import JobsWorld


@pytest.fixture
def unix_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The one clock that `limits` reads; each reading is a little later, as on a real machine."""
    now = [1_800_000_000.0]
    ticks = itertools.count()
    monkeypatch.setattr("time.time", lambda: now[0] + next(ticks) * 1e-7)
    return now


class Ledger:
    """`Permits` in this process."""

    def __init__(self) -> None:
        self.ledger = RateLedger()
        self.calls = 0
        self.wanted: list[int] = []
        self.away = False

    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
        self.calls += 1
        if self.away:
            raise ServiceUnavailable("dispatch")
        self.wanted.append(claim.wanted)
        return self.ledger.take(key, operation, rate, claim)


def limited(**limits: OperationLimit) -> RateLimitSettings:
    return RateLimitSettings(**limits)


def test_the_limits_are_the_ones_that_runpod_publishes() -> None:
    limits = RateLimitSettings()
    published = {name: (limits.of(name).amount, limits.of(name).concurrent) for name in ("runsync", "status", "stream")}
    assert published == dict.fromkeys(published, (2000, 400))
    assert (limits.run, limits.cancel) == (
        OperationLimit(amount=1000, concurrent=200),
        OperationLimit(amount=100, concurrent=20),
    )
    assert limits.purge.amount == 2
    assert limits.window_s == 10


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/v2/ep/run", "run"),
        ("/v2/ep/status-sync/x", "status"),
        ("/v2/ep/stream/x", "stream"),
        ("/v2/ep/purge-queue", "purge"),
        ("/v2/run", "other"),
        ("/v1/run", "other"),
        ("/", "other"),
    ],
)
def test_a_path_is_counted_under_its_operation(path: str, operation: str) -> None:
    assert operation_of(path) == operation


def test_a_window_holds_its_amount_and_opens_again(unix_time: list[float]) -> None:
    ledger, rate = RateLedger(), Rate(5, 10)

    def take(wanted: int, number: int, key: str = "k", operation: str = "run") -> Grant:
        return ledger.take(key, operation, rate, Claim("a", number, wanted, number - 1, 100))

    assert take(3, 1) == Grant(3)
    unix_time[0] += 4
    assert take(3, 2) == Grant(2)
    refused = take(1, 3)
    assert refused.permits == 0
    assert refused.retry_after_s == pytest.approx(6, abs=0.1)
    assert take(1, 1, key="other").permits == 1
    assert take(1, 1, operation="cancel").permits == 1
    unix_time[0] += refused.retry_after_s + 0.1
    assert take(9, 4) == Grant(1)


def test_permits_that_were_not_used_go_back(unix_time: list[float]) -> None:
    ledger, rate = RateLedger(), Rate(10, 10)
    assert ledger.take("k", "run", rate, Claim("a", 1, 8)) == Grant(8)
    assert ledger.take("k", "run", rate, Claim("b", 1, 8)) == Grant(2)
    assert ledger.take("k", "run", rate, Claim("a", 2, 8, accounted=1, used=3)) == Grant(4)


def test_what_a_lost_replica_holds_counts_until_it_can_matter_no_more(unix_time: list[float]) -> None:
    ledger, rate = RateLedger(), Rate(10, 10)
    ledger.take("k", "run", rate, Claim("lost", 1, 8))
    unix_time[0] += 19.9
    assert ledger.take("k", "run", rate, Claim("b", 1, 10)) == Grant(3)
    unix_time[0] += 0.2
    assert ledger.take("k", "run", rate, Claim("c", 1, 10)) == Grant(7)


def test_permits_whose_grant_was_lost_on_its_way_go_back_and_a_late_claim_gets_none(unix_time: list[float]) -> None:
    ledger, rate = RateLedger(), Rate(10, 10)
    ledger.take("k", "run", rate, Claim("a", 1, 4))
    ledger.take("k", "run", rate, Claim("a", 2, 4, accounted=1, used=3))
    # Told of the first again, for the answer to the second never came; its own permit is gone.
    assert ledger.take("k", "run", rate, Claim("a", 4, 10, accounted=1, used=3)) == Grant(5)
    assert ledger.take("k", "run", rate, Claim("a", 3, 4, accounted=1, used=3)) == Grant(0)
    assert ledger.take("k", "run", rate, Claim("a", 5, 10, accounted=4, used=0)) == Grant(4)


async def test_two_replicas_share_one_limit_and_seldom_ask(unix_time: list[float]) -> None:
    shared = Ledger()
    limits = limited(status=OperationLimit(amount=400))
    replicas = [RateGate(shared, limits, replicas=2, clock_s=lambda: 0.0) for _ in range(2)]
    admitted = 0
    for gate in itertools.islice(itertools.cycle(replicas), 500):
        try:
            await gate.enter("k", "status")
        except TooManyRequests:
            continue
        admitted += 1
    assert admitted == 400
    assert shared.calls < 200


async def test_of_a_limit_that_is_none_no_more_is_counted_than_may_be_used() -> None:
    """The count has an entry for each permit."""
    shared = Ledger()
    gate = RateGate(shared, limited(status=OperationLimit(amount=10_000_000)), replicas=1)
    await gate.enter("k", "status")
    assert shared.wanted == [BLOCK_MAX]


async def test_permits_that_were_not_used_within_a_window_are_given_up() -> None:
    shared, now = Ledger(), [0.0]
    gate = RateGate(shared, limited(status=OperationLimit(amount=400)), replicas=1, clock_s=lambda: now[0])
    await gate.enter("k", "status")
    now[0] += 9.9
    await gate.enter("k", "status")
    assert shared.calls == 1
    now[0] += 0.1
    await gate.enter("k", "status")
    assert shared.calls == 2


TICK_S = 1 / 64
READING_S = 2**-22
"""By which each reading of the clock is later than the one before, as on a real machine. Sums of both are exact."""


def calls_of(most_replicas: int) -> st.SearchStrategy[tuple[int, list[tuple[float, int, int]]]]:
    """A number of replicas, and bursts: after so many seconds, at this replica, so many calls."""
    pauses = st.sampled_from([0.0, TICK_S, 0.125, 0.5, 1.0, 2.5, 10.0 - TICK_S, 10.0, 10.0 + TICK_S])
    return st.integers(1, most_replicas).flatmap(
        lambda replicas: st.tuples(
            st.just(replicas),
            st.lists(st.tuples(pauses, st.integers(0, replicas - 1), st.integers(1, 150)), max_size=60),
        )
    )


class Demand:
    """Calls at replicas that share one limit; each is noted with its time if it was let through."""

    def __init__(self, replicas: int, limit: int) -> None:
        self.now, self.let_through = 1_800_000_000.0, deque[float]()
        shared, limits = Ledger(), limited(status=OperationLimit(amount=limit))
        self.gates = [RateGate(shared, limits, replicas=replicas, clock_s=self.clock) for _ in range(replicas)]

    def clock(self) -> float:
        self.now += READING_S
        return self.now

    def at(self, bursts: list[tuple[float, int, int]]) -> Iterator[int]:
        """The replica of each call, when its time has come."""
        for pause_s, replica, count in bursts:
            self.now += pause_s
            yield from itertools.repeat(replica, count)

    def within(self, seconds: float) -> int:
        """Calls let through since so many seconds ago. It forgets the others."""
        while self.let_through and self.let_through[0] <= self.now - seconds:
            self.let_through.popleft()
        return len(self.let_through)

    async def call(self, replica: int) -> bool:
        try:
            await self.gates[replica].enter("k", "status")
        except TooManyRequests:
            return False
        self.gates[replica].leave("k", "status")
        self.let_through.append(self.now)
        return True


@pytest.mark.parametrize("limit", [1, 2, 100, 400, 1000])
@given(calls=calls_of(8))
def test_whatever_is_asked_of_any_replica_no_window_lets_more_through_than_its_limit(
    limit: int, calls: tuple[int, list[tuple[float, int, int]]]
) -> None:
    replicas, bursts = calls
    demand = Demand(replicas, limit)

    async def play() -> None:
        for replica in demand.at(bursts):
            await demand.call(replica)
            # Less than the window by the time that a call may take from its permit to being noted.
            assert demand.within(10.0 - TICK_S / 2) <= limit

    with patch("time.time", demand.clock):
        asyncio.run(play())


@pytest.mark.parametrize("limit", [1, 2, 100, 400, 1000])
@given(calls=calls_of(8))
def test_who_stays_a_twentieth_below_the_limit_is_never_refused_whichever_replicas_are_asked(
    limit: int, calls: tuple[int, list[tuple[float, int, int]]]
) -> None:
    replicas, bursts = calls
    demand = Demand(replicas, limit)

    async def play() -> None:
        for replica in demand.at(bursts):
            if demand.within(10.0 + TICK_S) < limit * 19 / 20:
                assert await demand.call(replica)

    with patch("time.time", demand.clock):
        asyncio.run(play())


@pytest.mark.parametrize("replicas", [1, 4, 5, 8])
async def test_a_call_a_second_at_each_of_many_replicas_is_far_from_a_limit_of_100_a_second(replicas: int) -> None:
    demand = Demand(replicas, 1000)
    with patch("time.time", demand.clock):
        for _ in range(30):
            assert all([await demand.call(replica) for replica in range(replicas)])
            demand.now += 1.01


async def test_a_replica_counts_alone_while_the_shared_place_is_away(unix_time: list[float]) -> None:
    shared = Ledger()
    shared.away = True
    gate = RateGate(shared, limited(purge=OperationLimit(amount=2)), replicas=1)
    for _ in range(2):
        await gate.enter("k", "purge")
    with pytest.raises(TooManyRequests):
        await gate.enter("k", "purge")


async def test_a_replica_admits_its_share_of_what_may_run_at_once() -> None:
    gate = RateGate(Ledger(), limited(run=OperationLimit(amount=100, concurrent=4)), replicas=2)
    for _ in range(2):
        await gate.enter("k", "run")
    with pytest.raises(TooManyAtOnce):
        await gate.enter("k", "run")
    await gate.enter("other", "run")
    gate.leave("k", "run")
    await gate.enter("k", "run")


async def purge(http: httpx.AsyncClient) -> httpx.Response:
    return await http.post("/v2/ep/purge-queue")


async def test_a_key_over_its_rate_is_429_with_retry_after_and_others_are_not(server: LocalServer) -> None:
    async with server.client() as http, server.client(OTHER_KEY) as other:
        assert [(await purge(http)).status_code for _ in range(3)] == [200, 200, 429]
        refused = await purge(http)
        assert (await purge(other)).status_code == 200
        assert (await http.get("/v2/ep/health")).status_code == 200
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert refused.json()["error_type"] == "rate_limited"
    assert "status" not in refused.json()


async def test_a_request_that_was_refused_leaves_its_place(server: LocalServer) -> None:
    async with server.client() as http:
        for _ in range(25):
            assert (await http.post("/v2/ep/cancel/unknown")).status_code == 404


async def test_long_polls_over_the_limit_are_429_until_one_ends(world: JobsWorld) -> None:
    limits = limited(status=OperationLimit(amount=100, concurrent=1))
    server = local_server(world.jobs, world.clock, rate_limits=limits)
    gate: asyncio.Event = asyncio.Event()
    wait_reply = server.dispatch.wait_reply

    async def held(tenant: str, runpod_id: str, timeout_s: float) -> Any:
        await gate.wait()
        return await wait_reply(tenant, runpod_id, timeout_s)

    server.dispatch.wait_reply = held  # type: ignore[method-assign]
    async with server.client() as http:
        first = asyncio.create_task(http.get("/v2/ep/status/a"))
        await asyncio.sleep(0)
        second = await http.get("/v2/ep/status/b")
        assert second.status_code == 429
        gate.set()
        assert (await first).status_code == 404
        assert (await http.get("/v2/ep/status/c")).status_code == 404
    assert second.json()["error_type"] == "concurrency_limited"
    assert second.headers["retry-after"] == "1"
