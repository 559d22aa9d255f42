"""`/openapi.json`, and `/docs`: the same as one HTML page without scripts or anything from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
h2 { margin-top: 2.5rem; text-transform: capitalize; }
details { border: 1px solid #ccc; border-radius: 6px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 4rem; }
code, pre { font: 14px/1.4 ui-monospace, monospace; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } pre { background: #222; } }
"""
# Nothing may run or be fetched on this page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


def reference_router(app: FastAPI) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def openapi_json() -> JSONResponse:
        return JSONResponse(app.openapi())

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    return router


def page(described: dict[str, Any]) -> str:
    """The document as HTML: operations by tag, then the schemas they name."""
    title = escape(described["info"]["title"])
    parts = [f"<h1>{title}</h1><p>{escape(described['info'].get('description', ''))}</p>"]
    parts.append('<p>Send <code>Authorization: Bearer KEY</code>. <a href="/openapi.json">OpenAPI document</a></p>')
    for tag in [item["name"] for item in described.get("tags", [])]:
        operations = "".join(_operations(described, tag))
        if operations:
            parts.append(f"<h2>{escape(tag)}</h2>{operations}")
    schemas = described["components"]["schemas"]
    parts.append("<h2>schemas</h2>" + "".join(_schema(name, schemas[name]) for name in sorted(schemas)))
    body = "".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>'


def _operations(described: dict[str, Any], tag: str) -> list[str]:
    return [
        _operation(path, method, operation)
        for path, operations in described["paths"].items()
        for method, operation in operations.items()
        if tag in operation.get("tags", [])
    ]


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    summary = f"<b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation.get('summary', ''))}"
    text = escape(operation.get("description", ""))
    rows = "".join(_parameter(parameter) for parameter in operation.get("parameters", []))
    replies = "".join(
        f"<tr><td>{escape(status)}</td><td>{escape(reply.get('description', ''))} {_named(reply)}</td></tr>"
        for status, reply in sorted(operation["responses"].items())
    )
    body = _named(operation["requestBody"]) if "requestBody" in operation else ""
    sections = [
        f"<p>{text}</p>" if text else "",
        f"<h4>Parameters</h4><table>{rows}</table>" if rows else "",
        f"<h4>Body</h4><p>{body}</p>" if body else "",
        f"<h4>Replies</h4><table>{replies}</table>",
    ]
    return f"<details><summary>{summary}</summary>{''.join(sections)}</details>"


def _parameter(parameter: dict[str, Any]) -> str:
    needed = "required" if parameter.get("required") else "optional"
    text = escape(parameter.get("description", ""))
    return (
        f"<tr><td><code>{escape(parameter['name'])}</code></td><td>{escape(parameter['in'])}, {needed}</td>"
        f"<td>{text}</td></tr>"
    )


def _named(part: dict[str, Any]) -> str:
    """Links to the schemas of a body or reply, with its media type."""
    found = []
    for media, content in part.get("content", {}).items():
        name = str(content.get("schema", {}).get("$ref", "")).rsplit("/", 1)[-1]
        link = f' <a href="#{escape(name)}">{escape(name)}</a>' if name else ""
        found.append(f"<code>{escape(media)}</code>{link}")
    return ", ".join(found)


def _schema(name: str, schema: dict[str, Any]) -> str:
    text = escape(json.dumps(schema, indent=2))
    return f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary><pre>{text}</pre></details>'
