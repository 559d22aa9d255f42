"""The S3 clients: how they are configured, and what they refuse to send."""

from __future__ import annotations

import asyncio
import urllib.parse
from contextlib import AsyncExitStack
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session

from storage.errors import StorageMisconfigured
from storage.settings import S3Settings

# Anything else is refused before it is sent: on rclone, tagging and ACL calls overwrite or delete the object.
ALLOWED_CALLS = frozenset(
    {
        "AbortMultipartUpload",
        "CompleteMultipartUpload",
        "CopyObject",
        "CreateBucket",
        "CreateMultipartUpload",
        "DeleteObject",
        "DeleteObjects",
        "GetObject",
        "HeadBucket",
        "HeadObject",
        "ListMultipartUploads",
        "ListObjectsV2",
        "PutObject",
        "UploadPart",
    }
)
# Tells our requests from anybody else's in a server's log.
USER_AGENT = "raylora-storage"
# Health and presigning never queue behind transfers, so they need connections of their own.
SPARE_CONNECTIONS = 8
# Longer than any attempt may take.
NO_READ_TIMEOUT_S = 7 * 24 * 3600.0
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class S3Clients:
    """Implements `storage.s3_calls.Clients`."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._opened: dict[tuple[str | None, float], Any] = {}
        self._opening = asyncio.Lock()

    async def internal(self) -> Any:
        return await self._client(self._settings.endpoint_url, self._settings.read_timeout_s)

    async def patient(self) -> Any:
        return await self._client(self._settings.endpoint_url, NO_READ_TIMEOUT_S)

    async def public(self) -> Any:
        settings = self._settings
        return await self._client(settings.public_endpoint_url or settings.endpoint_url, settings.read_timeout_s)

    async def aclose(self) -> None:
        self._opened.clear()
        await self._stack.aclose()

    async def _client(self, endpoint_url: str | None, read_timeout_s: float) -> Any:
        kind = (endpoint_url, read_timeout_s)
        if kind in self._opened:
            return self._opened[kind]
        async with self._opening:
            if kind not in self._opened:
                self._opened[kind] = await self._open(endpoint_url, read_timeout_s)
            return self._opened[kind]

    async def _open(self, endpoint_url: str | None, read_timeout_s: float) -> Any:
        settings = self._settings
        context = get_session().create_client(
            "s3",
            endpoint_url=endpoint_url,
            region_name=settings.region,
            config=_client_config(settings, endpoint_url, read_timeout_s),
            **_credentials(settings),
        )
        client = await self._stack.enter_async_context(context)
        client.meta.events.register("request-created.s3", _drop_expect_header)
        client.meta.events.register("before-parameter-build.s3", _refuse_other_calls)
        return client


class _OneRequestSession(AIOHTTPSession):  # type: ignore[misc]
    """aiohttp sends an idempotent request again, by itself and at once, when its connection was cut.

    That is a second owner of retries, and it would repeat a write without looking whether it had its effect.
    """

    async def _get_session(self, proxy_url: Any) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


def sends_checksums(settings: S3Settings) -> bool:
    """Whether the backend compares what it receives with a checksum; the others know few of them, or none."""
    return settings.backend == "aws"


def _signing(endpoint_url: str | None) -> dict[str, bool]:
    """Hashing a body for its signature only costs time where TLS protects it or it does not leave the machine."""
    url = urllib.parse.urlsplit(endpoint_url or "https:")
    return {"payload_signing_enabled": url.scheme != "https" and url.hostname not in LOOPBACK}


def _client_config(settings: S3Settings, endpoint_url: str | None, read_timeout_s: float) -> AioConfig:
    aws = settings.backend == "aws"
    checksums = "when_supported" if sends_checksums(settings) else "when_required"
    return AioConfig(
        signature_version="s3v4",
        # botocore puts its own together anew for each request, which takes a twentieth of the time of a small one.
        user_agent=USER_AGENT,
        s3={"addressing_style": "auto" if aws else "path", **_signing(endpoint_url)},
        request_checksum_calculation=checksums,
        response_checksum_validation=checksums,
        # One request for one attempt: `Resilience` owns the retries.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=read_timeout_s,
        max_pool_connections=settings.max_concurrency + SPARE_CONNECTIONS,
        http_session_cls=_OneRequestSession,
        # A proxy in the environment must not come between us and a server beside us.
        proxies=None if aws else {},
    )


def static_credentials(settings: S3Settings) -> tuple[str, str] | None:
    """The access key id and the secret access key; None for AWS' usual chain. Raises StorageMisconfigured."""
    key, secret = settings.access_key_id, settings.secret_access_key
    if key is not None and secret is not None:
        return key.get_secret_value(), secret.get_secret_value()
    if settings.backend != "aws" or key is not secret:
        raise StorageMisconfigured("an access key id and a secret access key are needed")
    return None


def _credentials(settings: S3Settings) -> dict[str, str]:
    keys = static_credentials(settings)
    return {} if keys is None else {"aws_access_key_id": keys[0], "aws_secret_access_key": keys[1]}


def _drop_expect_header(request: Any, **_: Any) -> None:
    """aiohttp waits for "100 Continue" without a timeout, for ever where a server stays silent."""
    del request.headers["Expect"]


def _refuse_other_calls(model: Any, **_: Any) -> None:
    if model.name not in ALLOWED_CALLS:
        raise StorageMisconfigured(f"{model.name} is not among the S3 calls that storage makes")
