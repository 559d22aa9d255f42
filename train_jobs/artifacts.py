"""What a training reads from and writes to the object store."""

from __future__ import annotations

import hashlib
import logging
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.datasets import DatasetManifest, DatasetNotFound, latest_manifest
from storage.errors import ObjectNotFound
from storage.keys import Keys
from storage.objects import ObjectStore
from train_jobs import checkpoint
from train_jobs.checkpoint_state import STATE
from train_jobs.errors import ConfigInvalid, Problem
from train_jobs.kept import Kept, Runner
from train_jobs.spec import DatasetSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSample:
    """A preview in the object store: the picture of the prompt at `index`, made after `step` updates."""

    step: int
    index: int
    key: str


class Artifacts:
    """One training's objects. Every method blocks and raises StorageError.

    `scratch` is a folder on this node, which the node's storage actor reads and writes too. `continues` is the training
    whose checkpoints count where this one has none of its own.
    """

    def __init__(
        self,
        store: ObjectStore,
        runner: Runner,
        keys: Keys,
        process_id: str,
        scratch: Path,
        *,
        continues: str | None = None,
    ) -> None:
        self._store = store
        self._runner = runner
        self._keys = keys
        self._process_id = process_id
        self._scratch = scratch
        self._continues = continues

    def dataset(self, spec: DatasetSpec, index: int, pinned_upload: str | None) -> tuple[Path, DatasetManifest]:
        """Download a dataset into a folder of its own, each file verified by its sha256.

        `pinned_upload` is the upload that a continued training began with; when it is gone, the newest is used.
        Raises DatasetNotFound.
        """
        manifest = self._manifest(spec, pinned_upload)
        folder = self._scratch / f"dataset-{index}"
        folder.mkdir(parents=True)
        for file in manifest.files:
            target = folder / file.filename
            self._runner.run_blocking(self._store.download_file(file.key, target, expected_sha256=file.sha256))
        return folder, manifest

    def _manifest(self, spec: DatasetSpec, pinned_upload: str | None) -> DatasetManifest:
        name = spec.dataset or ""
        upload = spec.upload_id or pinned_upload
        try:
            return self._runner.run_blocking(latest_manifest(self._store, self._keys, name, upload_id=upload))
        except DatasetNotFound:
            if spec.upload_id is not None or pinned_upload is None:
                raise
            logger.warning("the upload this training began with is gone; its dataset's newest upload is used")
            return self._runner.run_blocking(latest_manifest(self._store, self._keys, name))

    def newest_checkpoint(self) -> Path | None:
        """Where to go on from, in a folder.

        Raises CheckpointInvalid, and ConfigInvalid where the training that this one continues has none.
        """
        own = self.checkpoint_steps()
        if own or self._continues is None:
            return self.fetch_checkpoint(own[-1]) if own else None
        steps = self._steps_of(self._continues)
        if not steps:
            raise ConfigInvalid([Problem("continues", "is not a training of yours with a checkpoint", "not_found")])
        return self.fetch_checkpoint(steps[-1])

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints of its own, ascending: those whose last file is there."""
        return self._steps_of(self._process_id)

    def _steps_of(self, process_id: str) -> list[int]:
        prefix = self._keys.checkpoints_prefix(process_id)
        names: dict[int, set[str]] = {}
        for info in self._runner.run_blocking(self._store.list(prefix)):
            step, _, name = info.key.removeprefix(prefix).partition("/")
            if step.isdigit():
                names.setdefault(int(step), set()).add(name)
        return sorted(step for step, found in names.items() if found >= set(checkpoint.FILES))

    def fetch_checkpoint(self, step: int) -> Path:
        """Download one into a folder, the weights verified; one that is not its own is the continued training's.

        Raises CheckpointInvalid for a damaged state.
        """
        holder = self._process_id
        if self._continues is not None and step not in self.checkpoint_steps():
            holder = self._continues
        folder = self._scratch / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        expected: dict[str, str] = {}
        for name in reversed(checkpoint.FILES):
            key = self._keys.checkpoint_file(holder, step, name)
            digest = expected.get(name)
            self._runner.run_blocking(self._store.download_file(key, folder / name, expected_sha256=digest))
            if name == STATE:
                expected = checkpoint.digests(folder)
        return folder

    def store_checkpoint(self, step: int, paths: Sequence[Path], *, keep: int, best: int | None = None) -> None:
        """Upload one, its last file last, then delete all but the newest `keep` and the `best`."""
        for path in paths:
            key = self._keys.checkpoint_file(self._process_id, step, path.name)
            self._runner.run_blocking(self._store.upload_file(path, key))
        for old in checkpoint.steps_to_prune(self.checkpoint_steps(), keep=keep, best=best):
            # Last file first: a checkpoint is whole or not listed.
            for name in reversed(checkpoint.FILES):
                self._runner.run_blocking(self._store.delete(self._keys.checkpoint_file(self._process_id, old, name)))

    def checkpoints(self, *, best: int | None = None) -> list[dict[str, Any]]:
        """For the job's output: each kept checkpoint's step and keys; the best one is marked."""
        return [
            {
                "step": step,
                **({"is_best": True} if step == best else {}),
                "keys": [self._keys.checkpoint_file(self._process_id, step, name) for name in checkpoint.FILES],
            }
            for step in self.checkpoint_steps()
        ]

    def store_sample(self, step: int, index: int, extension: str, data: bytes, content_type: str) -> str:
        """Store a preview. Returns its key."""
        key = self._keys.sample_image(self._process_id, step, index, extension)
        self._runner.run_blocking(self._store.put(key, data, content_type=content_type))
        return key

    def samples(self) -> list[StoredSample]:
        """The previews that are stored, in the order of steps and prompts."""
        prefix = self._keys.samples_prefix(self._process_id)
        found: list[StoredSample] = []
        for info in self._runner.run_blocking(self._store.list(prefix)):
            step, _, index = Path(info.key.removeprefix(prefix)).stem.partition("_")
            if step.isdigit() and index.isdigit():
                found.append(StoredSample(int(step), int(index), info.key))
        return sorted(found, key=lambda sample: (sample.step, sample.index))

    def read_sample(self, key: str) -> bytes:
        """Raises ObjectNotFound."""
        return self._runner.run_blocking(self._store.get(key))

    def store_lora(self, path: Path, *, step: int) -> dict[str, Any]:
        """Store the finished adapter. Returns its entry of the job's output."""
        key = self._keys.lora_file(self._process_id, path.name)
        info = self._runner.run_blocking(self._store.upload_file(path, key))
        with path.open("rb") as file:
            sha256 = info.sha256 or hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "id": self._process_id,
            "key": key,
            "filename": path.name,
            "sha256": sha256,
            "size_bytes": info.size_bytes,
            "step": step,
            "format": "diffusers",
        }

    def fetch_lora(self, key: str, *, expected_sha256: str | None) -> Path:
        """Download an adapter that this tenant may read, to begin from.

        `expected_sha256` (hex) is what was recorded of it, None where nothing was. Raises ConfigInvalid for another's
        or a missing key, IntegrityError for other bytes.
        """
        problem = Problem("network.pretrained", "is not a .safetensors file of yours", "not_found")
        if not self._keys.may_read(key) or not key.endswith(".safetensors"):
            raise ConfigInvalid([problem])
        target = self._scratch / "pretrained.safetensors"
        try:
            self._runner.run_blocking(self._store.download_file(key, target, expected_sha256=expected_sha256))
        except ObjectNotFound:
            raise ConfigInvalid([problem]) from None
        return target

    def kept(self, folder: str | None) -> Kept:
        """What its owner's trainings share, with copies in a folder on this node."""
        return Kept(self._store, self._runner, self._keys, None if folder is None else Path(folder))

    def store_log(self, name: str, data: bytes) -> str:
        """Store a log file. Returns its key."""
        key = self._keys.training_log(self._process_id, name)
        kind = mimetypes.guess_type(name)[0]
        self._runner.run_blocking(self._store.put(key, data, content_type=kind))
        return key


def pinned_uploads(facts: Mapping[str, Any]) -> dict[str, str]:
    """The dataset uploads noted in a checkpoint, by dataset name."""
    found = facts.get("uploads")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
