"""How often and how many at once: by key, in one place for all replicas, and alone where that place is away."""

import asyncio
import itertools
from typing import Any

import httpx
import pytest

from serve_app.dispatch.rates import Grant, Rate, RateLedger
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

    async def take_permits(self, key: str, operation: str, rate: Rate, wanted: int) -> Grant:
        self.calls += 1
        if self.away:
            raise ServiceUnavailable("dispatch")
        self.wanted.append(wanted)
        return self.ledger.take(key, operation, rate, wanted)


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
    assert ledger.take("k", "run", rate, 3) == Grant(3)
    unix_time[0] += 4
    assert ledger.take("k", "run", rate, 3) == Grant(2)
    refused = ledger.take("k", "run", rate, 1)
    assert refused.permits == 0
    assert refused.retry_after_s == pytest.approx(6, abs=0.1)
    assert ledger.take("other", "run", rate, 1).permits == 1
    assert ledger.take("k", "cancel", rate, 1).permits == 1
    unix_time[0] += refused.retry_after_s + 0.1
    assert ledger.take("k", "run", rate, 9) == Grant(3)


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


async def test_permits_that_were_not_used_in_time_are_given_up() -> None:
    shared, now = Ledger(), [0.0]
    gate = RateGate(shared, limited(status=OperationLimit(amount=400)), replicas=1, clock_s=lambda: now[0])
    await gate.enter("k", "status")
    await gate.enter("k", "status")
    assert shared.calls == 1
    now[0] += 1.0
    await gate.enter("k", "status")
    assert shared.calls == 2


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
