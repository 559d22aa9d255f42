"""Stored files as clients see them: a reference, and a link where there is to be a URL."""

from __future__ import annotations

from typing import Any

from serve_app.links import Link


def redirect_item(stored: dict[str, Any]) -> dict[str, Any]:
    """One file of an output as `{"type": "redirect", "url", ...}`. `stored` has key, filename, size_bytes, ...

    Its other fields, such as seed and prompt, stay as they are.
    """
    filename = _filename(stored)
    rest = {name: value for name, value in stored.items() if name not in {"key", "filename", "size_bytes"}}
    return {
        "type": "redirect",
        "url": Link(stored["key"], filename=filename),
        "filename": filename,
        "size": stored.get("size_bytes"),
        "s3_key": stored["key"],
        **rest,
    }


def url_item(stored: dict[str, Any]) -> dict[str, Any]:
    """One file as `{"type": "url", "url", "filename", "size"}`."""
    filename = _filename(stored)
    url = Link(stored["key"], filename=filename)
    return {"type": "url", "url": url, "filename": filename, "size": stored.get("size_bytes")}


def latest_lora(output: dict[str, Any] | None) -> dict[str, Any] | None:
    """The adapter of a completed training's output that is furthest trained, None where it has none."""
    loras = [item for item in (output or {}).get("loras", []) if item.get("key")]
    return max(loras, key=lambda item: item.get("step") or 0, default=None)


def _filename(stored: dict[str, Any]) -> str:
    return str(stored.get("filename") or str(stored["key"]).rsplit("/", 1)[-1])
