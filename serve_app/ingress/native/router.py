"""All routes of `/v1`, bound in one place."""

from fastapi import APIRouter, Depends

from serve_app.ingress.auth import KeyRing
from serve_app.ingress.huggingface import huggingface_router
from serve_app.ingress.native.calls import only_known_parameters
from serve_app.ingress.native.datasets import datasets_router
from serve_app.ingress.native.generations import generations_router, renewed_generation
from serve_app.ingress.native.keys import keys_router
from serve_app.ingress.native.loras import loras_router, renewed_lora_import
from serve_app.ingress.native.once import OnceOnly, once_route
from serve_app.ingress.native.training_files import training_files_router
from serve_app.ingress.native.trainings import trainings_router
from serve_app.ingress.native.uploads import renewed_upload, uploads_router
from serve_app.ingress.native.webhooks import webhooks_router
from serve_app.ingress.openai_images import openai_router
from serve_app.job_types.context import Services


def native_router(services: Services, keys: KeyRing) -> APIRouter:
    renewals = {
        "/v1/generations": renewed_generation(services),
        "/v1/loras/import": renewed_lora_import(services),
        "/v1/uploads": renewed_upload(services),
    }
    route_class = once_route(OnceOnly(services, renewals))
    own = APIRouter(dependencies=[Depends(only_known_parameters)])
    own.include_router(trainings_router(services, route_class))
    own.include_router(training_files_router(services))
    own.include_router(generations_router(services, route_class))
    own.include_router(datasets_router(services, route_class))
    own.include_router(uploads_router(services, route_class))
    own.include_router(loras_router(services, route_class))
    own.include_router(keys_router(services, keys))
    own.include_router(webhooks_router(services))
    router = APIRouter()
    router.include_router(own)
    router.include_router(openai_router(services))
    router.include_router(huggingface_router(services))
    return router
