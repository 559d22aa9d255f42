"""The graph, bound in one place: ingress -> validation, transfers, dispatch -> inference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from serve_app.dispatch.deployment import Dispatcher
from serve_app.dispatch.routing import WarmFirstRouter
from serve_app.inference.deployment import Inference
from serve_app.ingress.deployment import DoorSettings, Ingress
from serve_app.settings import Settings, SettingsIncomplete
from serve_app.shutdown import REPLICA_S, application_s, inference_s
from serve_app.transfers import places_of_replica
from serve_app.validation.deployment import Validation

APPLICATION = "raylora"
INFERENCE = "Inference"
# Small, so that the HTTP side fits beside a training on a laptop.
CPUS_PER_REPLICA = 0.1
# Long polls hold their places for minutes.
INGRESS_REQUESTS_MAX = 2000
DISPATCH_REQUESTS_MAX = 2000
VALIDATION_REQUESTS_MAX = 8
# Serve runs a replica's code, and its calls to other replicas, on event loops of their own, so that code that blocks
# holds up nothing else. These replicas only wait for others, and a request would cost them half as much again. Their
# log lines of requests are written a hundred at a time.
ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


def build(settings: Settings, doors: Path | None = None) -> Application:
    """The Serve application; also what `serve deploy` calls. Raises SettingsIncomplete before anything is started.

    `doors`: the folder in which HAProxy looks for the sockets of ingress replicas. Where `gpus_per_replica` is open, a
    replica takes one GPU if the cluster has any: Ray must be initialised by then.
    """
    if settings.api_key is None:
        raise SettingsIncomplete("api_key is not set")
    settings.s3()
    inference = inference_deployment(settings).bind(settings)
    dispatch = _deployment(
        Dispatcher,
        "Dispatcher",
        1,
        DISPATCH_REQUESTS_MAX,
        shutdown_s=application_s(settings.drain_s),
        environment=ONE_LOOP,
    ).bind(settings, inference)
    replicas = settings.validation_replicas
    validation = _deployment(Validation, "Validation", replicas, VALIDATION_REQUESTS_MAX).bind(settings)
    transfers = _deployment(Validation, "Transfers", replicas, places_of_replica(settings)).bind(settings)
    ingress = _deployment(
        serve.ingress()(Ingress), "Ingress", settings.ingress_replicas, INGRESS_REQUESTS_MAX, environment=ONE_LOOP
    )
    door = None if doors is None else DoorSettings(doors, places=INGRESS_REQUESTS_MAX, drain_s=REPLICA_S / 2)
    application: Application = ingress.bind(
        settings, validation, transfers, dispatch, inference, APPLICATION, INFERENCE, door
    )
    return application


def gpus_per_replica(settings: Settings) -> float:
    """What is set; else one where the cluster has a GPU, none otherwise."""
    if settings.gpus_per_replica is not None:
        return settings.gpus_per_replica
    if settings.device == "cpu" or not ray.is_initialized():
        return 0.0
    return 1.0 if ray.cluster_resources().get("GPU", 0.0) >= 1.0 else 0.0


def inference_deployment(settings: Settings, cls: Any = Inference) -> Any:
    """Replicas of `cls` as the settings want them: how many, where they are pinned, who gets which generation."""
    return serve.deployment(
        cls,
        name=INFERENCE,
        num_replicas=settings.inference_replicas if settings.autoscaling is None else None,
        autoscaling_config=_autoscaling(settings),
        request_router_config=_routing(settings),
        ray_actor_options={"num_cpus": CPUS_PER_REPLICA, "num_gpus": gpus_per_replica(settings)},
        # Health calls must find a place beside the generations.
        max_ongoing_requests=settings.generations_per_replica + 8,
        graceful_shutdown_timeout_s=inference_s(settings.drain_s),
        logging_config=_json_logs(),
    )


def _autoscaling(settings: Settings) -> AutoscalingConfig | None:
    """Serve counts what its callers have sent and what they hold back for want of a replica: all that the dispatcher
    has claimed, which is enough for `replicas_max` once that many replicas' worth is queued.
    """
    scaling = settings.autoscaling
    if scaling is None:
        return None
    return AutoscalingConfig(
        min_replicas=scaling.replicas_min,
        max_replicas=scaling.replicas_max,
        target_ongoing_requests=scaling.generations_target
        or min(settings.pictures_per_batch, settings.generations_per_replica),
        look_back_period_s=scaling.averaged_over_s,
        upscale_delay_s=scaling.grow_after_s,
        downscale_delay_s=scaling.shrink_after_s,
    )


def _routing(settings: Settings) -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class=WarmFirstRouter,
        request_router_kwargs={
            "default_model": settings.default_model,
            "models_kept": settings.models_loaded_max,
            # Loading a model takes about as long as a batch, or longer.
            "model_cost": settings.pictures_per_batch,
        },
    )


def _deployment(
    cls: Any,
    name: str,
    replicas: int,
    requests_max: int,
    *,
    shutdown_s: float = REPLICA_S,
    environment: Mapping[str, str] | None = None,
) -> Any:
    runtime = {} if environment is None else {"runtime_env": {"env_vars": dict(environment)}}
    return serve.deployment(
        cls,
        name=name,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": CPUS_PER_REPLICA, **runtime},
        max_ongoing_requests=requests_max,
        graceful_shutdown_timeout_s=shutdown_s,
        logging_config=_json_logs(),
    )


def _json_logs() -> dict[str, Any]:
    return {"encoding": "JSON"}
