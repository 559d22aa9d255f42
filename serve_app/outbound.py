"""Requests of this server to addresses that clients named: to public ones, unless the settings allow any.

The name is resolved once, and the connection goes to the very address that was looked at, so that a name whose answer
changes between two look-ups leads nowhere else. Redirects are not followed, and no proxy of the environment is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from serve_app.errors import AddressRefused, OutboundFailed

URL_LENGTH_MAX = 2048
TOO_LARGE = "too large"

# What a name server can be asked for (RFC 1035, 2.3.4); underscores are common in names of machines.
_NAME = re.compile(r"(?!.{255})[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")

Resolve = Callable[[str, int], Awaitable[list[str]]]

# Not public, although `is_global` is true of some. All but the last carry an IPv4 address inside, which a gateway or
# this machine itself would connect to in this one's place.
_INSIDE = tuple(
    ipaddress.ip_network(network)
    for network in (
        "64:ff9b::/96",  # translated, RFC 6052
        "64:ff9b:1::/48",  # translated by a network of one's own, RFC 8215
        "2002::/16",  # 6to4, RFC 3056
        "::/96",  # IPv4-compatible, RFC 4291, 2.5.5.1
        "::ffff:0:0:0/96",  # IPv4-translated, RFC 2765
        "fec0::/10",  # site-local, RFC 3879
    )
)


def url_problem(url: str, *, any_address: bool) -> str | None:
    """Why an address cannot be sent to, as far as it can be told from its text alone."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        return "is not a URL"
    if len(url) > URL_LENGTH_MAX:
        return f"is over {URL_LENGTH_MAX} characters"
    if parsed.scheme not in ({"http", "https"} if any_address else {"https"}):
        return "must be an https URL"
    # Not `host`, which is decoded: that fails for some names, and of others it is not the name that was sent.
    host = parsed.raw_host.decode("ascii")
    is_address = _is_address(host)
    if parsed.userinfo or not (is_address or _NAME.fullmatch(host)):
        return "must name a host (letters, digits, - and _, at most 63 of them between dots), and no user"
    if not any_address and is_address and not is_public(host):
        return "must lead to a public address"
    return None


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if any(parsed in network for network in _INSIDE):
            return False
    return parsed.is_global and not parsed.is_multicast


async def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a name, the preferred one first. Raises OSError, UnicodeError (a name that cannot be one)."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


class Outbound:
    """POSTs to, and GETs from, where clients said."""

    def __init__(
        self,
        *,
        any_address: bool,
        timeout_s: float,
        resolve: Resolve = resolve_host,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._any_address = any_address
        self._timeout_s = timeout_s
        self._resolve = resolve
        # A connection is made for one request: another one's address has to be looked at again.
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            timeout=timeout_s,
            limits=httpx.Limits(max_keepalive_connections=0),
            transport=transport,
        )

    async def post(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Delivered where the answer is a 2xx; its body is not read. Raises AddressRefused, OutboundFailed."""
        async with self._exchange("POST", url, content=content, headers=headers):
            pass

    async def fetch(self, url: str, path: Path, *, bytes_max: int, count: Callable[[int], None] | None = None) -> None:
        """The answer's body as a file, complete where this returns. Raises AddressRefused, OutboundFailed.

        `count` gets the size of each piece before it is written, and may end the fetch by raising.
        """
        async with self._exchange("GET", url, content=b"", headers={"Accept-Encoding": "identity"}) as response:
            seen_bytes = 0
            with path.open("wb") as file:
                async for chunk in response.aiter_raw():
                    seen_bytes += len(chunk)
                    if seen_bytes > bytes_max:
                        raise OutboundFailed(TOO_LARGE)
                    if count is not None:
                        count(len(chunk))
                    file.write(chunk)

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _exchange(
        self, method: str, url: str, *, content: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """A 2xx answer whose body was not read yet; the block is part of what is bounded in time."""
        if url_problem(url, any_address=self._any_address) is not None:
            raise AddressRefused
        try:
            async with asyncio.timeout(self._timeout_s):
                request = await self._request(method, httpx.URL(url), content, headers)
                response = await self._client.send(request, stream=True)
                try:
                    if not response.is_success:
                        raise OutboundFailed(f"status {response.status_code}")
                    yield response
                finally:
                    await response.aclose()
        except TimeoutError:
            raise OutboundFailed("timeout") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise OutboundFailed(type(error).__name__) from None

    async def _request(self, method: str, url: httpx.URL, content: bytes, headers: Mapping[str, str]) -> httpx.Request:
        address = await self._address(url)
        extensions: dict[str, Any] = {"sni_hostname": url.raw_host.decode("ascii")}
        return self._client.build_request(
            method,
            url.copy_with(host=address),
            content=content,
            headers={**headers, "Host": url.netloc.decode("ascii")},
            extensions=extensions,
        )

    async def _address(self, url: httpx.URL) -> str:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            found = await self._resolve(url.raw_host.decode("ascii"), port)
        except (OSError, UnicodeError):
            raise OutboundFailed("name") from None
        if not found:
            raise OutboundFailed("name")
        # One private answer among public ones is what an attacker's name server gives.
        if not self._any_address and not all(is_public(address) for address in found):
            raise AddressRefused
        return found[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
