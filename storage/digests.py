"""What bytes must look like when they come back. Pure, and blocking: big inputs go to a thread."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Digest:
    """`part_md5s` (hex) are of the file's consecutive parts of `part_size_bytes`; one part for small objects."""

    size_bytes: int
    sha256: str
    md5: str
    part_md5s: tuple[str, ...]
    part_size_bytes: int

    def confirmed_by(self, etag: str) -> bool:
        """Whether an ETag proves that the server holds these bytes.

        An ETag is the MD5 of a simple upload, or "<MD5 of the parts' MD5s>-<parts>" of a multipart one; with
        server-side encryption it may be neither, so False means unknown, not different.
        """
        joined = b"".join(bytes.fromhex(part) for part in self.part_md5s)
        composite = f"{_md5(joined)}-{len(self.part_md5s)}"
        return etag.strip('"') in {self.md5, composite}


def digest_bytes(data: bytes) -> Digest:
    md5 = _md5(data)
    return Digest(len(data), hashlib.sha256(data).hexdigest(), md5, (md5,), max(1, len(data)))


def digest_file(path: Path, part_size_bytes: int) -> Digest:
    whole, sha256, parts, size_bytes = hashlib.md5(usedforsecurity=False), hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while part := file.read(part_size_bytes):
            whole.update(part)
            sha256.update(part)
            parts.append(_md5(part))
            size_bytes += len(part)
    return Digest(size_bytes, sha256.hexdigest(), whole.hexdigest(), tuple(parts), part_size_bytes)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
