"""`/v1/webhooks`: what a receiver needs to know."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from serve_app.ingress.native.calls import tenant_of
from serve_app.ingress.native.views import View
from serve_app.job_types.context import Services


class WebhookSecret(View):
    """`whsec_` and base64, as the libraries of Standard Webhooks take it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwxKd3mB1yQ2E="}]}
    )

    secret: str = Field(repr=False)


def webhooks_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

    @router.get("/secret")
    async def webhook_secret(request: Request, response: Response) -> WebhookSecret:
        """What the webhooks of this key's tenant are signed with, for the Standard Webhooks library of the receiver."""
        response.headers["Cache-Control"] = "no-store"
        return WebhookSecret(secret=services.webhook_secrets.shown_to(tenant_of(request)))

    return router
