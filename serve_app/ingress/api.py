"""The FastAPI application. Plain: its collaborators are handed in, so it runs without Ray."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from serve_app.errors import BodyInvalid, MethodNotAllowed, RouteNotFound, ServeError
from serve_app.ingress.auth import KeyRing
from serve_app.ingress.middleware import Authentication, BodyLimit, EdgeHeaders, Guard, request_id_of
from serve_app.ingress.rate_limits import RateGate, RateLimit
from serve_app.ingress.replies import error_response
from serve_app.ingress.runpod import runpod_router
from serve_app.ingress.runpod_jobs import RunpodJobs
from serve_app.job_types.context import Services
from serve_app.job_types.health import check_services


def create_app(services: Services, keys: KeyRing) -> FastAPI:
    """Every route but GET /livez needs a key of `keys`. No CORS headers are sent."""
    jobs = RunpodJobs(services)
    gate = RateGate(services.dispatch, services.rate_limits, replicas=services.ingress_replicas)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await jobs.close()

    app = FastAPI(
        title="raylora",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(EdgeHeaders),
            Middleware(Guard),
            Middleware(Authentication, keys=keys),
            Middleware(RateLimit, gate=gate),
            Middleware(BodyLimit, limits=services.limits),
        ],
        exception_handlers={HTTPException: _routing_error},
        redirect_slashes=False,
    )
    app.include_router(runpod_router(jobs, services.limits))

    @app.get("/livez")
    async def livez() -> dict[str, Any]:
        """This process answers. Touches nothing else."""
        return {"alive": True}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether a request can be served now: storage and its breaker, job records, a replica for pictures."""
        checks = await check_services(services)
        ready = all(check["ok"] for check in checks.values())
        return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)

    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses, in the shape of every other error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    known: dict[int, ServeError] = {404: RouteNotFound(), 405: MethodNotAllowed()}
    mapped = known.get(status) or (BodyInvalid("the request is malformed") if status < 500 else ServeError())
    return error_response(mapped, path=request.url.path, request_id=request_id_of(request.scope))
