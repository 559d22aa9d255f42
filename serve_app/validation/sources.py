"""The bytes of a file as requests name them: base64, a data URL, an https URL."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from serve_app.errors import AddressRefused, OutboundFailed
from serve_app.outbound import TOO_LARGE, Outbound
from serve_app.validation.file_checks import FILE_BYTES_MAX, MIB, FileProblem

FETCH_TIMEOUT_S = 120.0
OVER_SIZE = f"is over {FILE_BYTES_MAX // MIB} MB"

_DATA_URL = re.compile(r"\Adata:[a-zA-Z0-9.+/-]{0,100};base64,")
_SPACE = re.compile(r"\s+")


def decoded_content(content: str) -> bytes:
    """Base64, as such or in a data URL, line breaks allowed. Raises FileProblem."""
    text = _SPACE.sub("", _DATA_URL.sub("", content))
    if len(text) * 3 // 4 > FILE_BYTES_MAX + 2:
        raise FileProblem("content", OVER_SIZE, "too_large")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise FileProblem("content", "is not valid base64", "invalid_value") from None


class OverTotal(Exception):
    """The files of one request are more than they may be together."""


class Total:
    """The bytes of all files of one request, as they arrive."""

    def __init__(self, bytes_max: int) -> None:
        self._left_bytes = bytes_max

    def count(self, size_bytes: int) -> None:
        """Raises OverTotal."""
        self._left_bytes -= size_bytes
        self.check()

    def check(self) -> None:
        """Raises OverTotal where it was passed before."""
        if self._left_bytes < 0:
            raise OverTotal


async def fetch_file(outbound: Outbound, url: str, path: Path, total: Total | None = None) -> None:
    """The file at `url`, complete where this returns. Raises FileProblem, and OverTotal where `total` is passed."""
    try:
        await outbound.fetch(url, path, bytes_max=FILE_BYTES_MAX, count=None if total is None else total.count)
    except AddressRefused:
        raise FileProblem("url", "must be an https URL that leads to a public address", "invalid_value") from None
    except OutboundFailed as failed:
        too_large = failed.reason == TOO_LARGE
        reason = OVER_SIZE if too_large else "could not be fetched"
        raise FileProblem("url", reason, "too_large" if too_large else "unavailable") from None
