"""The routes of `/v2/{endpoint_id}`: RunPod's serverless API. Existing clients change only their base URL."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.errors import BodyInvalid
from serve_app.ingress.auth import Principal
from serve_app.ingress.envelope import read_idempotency_key
from serve_app.ingress.middleware import request_id_of
from serve_app.ingress.replies import PlainJson
from serve_app.ingress.runpod_jobs import RunpodJobs, Submission
from serve_app.settings import RequestLimits

ENDPOINT = "/v2/{endpoint_id}"


Endpoint = Callable[[Request], Awaitable[Response]]


def runpod_router(jobs: RunpodJobs, limits: RequestLimits) -> APIRouter:
    """The endpoint id is taken as it comes: one server is one endpoint, under any name.

    Replies are plain JSON already; FastAPI would check each against its annotation first.
    """
    router = APIRouter(prefix=ENDPOINT, tags=["runpod"])
    run, runsync, status = _often_called(jobs, limits)
    router.post("/run", name="run")(run)
    router.post("/runsync", name="runsync")(runsync)

    @router.get("/status/{job_id}", name="status")
    @router.post("/status/{job_id}", name="status")
    async def described_status(request: Request, job_id: str) -> Response:
        return await status(request)

    @router.get("/status-sync/{job_id}")
    @router.post("/status-sync/{job_id}")
    async def status_sync(request: Request, job_id: str) -> Response:
        held_s = wait_s(request, limits, default_s=limits.runsync_wait_default_s)
        return PlainJson(await jobs.status(tenant_of(request), request_id_of(request.scope), job_id, wait_s=held_s))

    @router.get("/stream/{job_id}")
    @router.post("/stream/{job_id}")
    async def stream(request: Request, job_id: str) -> Response:
        held_s = wait_s(request, limits, default_s=limits.stream_wait_default_s)
        return PlainJson(await jobs.stream(tenant_of(request), request_id_of(request.scope), job_id, wait_s=held_s))

    @router.post("/cancel/{job_id}")
    async def cancel(request: Request, job_id: str) -> Response:
        return PlainJson(await jobs.cancel(tenant_of(request), job_id))

    @router.post("/retry/{job_id}")
    async def retry(request: Request, job_id: str) -> Response:
        return PlainJson(await jobs.retry(tenant_of(request), job_id))

    @router.post("/purge-queue")
    async def purge_queue(request: Request) -> Response:
        return PlainJson(await jobs.purge_queue(tenant_of(request)))

    @router.get("/health")
    async def health(request: Request) -> Response:
        return PlainJson(await jobs.health(tenant_of(request)))

    return router


def short_ways(jobs: RunpodJobs, limits: RequestLimits) -> list[Route]:
    """The routes that clients call most, to stand in front of FastAPI's of the same paths, which then only describe
    them: solving the dependencies of a route that has none takes FastAPI as long as all the rest."""
    run, runsync, status = _often_called(jobs, limits)
    routes = [
        Route(f"{ENDPOINT}/status/{{job_id}}", status, methods=["GET", "POST"]),
        Route(f"{ENDPOINT}/runsync", runsync, methods=["POST"]),
        Route(f"{ENDPOINT}/run", run, methods=["POST"]),
    ]
    for route in routes:
        # Starlette adds it to GET; FastAPI does not.
        (route.methods or set()).discard("HEAD")
    return routes


def _often_called(jobs: RunpodJobs, limits: RequestLimits) -> tuple[Endpoint, Endpoint, Endpoint]:
    async def run(request: Request) -> Response:
        return PlainJson(await jobs.run(await _submission(request, None)))

    async def runsync(request: Request) -> Response:
        held_s = wait_s(request, limits, default_s=limits.runsync_wait_default_s)
        return PlainJson(await jobs.runsync(await _submission(request, held_s)))

    async def status(request: Request) -> Response:
        job_id = request.path_params["job_id"]
        return PlainJson(await jobs.status(tenant_of(request), request_id_of(request.scope), job_id))

    return run, runsync, status


def tenant_of(request: Request) -> str:
    """Set by Authentication, which every route but /livez is behind."""
    principal: Principal = request.scope["state"]["principal"]
    return principal.tenant


def wait_s(request: Request, limits: RequestLimits, *, default_s: float) -> float:
    """`?wait=` in ms, in seconds and within RunPod's range. Raises BodyInvalid where it is not a number."""
    text = request.query_params.get("wait")
    if text is None:
        return default_s
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise BodyInvalid("wait must be a number of milliseconds")
    return min(max(int(text) / 1000, limits.wait_min_s), limits.wait_max_s)


async def _submission(request: Request, held_s: float | None) -> Submission:
    return Submission(
        tenant=tenant_of(request),
        request_id=request_id_of(request.scope),
        body=await request.body(),
        idempotency_key=read_idempotency_key(request.headers.get("idempotency-key")),
        wait_s=held_s,
    )
