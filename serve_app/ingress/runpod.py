"""The routes of `/v2/{endpoint_id}`: RunPod's serverless API. Existing clients change only their base URL."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve_app.ingress.middleware import request_id_of
from serve_app.ingress.replies import PlainJson
from serve_app.ingress.runpod_jobs import RunpodJobs
from serve_app.ingress.short_ways import OftenCalled, tenant_of, wait_s
from serve_app.settings import RequestLimits


def runpod_router(jobs: RunpodJobs, often: OftenCalled, limits: RequestLimits) -> APIRouter:
    """The endpoint id is taken as it comes: one server is one endpoint, under any name.

    Replies are plain JSON already; FastAPI would check each against its annotation first.
    """
    router = APIRouter(prefix="/v2/{endpoint_id}", tags=["runpod"])

    @router.post("/run")
    async def run(request: Request) -> Response:
        return await often.run(request.scope, request.receive)

    @router.post("/runsync")
    async def runsync(request: Request) -> Response:
        return await often.runsync(request.scope, request.receive)

    @router.get("/status/{job_id}")
    @router.post("/status/{job_id}")
    async def status(request: Request, job_id: str) -> Response:
        return await often.status(request.scope, job_id)

    @router.get("/status-sync/{job_id}")
    @router.post("/status-sync/{job_id}")
    async def status_sync(request: Request, job_id: str) -> Response:
        held_s = wait_s(request.scope, limits, default_s=limits.runsync_wait_default_s)
        return PlainJson(
            await jobs.status(tenant_of(request.scope), request_id_of(request.scope), job_id, wait_s=held_s)
        )

    @router.get("/stream/{job_id}")
    @router.post("/stream/{job_id}")
    async def stream(request: Request, job_id: str) -> Response:
        held_s = wait_s(request.scope, limits, default_s=limits.stream_wait_default_s)
        return PlainJson(
            await jobs.stream(tenant_of(request.scope), request_id_of(request.scope), job_id, wait_s=held_s)
        )

    @router.post("/cancel/{job_id}")
    async def cancel(request: Request, job_id: str) -> Response:
        return PlainJson(await jobs.cancel(tenant_of(request.scope), job_id))

    @router.post("/retry/{job_id}")
    async def retry(request: Request, job_id: str) -> Response:
        return PlainJson(await jobs.retry(tenant_of(request.scope), request_id_of(request.scope), job_id))

    @router.post("/purge-queue")
    async def purge_queue(request: Request) -> Response:
        return PlainJson(await jobs.purge_queue(tenant_of(request.scope)))

    @router.get("/health")
    async def health(request: Request) -> Response:
        return PlainJson(await jobs.health(tenant_of(request.scope)))

    return router
