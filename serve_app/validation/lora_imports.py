"""Adapters from elsewhere: the header of a safetensors file is checked before the file becomes an adapter.

Only the header is read: names, types and shapes. Nothing is unpickled, and no tensor is loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from serve_app.errors import LoraFileInvalid
from storage.errors import ObjectNotFound
from storage.imported_loras import ImportedLora, LoraImport, commit_imported, read_import, staged_file
from storage.keys import Keys
from storage.objects import ObjectStore

TENSORS_MAX = 20_000
RANK_MAX = 1024
DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_DOWN = re.compile(r"\.(lora_A|lora_down|lora\.down)(\.[A-Za-z0-9_]+)?\.weight$")
_UP = re.compile(r"\.(lora_B|lora_up|lora\.up)(\.[A-Za-z0-9_]+)?\.weight$")
_ALPHA = re.compile(r"\.alpha$")
_OTHER_KINDS = (("dora_scale", "DoRA"), ("lora_magnitude_vector", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr"))


@dataclass(frozen=True)
class LoraHeader:
    """`format`: kohya or diffusers, by the names of the tensors. `rank` is the largest of the layers'."""

    format: str
    rank: int


def read_header(path: Path) -> LoraHeader:
    """Raises LoraFileInvalid."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            shapes = {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in names}
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError):
        raise LoraFileInvalid("it is not a safetensors file") from None
    if not names or len(names) > TENSORS_MAX:
        raise LoraFileInvalid(f"it must hold between 1 and {TENSORS_MAX} tensors")
    for mark, kind in _OTHER_KINDS:
        if any(mark in name for name in names):
            raise LoraFileInvalid(f"it is a {kind}, and only LoRA is taken")
    ranks = []
    for name, (shape, dtype) in shapes.items():
        if dtype not in DTYPES:
            raise LoraFileInvalid("its tensors are not floating-point numbers")
        if _DOWN.search(name):
            ranks.append(shape[0] if shape else 0)
        elif not (_UP.search(name) or _ALPHA.search(name)):
            raise LoraFileInvalid("it holds tensors that belong to no LoRA layer")
    ups = sum(1 for name in names if _UP.search(name))
    if not ranks or len(ranks) != ups:
        raise LoraFileInvalid("its layers are not pairs of down and up weights")
    if not all(1 <= rank <= RANK_MAX for rank in ranks):
        raise LoraFileInvalid(f"a layer's rank is not between 1 and {RANK_MAX}")
    kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in names)
    return LoraHeader("kohya" if kohya else "diffusers", max(ranks))


class LoraImports:
    """Turns staged uploads into adapters."""

    def __init__(self, store: ObjectStore, keys_of: Callable[[str], Keys]) -> None:
        self._store = store
        self._keys_of = keys_of

    async def finish(self, tenant: str, lora_id: str) -> ImportedLora:
        """Verify the staged file and commit it. Raises ImportedLoraNotFound, LoraFileInvalid, StorageError.

        What was refused stays in staging, so that the file can be sent again to the same URL.
        """
        keys = self._keys_of(tenant)
        asked = await read_import(self._store, keys, lora_id)
        with tempfile.TemporaryDirectory(prefix="raylora-lora-") as folder:
            path = Path(folder) / "adapter.safetensors"
            await self._fetch(keys, asked, path)
            sha256 = await asyncio.to_thread(_sha256_of, path)
            if asked.sha256 not in (None, sha256):
                raise LoraFileInvalid("its sha256 is not the one that was promised")
            header = await asyncio.to_thread(read_header, path)
        lora = ImportedLora(
            id=asked.id,
            name=asked.name,
            filename=asked.filename,
            key=keys.imported_lora_file(asked.id, asked.filename),
            size_bytes=asked.size_bytes,
            sha256=sha256,
            format=header.format,
            rank=header.rank,
            base_model=asked.base_model,
            trigger_word=asked.trigger_word,
            created_at=asked.created_at,
        )
        await commit_imported(self._store, keys, asked, lora)
        return lora

    async def _fetch(self, keys: Keys, asked: LoraImport, path: Path) -> None:
        key = staged_file(keys, asked)
        try:
            info = await self._store.head(key)
            if info.size_bytes != asked.size_bytes:
                raise LoraFileInvalid("it does not have the size that was promised")
            await self._store.download_file(key, path)
        except ObjectNotFound:
            raise LoraFileInvalid("it was not uploaded yet") from None


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
