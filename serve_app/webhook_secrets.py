"""What webhooks are signed with: a secret of each tenant's own, which it may know, and which tells no other."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

MARK = "whsec_"
_LABEL = b"raylora webhook secret v1\0"


@dataclass(frozen=True)
class WebhookSecrets:
    """`root`: the secret of the installation, from which a tenant's is derived. `given`: those set by the operator.

    A given one is no root of others: its tenant's receivers hold it, and could sign for everybody.
    """

    root: bytes = field(repr=False)
    given: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def of(self, tenant: str) -> bytes:
        """The bytes that this tenant's webhooks are signed with: the given ones, or 32 by HMAC-SHA256."""
        given = self.given.get(tenant)
        return hmac.digest(self.root, _LABEL + tenant.encode(), hashlib.sha256) if given is None else given

    def shown_to(self, tenant: str) -> str:
        """The same in the notation of Standard Webhooks, as receivers configure it."""
        return MARK + base64.b64encode(self.of(tenant)).decode()


def decoded(secret: str) -> bytes:
    """The bytes of a secret in that notation, empty where it is not one."""
    try:
        return base64.b64decode(secret.removeprefix(MARK), validate=True)
    except ValueError:
        return b""
