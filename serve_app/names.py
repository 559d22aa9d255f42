"""Names in settings and bodies that become part of object keys, by the rules of `storage.keys`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field

from storage.errors import InvalidKey
from storage.keys import check_storage_prefix, check_tenant

TENANT_PATTERN = r"^[a-zA-Z0-9_][a-zA-Z0-9_-]{0,63}$"


def _as_in_keys(check: Callable[[str], str]) -> AfterValidator:
    """Else the name would be refused at every request."""

    def checked(value: str) -> str:
        try:
            return check(value)
        except InvalidKey as error:
            raise ValueError(error.reason) from error

    return AfterValidator(checked)


Tenant = Annotated[str, Field(pattern=TENANT_PATTERN), _as_in_keys(check_tenant)]
StoragePrefix = Annotated[str, _as_in_keys(check_storage_prefix)]
