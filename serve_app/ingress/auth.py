"""Who is asking: API key to tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import SecretStr

from serve_app.errors import Unauthorized
from serve_app.ingress.issued_keys import KnownKeys

KEY_LENGTH_MAX = 512


@dataclass(frozen=True)
class Principal:
    """Whom a valid key speaks for."""

    tenant: str
    key_id: str
    """Names the key without telling it."""
    may_manage_keys: bool = False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The accepted keys, held only as digests. Comparison takes the same time whichever key of the settings is offered;
    the others are found by their digest, which whoever guesses keys cannot steer.
    """

    def __init__(self, keys: Mapping[str, SecretStr], *, manager: str | None = None) -> None:
        """`keys`: tenant to its key, as the settings say. That of `manager` may make and revoke others."""
        self._tenants = tuple((_digest(key.get_secret_value()), tenant) for tenant, key in keys.items())
        self._manager = manager
        self._issued: KnownKeys | None = None

    def learn(self, issued: KnownKeys) -> None:
        """Also accept the keys of `issued`."""
        self._issued = issued

    def forget(self) -> None:
        """Keys were made or revoked here."""
        if self._issued is not None:
            self._issued.forget()

    async def principal(self, authorization: str | None) -> Principal:
        """The owner of the key in an `Authorization` header: `Bearer KEY`, or the bare key.

        Raises Unauthorized, and JobError where the keys made over HTTP cannot be looked at.
        """
        offered = _digest(key_in(authorization))
        found = self._of_settings(offered) or await self._of_issued(offered)
        if found is None:
            raise Unauthorized
        return found

    def _of_settings(self, offered: bytes) -> Principal | None:
        found: Principal | None = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, offered):
                found = Principal(tenant, digest.hex()[:16], may_manage_keys=tenant == self._manager)
        return found

    async def _of_issued(self, offered: bytes) -> Principal | None:
        issued = None if self._issued is None else await self._issued.find(offered.hex())
        return None if issued is None else Principal(issued.tenant, offered.hex()[:16])


def key_in(authorization: str | None) -> str:
    """The key of an `Authorization` header. Raises Unauthorized where there is none."""
    text = (authorization or "").strip()
    scheme, _, rest = text.partition(" ")
    key = rest.strip() if scheme.lower() == "bearer" else text
    if not key or len(key) > KEY_LENGTH_MAX:
        raise Unauthorized
    return key
