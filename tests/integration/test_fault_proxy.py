"""The proxy that other tests and the benchmarks rely on, in front of a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from storage.embedded import EmbeddedS3
from storage.fault_proxy import Fault, FaultProxy


@pytest.fixture
async def proxy(embedded_s3: EmbeddedS3) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(str(embedded_s3.settings().endpoint_url), slow_s=0.01)
    await proxy.start()
    yield proxy
    await proxy.stop()


async def status_of(proxy: FaultProxy) -> int:
    """The server refuses a request without a signature with 400, so that is how its own answers are known."""
    async with aiohttp.ClientSession() as client, client.get(f"{proxy.url}/raylora/a?x=1") as answer:
        await answer.read()
        return answer.status


async def test_it_passes_requests_on_and_records_what_came_in(proxy: FaultProxy) -> None:
    assert await status_of(proxy) == 400

    [record] = proxy.recorded
    assert (record.method, record.path, record.query, record.status) == ("GET", "/raylora/a", ("x",), 400)
    assert (record.is_presigned, "aiohttp" in record.user_agent) == (False, True)


@pytest.mark.parametrize(
    ("fault", "status", "forwarded"),
    [(Fault.SLOW_DOWN, 503, 0), (Fault.FORBIDDEN, 403, 0), (Fault.SLOW, 400, 1), (Fault.GARBLE, 400, 1)],
)
async def test_scripted_faults_come_once_and_in_order(
    proxy: FaultProxy, fault: Fault, status: int, forwarded: int
) -> None:
    proxy.script("GET", fault)

    assert await status_of(proxy) == status
    assert proxy.forwarded["GET"] == forwarded
    assert await status_of(proxy) == 400
    assert [record.fault for record in proxy.recorded] == [fault, Fault.NONE]


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.LOSE_ANSWER, Fault.TRUNCATE])
async def test_a_cut_connection_is_an_error_for_the_client(proxy: FaultProxy, fault: Fault) -> None:
    proxy.always(fault)

    with pytest.raises(aiohttp.ClientError):
        await status_of(proxy)
    # aiohttp sends an idempotent request once more by itself.
    assert (proxy.forwarded["GET"] > 0) == (fault is not Fault.RESET)

    proxy.always(None)
    assert await status_of(proxy) == 400


async def test_a_share_of_the_requests_is_spoiled_by_chance_that_repeats(proxy: FaultProxy) -> None:
    proxy.randomly(Fault.SLOW_DOWN, 0.5)

    statuses = [await status_of(proxy) for _ in range(40)]

    assert 5 < statuses.count(503) < 35
    assert statuses.count(503) + statuses.count(400) == 40


async def test_stopped_it_refuses_and_started_again_it_is_where_it_was(proxy: FaultProxy) -> None:
    port = proxy.port
    await proxy.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await status_of(proxy)

    await proxy.start()

    assert proxy.port == port
    assert await status_of(proxy) == 400
