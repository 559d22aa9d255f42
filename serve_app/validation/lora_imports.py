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
# What belongs to a layer beside its pair, and the factors that the engine expands into one.
_BESIDE = re.compile(r"\.(alpha|dora_scale|lora_magnitude_vector(\.[A-Za-z0-9_]+)?(\.weight)?)$")
_FACTOR = re.compile(r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?)$")
_FACTOR_DOWN = re.compile(r"\.(hada_w1_b|lokr_w[12]_b)$")
_OTHER_KINDS = ("lora_mid", "hada_t", "lokr_t", "oft_", "boft_", "glora_", "lora_embedding_")


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
    if any(mark in name for name in names for mark in _OTHER_KINDS):
        raise LoraFileInvalid("it is of a kind that is not taken: LoRA, DoRA, LoHa and LoKr are")
    ranks, downs, ups, factors = [], 0, 0, 0
    for name, (shape, dtype) in shapes.items():
        if dtype not in DTYPES:
            raise LoraFileInvalid("its tensors are not floating-point numbers")
        is_down, is_up, is_factor = _DOWN.search(name), _UP.search(name), _FACTOR.search(name)
        downs, ups, factors = downs + bool(is_down), ups + bool(is_up), factors + bool(is_factor)
        if is_down or _FACTOR_DOWN.search(name):
            ranks.append(shape[0] if shape else 0)
        elif not (is_up or is_factor or _BESIDE.search(name)):
            raise LoraFileInvalid("it holds tensors that belong to no LoRA layer")
    if downs != ups or downs + factors == 0:
        raise LoraFileInvalid("its layers are not pairs of down and up weights")
    if not all(1 <= rank <= RANK_MAX for rank in ranks):
        raise LoraFileInvalid(f"a layer's rank is not between 1 and {RANK_MAX}")
    kohya = any(name.startswith(("lora_unet_", "lora_te")) for name in names)
    return LoraHeader("kohya" if kohya else "diffusers", max(ranks, default=1))


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
            await commit_imported(self._store, keys, asked, lora, path)
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
        if path.stat().st_size != asked.size_bytes:  # noqa: ASYNC240 a look at one local file
            raise LoraFileInvalid("it changed while it was checked")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
