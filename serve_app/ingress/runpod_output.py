"""Outputs that are too large to be part of a status become files of their own."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic_core import to_json

from serve_app.job_types.context import Services
from serve_app.job_types.files import redirect_item
from serve_app.links import signed
from storage.datasets import new_upload_id

OUTPUT_BYTES_MAX = 5 * 1024 * 1024
FILENAME = "output.json"


async def within_limit(services: Services, tenant: str, output: dict[str, Any]) -> dict[str, Any]:
    """The output, or a link to where it can be read for a day. Raises StorageError.

    `download_file` bounds its own data, by the size of the file that it is.
    """
    if output.get("type") == "file_data":
        return output
    expires_s = services.limits.url_expires_s
    data = to_json(await signed(services.store, output, expires_s=expires_s))
    if len(data) <= OUTPUT_BYTES_MAX:
        return output
    key = services.keys_of(tenant).staging_file(new_upload_id(services.clock()), FILENAME)
    await services.store.put(key, data, content_type="application/json")
    stored = {
        "key": key,
        "filename": FILENAME,
        "size_bytes": len(data),
        "content_type": "application/json",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return redirect_item(stored)
