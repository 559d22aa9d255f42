"""What moves bytes has places of its own, and one tenant never has them all."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from pydantic import SecretStr

from serve_app.app import build
from serve_app.collaborators import TrainingPlan
from serve_app.errors import InvalidRequest, TooManyUploads
from serve_app.handles import HandleValidation
from serve_app.settings import Settings
from serve_app.testing import LocalServer, local_server, upload_payload
from serve_app.transfers import TenantPlaces, places_of_replica, places_of_tenant
from storage.jobs_testing import JobsWorld
from train_jobs.errors import Problem

PLACES = 8
UPLOAD = {"training_name": "cats"}
PICTURE = {"prompt": "a cat", "init_image": "https://example.com/slow.png"}


class Response(asyncio.Future[Any]):
    """A call that its replica has not answered yet."""


class Deployment:
    """Calls of each tenant that have reached a replica, of which at most `PLACES` are there at once."""

    def __init__(self) -> None:
        self.open: dict[str, list[Response]] = {}
        self.places = asyncio.Semaphore(PLACES)

    def __getattr__(self, method: str) -> "Method":
        return Method(self, method)

    @property
    def counts(self) -> Counter[str]:
        return Counter({tenant: len(calls) for tenant, calls in self.open.items() if calls})


class Method:
    def __init__(self, deployment: Deployment, name: str) -> None:
        self._deployment, self._name = deployment, name

    def remote(self, tenant: Any, *_: Any) -> Any:
        if self._name == "training":
            result: Response = Response()
            result.set_result(TrainingPlan({}, (), ()))
            return result
        return asyncio.ensure_future(self._call(tenant))

    async def _call(self, tenant: str) -> Any:
        async with self._deployment.places:
            response = Response()
            calls = self._deployment.open.setdefault(tenant, [])
            calls.append(response)
            try:
                return await response
            finally:
                calls.remove(response)


def validation_of(checks: Any, transfers: Any, *, wait_s: float = 60.0) -> HandleValidation:
    return HandleValidation(checks, transfers, TenantPlaces(PLACES // 2, wait_s=wait_s))


async def settled() -> None:
    """Until everything that could go on has."""
    for _ in range(20):
        await asyncio.sleep(0)


async def ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_tenants_slow_uploads_hold_up_neither_checks_nor_other_tenants() -> None:
    checks, transfers = Deployment(), Deployment()
    validation = validation_of(checks, transfers)
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(validation.store_upload("matt", UPLOAD)) for _ in range(20)]
    await settled()
    assert (checks.counts, transfers.counts) == (Counter(), Counter(matt=PLACES // 2))
    tasks.append(asyncio.ensure_future(validation.store_upload("anna", UPLOAD)))
    await settled()
    assert transfers.counts["anna"] == 1
    assert isinstance(await validation.training({}), TrainingPlan)
    tasks.append(asyncio.ensure_future(validation.generation("matt", "gen_2", {"prompt": "a cat"})))
    await settled()
    assert checks.counts == Counter(matt=1)
    await ended(tasks)


@pytest.mark.parametrize(
    "call",
    [
        lambda validation: validation.store_upload("matt", UPLOAD),
        lambda validation: validation.finalize_upload("matt", {}),
        lambda validation: validation.finish_lora_import("matt", "lora_1"),
        lambda validation: validation.bundle("matt", []),
        lambda validation: validation.generation("matt", "gen_1", PICTURE),
    ],
    ids=["upload", "finalize", "lora", "bundle", "picture"],
)
async def test_whatever_moves_bytes_is_a_transfer(call: Callable[[HandleValidation], Coroutine[Any, Any, Any]]) -> None:
    checks, transfers = Deployment(), Deployment()
    task = asyncio.ensure_future(call(validation_of(checks, transfers)))
    await settled()
    assert (checks.counts, transfers.counts) == (Counter(), Counter(matt=1))
    await ended([task])


async def test_what_waits_goes_in_order_as_places_become_free() -> None:
    transfers = Deployment()
    validation = validation_of(Deployment(), transfers)
    tasks = [asyncio.ensure_future(validation.store_upload("matt", UPLOAD)) for _ in range(6)]
    await settled()
    transfers.open["matt"][0].set_result({"number": 0})
    transfers.open["matt"][1].set_exception(InvalidRequest([Problem("files", "are missing", "missing")]))
    tasks[2].cancel()
    await settled()
    assert [task.done() for task in tasks] == [True, True, True, False, False, False]
    assert (tasks[0].result(), transfers.counts) == ({"number": 0}, Counter(matt=3))
    await ended(tasks)


async def test_what_finds_no_place_in_time_is_refused_and_takes_none() -> None:
    transfers = Deployment()
    validation = validation_of(Deployment(), transfers, wait_s=0)
    tasks = [asyncio.ensure_future(validation.store_upload("matt", UPLOAD)) for _ in range(PLACES // 2)]
    await settled()
    with pytest.raises(TooManyUploads):
        await validation.store_upload("matt", UPLOAD)
    assert transfers.counts == Counter(matt=PLACES // 2)
    transfers.open["matt"][0].set_result({})
    await settled()
    tasks.append(asyncio.ensure_future(validation.store_upload("matt", UPLOAD)))
    await settled()
    assert transfers.counts == Counter(matt=PLACES // 2)
    await ended(tasks)


async def test_a_refused_upload_says_when_to_come_again(world: JobsWorld) -> None:
    full = TenantPlaces(1, wait_s=0)
    server: LocalServer = local_server(
        world.jobs, world.clock, validation=HandleValidation(Deployment(), Deployment(), full)
    )
    body = upload_payload("cats")
    files = [{name: file[name] for name in ("filename", "content")} for file in body["files"]]
    async with full.taken("matt"), server.client() as http:
        reply = await http.post("/v1/datasets", json={"name": "cats", "files": files})
        assert (reply.status_code, reply.json()["code"]) == (429, "too_many_uploads"), reply.text
        assert int(reply.headers["retry-after"]) > 0
        job = (await http.post("/v2/ep/runsync", json={"input": body})).json()
    assert (job["status"], job["output"]["error_type"]) == ("FAILED", "too_many_uploads")
    assert job["output"]["retry_after_s"] > 0


@pytest.mark.parametrize(("ingress", "validation"), [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1), (1, 3), (8, 3), (5, 2)])
def test_a_tenant_has_at_most_half_of_the_places_however_many_replicas_there_are(ingress: int, validation: int) -> None:
    settings = Settings(ingress_replicas=ingress, validation_replicas=validation)
    places = places_of_replica(settings) * validation
    assert places_of_tenant(settings) >= 1
    assert places_of_tenant(settings) * ingress <= math.floor(places / 2)


def test_the_graph_has_a_deployment_for_transfers_beside_the_one_for_checks() -> None:
    settings = Settings(api_key=SecretStr("k"), s3_access_key_id=SecretStr("i"), s3_secret_access_key=SecretStr("s"))
    bound = build(settings)._bound_deployment.init_args
    checks, transfers = bound[1]._bound_deployment, bound[2]._bound_deployment
    assert (checks.name, transfers.name) == ("Validation", "Transfers")
    assert transfers.max_ongoing_requests == places_of_replica(settings)
