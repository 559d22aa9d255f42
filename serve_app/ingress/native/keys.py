"""`/v1/keys`: API keys for tenants, made, listed and revoked by the instance's own key."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from serve_app.errors import KeysNotAllowed
from serve_app.ingress.auth import KeyRing, Principal
from serve_app.ingress.native.bodies import ApiKeyCreate, reads, takes
from serve_app.ingress.native.views import ApiKey, ApiKeyCreated, Files
from serve_app.job_types.context import Services
from storage.errors import ApiKeyNotFound
from storage.jobs import Jobs
from storage.key_rows import IssuedKey

KEY_START, KEY_BYTES = "rl_", 32
_KEY_ID = re.compile(r"key_[0-9a-f]{16}")


def keys_router(services: Services, ring: KeyRing) -> APIRouter:
    """Without idempotency keys: a kept reply would be the key itself, in the database."""
    router = APIRouter(prefix="/v1/keys", tags=["keys"], dependencies=[Depends(_admitted)])

    @router.post("", status_code=201, openapi_extra=takes(ApiKeyCreate))
    async def create_key(
        request: Request, asked: Annotated[ApiKeyCreate, Depends(reads(ApiKeyCreate))]
    ) -> ApiKeyCreated:
        """Make a key. The reply is the only place that ever shows it; every replica takes it after two seconds."""
        text = KEY_START + secrets.token_urlsafe(KEY_BYTES)
        tenant = _principal(request).tenant if asked.tenant is None else asked.tenant
        services.keys_of(tenant)
        digest = hashlib.sha256(text.encode()).hexdigest()
        made = await services.jobs.call(Jobs.add_key, f"key_{secrets.token_hex(8)}", tenant, asked.name, digest)
        ring.forget()
        return ApiKeyCreated(**_fields(made), key=text)

    @router.get("")
    async def list_keys(request: Request) -> Files[ApiKey]:
        """Every key that was made here, newest first, revoked ones too. Keys of the settings are not among them."""
        found = await services.jobs.call(Jobs.issued_keys, valid_only=False)
        return Files(items=[ApiKey(**_fields(key)) for key in found])

    @router.delete("/{key_id}")
    async def revoke_key(request: Request, key_id: str) -> ApiKey:
        """Revoke a key. Here it is refused at once, and by every replica after two seconds."""
        if not _KEY_ID.fullmatch(key_id):
            raise ApiKeyNotFound(key_id[:100])
        revoked = await services.jobs.call(Jobs.revoke_key, key_id)
        ring.forget()
        return ApiKey(**_fields(revoked))

    return router


def _principal(request: Request) -> Principal:
    principal: Principal = request.scope["state"]["principal"]
    return principal


def _admitted(request: Request) -> None:
    """Raises KeysNotAllowed."""
    if not _principal(request).may_manage_keys:
        raise KeysNotAllowed


def _fields(key: IssuedKey) -> dict[str, object]:
    return {name: value for name, value in vars(key).items() if name != "key_sha256"}
