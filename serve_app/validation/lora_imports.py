"""Adapters from elsewhere: a safetensors file is judged by its header before it becomes an adapter.

Only headers are read, the file's and those of its base model where that is on this machine: names, types and shapes.
Nothing is unpickled, and no tensor is loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffusion.errors import LoraInvalid, LoraMismatch, ModelNotFound, UnsupportedModel
from diffusion.layer_names import LayerNames
from diffusion.lora_header import LoraHeader, check_fit, judge
from diffusion.lora_keys import shown
from diffusion.model_layers import model_layers
from serve_app.errors import LoraFileInvalid
from storage.errors import ObjectNotFound
from storage.imported_loras import ImportedLora, LoraImport, commit_imported, read_import, staged_file
from storage.keys import Keys
from storage.objects import ObjectStore

logger = logging.getLogger(__name__)

TENSORS_MAX = 20_000
RANK_MAX = 1024
DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class FileFacts:
    """`format`: kohya where names have underscores for dots, else diffusers. `rank` is the largest of the layers'."""

    format: str
    rank: int
    warnings: tuple[str, ...] = ()


def read_header(path: Path, model: Mapping[str, LayerNames] | None = None) -> FileFacts:
    """`model`: the base model's layers by component, where they are known. Raises LoraFileInvalid."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {part.get_dtype() for part in slices.values()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, UnicodeDecodeError):
        raise LoraFileInvalid("it is not a safetensors file") from None
    if not 1 <= len(shapes) <= TENSORS_MAX:
        raise LoraFileInvalid(f"it must hold between 1 and {TENSORS_MAX} tensors")
    if not dtypes <= DTYPES:
        raise LoraFileInvalid("its tensors are not floating-point numbers")
    try:
        header = judge(shapes, metadata)
        if model is not None:
            check_fit(header, model)
    except LoraMismatch as error:
        raise LoraFileInvalid(f"it does not fit its base model: {error.reason}") from None
    except LoraInvalid as error:
        raise LoraFileInvalid(error.reason) from None
    if not 1 <= header.rank <= RANK_MAX:
        raise LoraFileInvalid(f"a layer's rank is not between 1 and {RANK_MAX}")
    return FileFacts("kohya" if header.has_underscores else "diffusers", header.rank, _warnings(header))


def _warnings(header: LoraHeader) -> tuple[str, ...]:
    if header.without_alpha is None:
        return ()
    warning = (
        f"The file does not tell the alpha of its layers ({shown(header.without_alpha)}, for one), so it is taken to "
        "be their rank. If the adapter_config.json that it came with has another lora_alpha, use the adapter with a "
        "scale of lora_alpha / r."
    )
    return (warning,)


class LoraImports:
    """Turns staged uploads into adapters. `models`: the folders of the models that are served, by alias."""

    def __init__(self, store: ObjectStore, keys_of: Callable[[str], Keys], models: Mapping[str, str]) -> None:
        self._store = store
        self._keys_of = keys_of
        self._models = dict(models)

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
            facts = await asyncio.to_thread(self._facts, path, asked)
            lora = ImportedLora(
                id=asked.id,
                name=asked.name,
                filename=asked.filename,
                key=keys.imported_lora_file(asked.id, asked.filename),
                size_bytes=asked.size_bytes,
                sha256=sha256,
                format=facts.format,
                rank=facts.rank,
                base_model=asked.base_model,
                trigger_word=asked.trigger_word,
                created_at=asked.created_at,
                warnings=facts.warnings,
            )
            await commit_imported(self._store, keys, asked, lora, path)
        return lora

    def _facts(self, path: Path, asked: LoraImport) -> FileFacts:
        """Raises LoraFileInvalid."""
        facts = read_header(path, self._base_model(asked.base_model))
        for warning in facts.warnings:
            logger.warning("imported adapter %s: %s", asked.id, warning)
        return facts

    def _base_model(self, name: str | None) -> dict[str, LayerNames] | None:
        """None where the file names no model that this machine has: it is found out when a picture is asked for."""
        if name not in self._models:
            return None
        try:
            return model_layers(Path(self._models[name]).expanduser())
        except (ModelNotFound, UnsupportedModel) as error:
            logger.info("model %s is not at hand to check an adapter against: %s", name, error.code)
            return None

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
