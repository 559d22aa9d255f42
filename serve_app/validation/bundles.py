"""Many stored files as one zip. Built on disk a file at a time, so that memory holds none of them whole."""

from __future__ import annotations

import asyncio
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.collaborators import Clock
from storage.datasets import new_upload_id
from storage.keys import Keys
from storage.objects import ObjectStore

BUNDLE_BYTES_MAX = 8 * 1024**3
BUNDLE_NAME = "raylora.zip"


class Bundles:
    """Zips lie among the staged files, and go with them after a day."""

    def __init__(self, store: ObjectStore, keys_of: Callable[[str], Keys], clock: Clock) -> None:
        self._store = store
        self._keys_of = keys_of
        self._clock = clock

    async def make(self, tenant: str, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """`files` have key, process_id, filename, and sha256 where it was recorded. Returns the zip's key, filename and
        size_bytes.

        None where the files are more than BUNDLE_BYTES_MAX. Raises StorageError, of which IntegrityError for a file
        whose bytes are not those that were recorded.
        """
        sizes = [file.get("size_bytes") or (await self._store.head(file["key"])).size_bytes for file in files]
        if sum(sizes) > BUNDLE_BYTES_MAX:
            return None
        key = self._keys_of(tenant).staging_file(new_upload_id(self._clock()), BUNDLE_NAME)
        with tempfile.TemporaryDirectory(prefix="raylora-bundle-") as name:
            folder = Path(name)
            path = folder / BUNDLE_NAME
            await self._write(files, path, folder / "one")
            info = await self._store.upload_file(path, key, content_type="application/zip")
        return {"key": key, "filename": BUNDLE_NAME, "size_bytes": info.size_bytes}

    async def _write(self, files: Sequence[dict[str, Any]], path: Path, scratch: Path) -> None:
        # Adapters and pictures are compressed already or do not compress.
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file in files:
                await self._store.download_file(file["key"], scratch, expected_sha256=file.get("sha256"))
                await asyncio.to_thread(archive.write, scratch, f"{file['process_id']}/{file['filename']}")
                await asyncio.to_thread(scratch.unlink)
