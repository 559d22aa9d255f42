"""What bytes must look like when they come back. Pure, and blocking: big inputs go to a thread."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

_HASH = re.compile(r'"?[0-9a-f]{32}(-[0-9]+)?"?')


@dataclass(frozen=True)
class Digest:
    """`part_md5s` (hex) are of the file's consecutive parts of `part_size_bytes`; one part for small objects."""

    size_bytes: int
    sha256: str
    part_md5s: tuple[str, ...]
    part_size_bytes: int

    def confirmed_by(self, etag: str) -> bool:
        """Whether an ETag proves that the server holds these bytes.

        An ETag is the MD5 of a simple upload, or "<MD5 of the parts' MD5s>-<parts>" of a multipart one; with
        server-side encryption it may be neither, so False means unknown, not different.
        """
        joined = b"".join(bytes.fromhex(part) for part in self.part_md5s)
        composite = f"{md5_of(joined)}-{len(self.part_md5s)}"
        whole = self.part_md5s if len(self.part_md5s) == 1 else ()
        return etag.strip('"') in {composite, *whole}


class Crc32:
    """Takes bytes as `hashlib`'s hashes do."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def base64(self) -> str:
        """Of its four bytes, the first one first, as S3 takes it."""
        return base64.b64encode(self._value.to_bytes(4, "big")).decode()


def is_hash(etag: str) -> bool:
    """Whether an ETag is made of the object's bytes, as far as its look tells; some servers send an empty one."""
    return _HASH.fullmatch(etag) is not None


def digest_of(data: bytes | memoryview, sha256: str, md5: str) -> Digest:
    """Of an object that is sent as a whole, from its hashes in hex."""
    return Digest(len(data), sha256, (md5,), max(1, len(data)))


def sha256_of(data: bytes | memoryview) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def md5_of(data: bytes | memoryview) -> str:
    """In hex: what servers make their ETags of."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
