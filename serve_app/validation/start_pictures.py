"""The pictures that a generation starts from: brought, checked like an upload's, and stored with its process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.inference.plan import StoredPicture
from serve_app.outbound import Outbound
from serve_app.validation.file_checks import FILE_BYTES_MAX, FileProblem
from serve_app.validation.pictures import PictureFacts, decode_pictures
from serve_app.validation.sources import OVER_SIZE, decoded_content, fetch_file
from storage.errors import ObjectNotFound
from storage.keys import Keys
from storage.objects import ObjectStore
from train_jobs.errors import Problem

URL_STARTS = ("https://", "http://")
BUCKET_START = "s3://"


@dataclass(frozen=True)
class CheckedPicture:
    path: Path
    facts: PictureFacts


def is_inline(text: str, keys: Keys) -> bool:
    """Whether the request itself holds the picture, instead of telling where it lies."""
    return not _is_url(text) and not _is_key(text, keys)


class StartPictures:
    """Each picture is named by a text: base64, a data URL, an https URL, or the key of one of the tenant's objects,
    bare or as `s3://<bucket>/<key>`.
    """

    def __init__(self, store: ObjectStore, keys_of: Callable[[str], Keys], bucket: str, outbound: Outbound) -> None:
        self._store = store
        self._keys_of = keys_of
        self._bucket = bucket
        self._outbound = outbound

    async def check(
        self, tenant: str, named: Mapping[str, str], folder: Path
    ) -> tuple[dict[str, CheckedPicture], list[Problem]]:
        """`named`: the field to the text in it. The problems name the fields. Raises StorageError."""
        problems: dict[str, Problem] = {}
        brought: dict[str, Path] = {}
        for field, text in named.items():
            path = folder / field
            try:
                await self._bring(self._keys_of(tenant), text, path)
            except FileProblem as problem:
                problems[field] = Problem(field, problem.message, problem.code)
            else:
                brought[field] = path
        facts = await asyncio.to_thread(decode_pictures, list(brought.values()))
        checked: dict[str, CheckedPicture] = {}
        for (field, path), fact in zip(brought.items(), facts, strict=True):
            if isinstance(fact, PictureFacts):
                checked[field] = CheckedPicture(path, fact)
            else:
                problems[field] = Problem(field, fact.message, fact.code)
        return checked, [problems[field] for field in named if field in problems]

    async def store(
        self, tenant: str, process_id: str, checked: Mapping[str, CheckedPicture]
    ) -> dict[str, StoredPicture]:
        """Raises StorageError."""
        keys = self._keys_of(tenant)
        stored: dict[str, StoredPicture] = {}
        for field, picture in checked.items():
            kind = picture.facts.format.lower()
            sha256 = await asyncio.to_thread(_sha256, picture.path)
            key = keys.input_picture(process_id, field, sha256, kind)
            await self._store.upload_file(picture.path, key, content_type=f"image/{kind}")
            stored[field] = StoredPicture(key=key, sha256=sha256)
        return stored

    async def _bring(self, keys: Keys, text: str, path: Path) -> None:
        """Raises FileProblem, StorageError."""
        if _is_url(text):
            await fetch_file(self._outbound, text, path)
        elif _is_key(text, keys):
            await self._download(keys, text.removeprefix(f"{BUCKET_START}{self._bucket}/"), path)
        else:
            await asyncio.to_thread(lambda: path.write_bytes(decoded_content(text)))

    async def _download(self, keys: Keys, key: str, path: Path) -> None:
        missing = FileProblem("", "there is no such file among yours", "not_found")
        if not keys.owns(key):
            raise missing
        try:
            if (await self._store.head(key)).size_bytes > FILE_BYTES_MAX:
                raise FileProblem("", OVER_SIZE, "too_large")
            await self._store.download_file(key, path)
        except ObjectNotFound:
            raise missing from None


def _is_url(text: str) -> bool:
    return text[:8].lower().startswith(URL_STARTS)


def _is_key(text: str, keys: Keys) -> bool:
    """Another tenant's key is one too, so that it is refused as such. No picture's base64 begins like that."""
    return text.startswith((BUCKET_START, keys.tenant_prefix.removesuffix(f"{keys.tenant}/")))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
