"""The FastAPI application. Plain: its collaborators are handed in, so it runs without Ray."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Match

from serve_app.errors import BodyInvalid, InvalidRequest, MethodNotAllowed, RouteNotFound, ServeError
from serve_app.ingress.auth import KeyRing
from serve_app.ingress.cors import Cors
from serve_app.ingress.door import Door
from serve_app.ingress.issued_keys import KnownKeys
from serve_app.ingress.middleware import Authentication, BodyLimit, EdgeHeaders, Guard, request_id_of
from serve_app.ingress.native.router import native_router
from serve_app.ingress.openapi import document
from serve_app.ingress.rate_limits import RateGate, RateLimit
from serve_app.ingress.readiness import DiskSpace, check_readiness, disk_of
from serve_app.ingress.reference import reference_router
from serve_app.ingress.replies import PlainJson, error_response
from serve_app.ingress.runpod import runpod_router
from serve_app.ingress.runpod_jobs import RunpodJobs
from serve_app.ingress.short_ways import OftenCalled, ShortWays
from serve_app.job_types.context import Services
from storage.jobs import Jobs
from train_jobs.field_problems import problems_in


def create_app(
    services: Services,
    keys: KeyRing,
    *,
    cors_origins: Sequence[str] = (),
    disk: Callable[[], DiskSpace] = disk_of(Path.home()),  # noqa: B008 looks at nothing until it is called
    door: Door | None = None,
) -> FastAPI:
    """Every route needs a key of `keys` or one made by /v1/keys, but GET /livez and the description of the interface.

    Browsers of `cors_origins`, and of no other origin, may read replies; they send their key, never a cookie.
    `door` is open from the application's start until its end.
    """
    jobs = RunpodJobs(services)
    often = OftenCalled(jobs, services.limits)
    keys.learn(
        KnownKeys(
            lambda: services.jobs.call(Jobs.issued_keys, valid_only=True),
            lambda key_ids: services.jobs.call(Jobs.note_key_uses, key_ids),
        )
    )
    gate = RateGate(services.dispatch, services.rate_limits, replicas=services.ingress_replicas)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if door is not None:
            await door.open(app, app.routes)
        yield
        if door is not None:
            await door.close()
        await jobs.close()

    app = FastAPI(
        title="raylora",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=[
            Middleware(EdgeHeaders),
            # In front of Guard, so that pages of these origins can read errors too.
            *([Middleware(Cors, origins=tuple(cors_origins))] if cors_origins else []),
            Middleware(Guard),
            Middleware(Authentication, keys=keys),
            Middleware(RateLimit, gate=gate),
            Middleware(BodyLimit, limits=services.limits),
            Middleware(ShortWays, calls=often),
        ],
        exception_handlers={HTTPException: _routing_error, RequestValidationError: _parameter_error},
        redirect_slashes=False,
        # The door tells of requests; to look whether anybody else listens takes as long as a layer for each.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )

    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", tags=["server"])
    async def livez() -> Response:
        """This process answers. Touches nothing else."""
        return PlainJson({"alive": True})

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", tags=["server"])
    async def readyz() -> JSONResponse:
        """Whether a request can be served now: storage and its breaker, job records, replicas, a GPU, disk."""
        checks = await check_readiness(services, disk)
        ready = all(check["ok"] for check in checks.values())
        return JSONResponse({"ready": ready, "checks": checks}, status_code=200 if ready else 503)

    app.include_router(runpod_router(jobs, often, services.limits))
    app.include_router(native_router(services, keys))
    app.include_router(reference_router(app))
    app.openapi = document(app)  # type: ignore[method-assign]
    return app


async def _routing_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses, in the shape of every other error."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    known: dict[int, ServeError] = {404: RouteNotFound(), 405: MethodNotAllowed()}
    mapped = known.get(status) or (BodyInvalid("the request is malformed") if status < 500 else ServeError())
    reply = error_response(mapped, path=request.url.path, request_id=request_id_of(request.scope))
    if status == 405:
        reply.headers["Allow"] = ", ".join(allowed_methods(request))
    return reply


def allowed_methods(request: Request) -> list[str]:
    """The methods of every route at this path; the router itself names only the first one's."""
    found: set[str] = set()
    for method in ("GET", "HEAD", "POST", "DELETE"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return sorted(found)


async def _parameter_error(request: Request, error: Exception) -> Response:
    """A path's or query's parameter that is not what the OpenAPI document says."""
    found = error.errors() if isinstance(error, RequestValidationError) else []
    places = [{**item, "loc": item["loc"][1:]} for item in found]
    problems = problems_in(places, {"properties": _parameters(request.scope.get("route"))})
    return error_response(InvalidRequest(problems), path=request.url.path, request_id=request_id_of(request.scope))


def _parameters(route: Any) -> dict[str, Any]:
    """The JSON schemas of a route's parameters, by name."""
    if not isinstance(route, APIRoute):
        return {}
    fields = [*route.dependant.path_params, *route.dependant.query_params, *route.dependant.header_params]
    kinds: dict[str, Any] = {field.alias: Annotated[field.field_info.annotation, field.field_info] for field in fields}
    return {name: TypeAdapter[Any](kind).json_schema() for name, kind in kinds.items()}
