"""The Serve shell of the ingress."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

# Where Serve keeps its replicas' logs, which nothing public tells.
from ray.serve._private.logging_utils import get_serve_logs_dir

from serve_app.collaborators import Inference
from serve_app.handles import (
    TRANSFER_PLACE_TIMEOUT_S,
    HandleDispatch,
    HandleInference,
    HandleValidation,
    RestingInference,
    ServeWorkers,
)
from serve_app.ingress.api import create_app
from serve_app.ingress.auth import KeyRing
from serve_app.ingress.door import Door
from serve_app.ingress.readiness import disk_of
from serve_app.ingress.request_log import LineFile, RayMetrics, RequestLog
from serve_app.job_types.context import JobDefaults, Services
from serve_app.settings import Settings, SettingsIncomplete
from serve_app.stack.haproxy import door_of
from serve_app.transfers import TenantPlaces, places_of_tenant
from storage.actor import StorageClient
from storage.jobs_client import JobsClient


@dataclass(frozen=True)
class DoorSettings:
    """`folder` is where HAProxy looks for sockets; the rest is `Door`'s."""

    folder: Path
    places: int
    drain_s: float


class Ingress:
    """Hands the FastAPI application to Serve, with collaborators behind handles. Never imports torch."""

    def __init__(
        self,
        settings: Settings,
        validation: Any,
        transfers: Any,
        dispatch: Any,
        inference: Any,
        application: str,
        deployment: str,
        door: DoorSettings | None,
    ) -> None:
        """`application` and `deployment` name the inference deployment, whose replicas /health counts."""
        if settings.api_key is None:
            raise SettingsIncomplete("api_key is not set")
        s3 = settings.s3()
        dispatcher = HandleDispatch(dispatch)
        workers = ServeWorkers(dispatcher, application, deployment)
        replicas: Inference = HandleInference(inference)
        services = Services(
            jobs=JobsClient(reads_directly=True),
            store=StorageClient(s3, settings.breaker()),
            validation=HandleValidation(
                validation,
                transfers,
                TenantPlaces(places_of_tenant(settings), wait_s=TRANSFER_PLACE_TIMEOUT_S),
            ),
            dispatch=dispatcher,
            inference=RestingInference(replicas, workers) if settings.may_rest() else replicas,
            workers=workers,
            may_rest=settings.may_rest(),
            clock=lambda: datetime.now(UTC),
            bucket=s3.bucket,
            prefix=s3.prefix,
            worker_id=socket.gethostname(),
            environment={"server": "raylora", "python": platform.python_version()},
            models=tuple(settings.models),
            defaults=JobDefaults(
                training_timeout_s=settings.training_timeout_s,
                generation_timeout_s=settings.generation_timeout_s,
                attempts_max=settings.job_attempts_max,
                generation_queue_max=settings.generation_queue_max,
            ),
            limits=settings.limits,
            rate_limits=settings.rate_limits,
            ingress_replicas=settings.ingress_replicas,
            webhooks=settings.webhooks,
            webhook_secrets=settings.webhook_secrets(),
            reads_older=settings.default_tenant,
        )
        self._door = None if door is None else _door(door)
        self._app = create_app(
            services,
            KeyRing(settings.keys_by_tenant(), manager=settings.default_tenant),
            cors_origins=settings.cors_origins,
            disk=disk_of(settings.home),
            door=self._door,
        )

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose check raises."""
        if self._door is not None and self._door.has_failed:
            raise RuntimeError("the server of the socket for HAProxy has ended")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app


def _door(settings: DoorSettings) -> Door:
    replica_id = serve.get_replica_context().replica_id.unique_id
    log = RequestLog(LineFile(Path(get_serve_logs_dir(), f"access_{replica_id}.log")), RayMetrics(replica_id))
    return Door(door_of(settings.folder, replica_id), places=settings.places, drain_s=settings.drain_s, log=log)
