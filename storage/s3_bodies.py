"""Whole objects to and from S3 by obstore, whose requests take a fifth of the processor time of botocore's.

To be used inside one attempt of `Resilience.call`, as `storage.s3_calls`: obstore's own retries are off. It tells its
errors apart by text alone, so `refusal_of` reads the status and S3's code from there.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import obstore
from obstore.store import S3Store as Bucket

from storage.s3_client import LOOPBACK, NO_READ_TIMEOUT_S, USER_AGENT, sends_checksums, static_credentials
from storage.settings import S3Settings

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig

SHA256_METADATA = "sha256"

_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3}) [^:]*:(.*?)(?:\n\nDebug source:|\Z)", re.DOTALL)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_KIND = re.compile(r"^ +kind: (\w+),$", re.MULTILINE)


@dataclass(frozen=True)
class Refusal:
    """What the server said: `status` is HTTP's, `code` S3's or ""."""

    status: int
    code: str


def refusal_of(error: Exception) -> Refusal | None:
    """None where there was no answer."""
    found = _STATUS.search(str(error))
    if found is None:
        return None
    code = _CODE.search(found[2])
    return Refusal(int(found[1]), "" if code is None else code[1])


def is_timeout(error: Exception) -> bool:
    """Whether obstore gave up waiting."""
    return "Timeout" in _KIND.findall(str(error))


def is_truncation(error: Exception) -> bool:
    """Whether an answer began and did not end."""
    return not {"Body", "Interrupted", "Decode"}.isdisjoint(_KIND.findall(str(error)))


class OpenedObject:
    """An object whose headers have come. `sha256` is what was noted with it, if the backend keeps such notes."""

    def __init__(self, result: GetResult) -> None:
        self._result = result
        self.size_bytes = int(result.meta["size"])
        noted: Any = result.attributes.get(SHA256_METADATA)
        self.sha256: str | None = noted

    async def read(self) -> memoryview:
        """The body. Once only."""
        return memoryview(await self._result.bytes_async())


class Bodies:
    """Whole objects of one bucket. Raises obstore's errors, FileNotFoundError, TimeoutError, StorageMisconfigured."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._buckets: dict[float, Bucket] = {}

    async def open(self, key: str) -> OpenedObject:
        """Send the request and wait for the headers."""
        return OpenedObject(await obstore.get_async(self._bucket(self._settings.read_timeout_s), key))

    async def put(self, key: str, data: bytes, *, sha256: str, content_type: str | None) -> str:
        """Returns the server's ETag, "" where it gives none."""
        attributes = {SHA256_METADATA: sha256, **({} if content_type is None else {"Content-Type": content_type})}
        moving_s = len(data) / self._settings.throughput_min_bytes_per_s
        # obstore's timeout of reads would run while the body is still being sent.
        async with asyncio.timeout(self._settings.read_timeout_s + moving_s):
            answer = await obstore.put_async(
                self._bucket(NO_READ_TIMEOUT_S), key, data, attributes=attributes, use_multipart=False
            )
        return answer["e_tag"] or ""

    def _bucket(self, read_timeout_s: float) -> Bucket:
        bucket = self._buckets.get(read_timeout_s)
        if bucket is None:
            bucket = self._buckets[read_timeout_s] = _opened(self._settings, read_timeout_s)
        return bucket


def _opened(settings: S3Settings, read_timeout_s: float) -> Bucket:
    aws, url = settings.backend == "aws", settings.endpoint_url
    secure = url is None or url.startswith("https:")
    host = "" if url is None else urllib.parse.urlsplit(url).hostname or ""
    options: ClientConfig = {
        "allow_http": not secure,
        "user_agent": USER_AGENT,
        "connect_timeout": _duration(settings.connect_timeout_s),
        "read_timeout": _duration(read_timeout_s),
        # The whole of a request is bounded by its attempt.
        "timeout": _duration(NO_READ_TIMEOUT_S),
    }
    if url is not None and not aws:
        # A proxy in the environment must not come between us and a server beside us; one that is named here takes
        # its place, and is asked for no host.
        options["proxy_url"], options["proxy_excludes"] = url, host
    config: dict[str, Any] = {
        "region": settings.region,
        "virtual_hosted_style_request": aws and url is None,
        # Hashing a body for its signature only costs time where TLS protects it or it does not leave the machine.
        "unsigned_payload": secure or host in LOOPBACK,
        **({} if url is None else {"endpoint": url}),
        **({"checksum_algorithm": "SHA256"} if sends_checksums(settings) else {}),
        **_credentials(settings),
    }
    return Bucket(settings.bucket, client_options=options, retry_config={"max_retries": 0}, **config)


def _credentials(settings: S3Settings) -> dict[str, Any]:
    """Raises StorageMisconfigured."""
    keys = static_credentials(settings)
    if keys is not None:
        return {"access_key_id": keys[0], "secret_access_key": keys[1]}
    # Needs boto3, which takes its time to import.
    from obstore.auth.boto3 import Boto3CredentialProvider

    return {"credential_provider": Boto3CredentialProvider()}


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"
