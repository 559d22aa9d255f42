"""Stored files as clients see them: a reference and a presigned URL, made at read time and never logged."""

from __future__ import annotations

from typing import Any

from storage.objects import ObjectStore


async def redirect_item(store: ObjectStore, stored: dict[str, Any], *, expires_s: int) -> dict[str, Any]:
    """One file of a record's output as `{"type": "redirect", "url", ...}`. `stored` has key, filename, size_bytes, ...

    Its other fields, such as seed and prompt, stay as they are. Raises StorageError.
    """
    filename = str(stored.get("filename") or str(stored["key"]).rsplit("/", 1)[-1])
    rest = {name: value for name, value in stored.items() if name not in {"key", "filename", "size_bytes"}}
    return {
        "type": "redirect",
        "url": await store.presign_get(stored["key"], expires_s=expires_s, filename=filename),
        "filename": filename,
        "size": stored.get("size_bytes"),
        "s3_key": stored["key"],
        **rest,
    }


async def url_item(store: ObjectStore, stored: dict[str, Any], *, expires_s: int) -> dict[str, Any]:
    """One file as `{"type": "url", "url", "filename", "size"}`. Raises StorageError."""
    filename = str(stored.get("filename") or str(stored["key"]).rsplit("/", 1)[-1])
    url = await store.presign_get(stored["key"], expires_s=expires_s, filename=filename)
    return {"type": "url", "url": url, "filename": filename, "size": stored.get("size_bytes")}


def latest_lora(output: dict[str, Any] | None) -> dict[str, Any] | None:
    """The adapter of a completed training's output that is furthest trained, None where it has none."""
    loras = [item for item in (output or {}).get("loras", []) if item.get("key")]
    return max(loras, key=lambda item: item.get("step") or 0, default=None)
