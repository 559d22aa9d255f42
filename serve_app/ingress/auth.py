"""Who is asking: API key to tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import SecretStr

from serve_app.errors import Unauthorized

KEY_LENGTH_MAX = 512


@dataclass(frozen=True)
class Principal:
    """Whom a valid key speaks for."""

    tenant: str
    key_id: str
    """Names the key without telling it."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class KeyRing:
    """The accepted keys, held only as digests. Comparison takes the same time whichever key is offered."""

    def __init__(self, keys: Mapping[str, SecretStr]) -> None:
        """`keys`: tenant to its key."""
        self._tenants = tuple((_digest(key.get_secret_value()), tenant) for tenant, key in keys.items())

    def principal(self, authorization: str | None) -> Principal:
        """The owner of the key in an `Authorization` header: `Bearer KEY`, or the bare key. Raises Unauthorized."""
        offered = _digest(key_in(authorization))
        found: Principal | None = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, offered):
                found = Principal(tenant, digest.hex()[:16])
        if found is None:
            raise Unauthorized
        return found


def key_in(authorization: str | None) -> str:
    """The key of an `Authorization` header. Raises Unauthorized where there is none."""
    text = (authorization or "").strip()
    scheme, _, rest = text.partition(" ")
    key = rest.strip() if scheme.lower() == "bearer" else text
    if not key or len(key) > KEY_LENGTH_MAX:
        raise Unauthorized
    return key
