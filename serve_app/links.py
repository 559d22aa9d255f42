"""Presigned URLs that are still to be made: an output holds a `Link` wherever clients see a URL.

They are made for whoever reads the output, each time, and never kept. Apart from its output, a link can be written down
with the place where it belongs; so nothing that a client sent, and an output repeats, is ever taken for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from storage.bounded import run_bounded
from storage.objects import ObjectStore

SIGNED_AT_ONCE = 16


@dataclass(frozen=True)
class Link:
    """A URL for one object. A GET is saved as `filename`; a PUT must bring `content_type`."""

    key: str
    method: Literal["GET", "PUT"] = "GET"
    filename: str | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class PlacedLink:
    """`path` leads from the output's outermost value through names and indices to where the URL belongs."""

    path: tuple[str | int, ...]
    link: Link


PLACED_LINKS = TypeAdapter(tuple[PlacedLink, ...])


async def signed(store: ObjectStore, output: dict[str, Any], *, expires_s: int) -> dict[str, Any]:
    """The output with a URL in the place of each link. Raises StorageError."""
    plain, placed = taken_out(output)
    if not placed:
        return output
    links = list(dict.fromkeys(one.link for one in placed))
    urls = await run_bounded((_url(store, link, expires_s) for link in links), SIGNED_AT_ONCE)
    url_of = dict(zip(links, urls, strict=True))
    for one in placed:
        _put(plain, one.path, url_of[one.link])
    return plain


async def _url(store: ObjectStore, link: Link, expires_s: int) -> str:
    if link.method == "PUT":
        return await store.presign_put(link.key, expires_s=expires_s, content_type=link.content_type)
    return await store.presign_get(link.key, expires_s=expires_s, filename=link.filename)


def taken_out(output: dict[str, Any]) -> tuple[dict[str, Any], tuple[PlacedLink, ...]]:
    """The output as plain JSON, null in the place of each link, and the links. Copied only where it holds any."""
    placed: list[PlacedLink] = []
    _find_links(output, [], placed)
    if not placed:
        return output, ()
    plain: dict[str, Any] = _plain(output)
    return plain, tuple(placed)


def put_back(plain: dict[str, Any], placed: Sequence[PlacedLink]) -> None:
    """Into an output, in place. Raises LookupError or TypeError for a path that does not lead into it."""
    for one in placed:
        _put(plain, one.path, one.link)


def _find_links(within: dict[str, Any] | list[Any], path: list[str | int], found: list[PlacedLink]) -> None:
    """Walks the containers alone: a listing has tens of thousands of values, on the event loop."""
    for step, inner in within.items() if isinstance(within, dict) else enumerate(within):
        if isinstance(inner, Link):
            found.append(PlacedLink((*path, step), inner))
        elif isinstance(inner, (dict, list)):
            path.append(step)
            _find_links(inner, path, found)
            path.pop()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, Link) else value


def _put(value: Any, path: tuple[str | int, ...], leaf: str | Link) -> None:
    *way, last = path
    for step in way:
        value = value[step]
    value[last] = leaf
