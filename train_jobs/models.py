"""From a base model's name to a folder on this machine."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from train_jobs.errors import ModelNotAvailable
from train_jobs.spec import MODEL_ID_PATTERN

logger = logging.getLogger(__name__)

MODEL_FILES = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
WEIGHT_FILES = "*/*.safetensors"
VARIANT_FILES = ["*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*"]


def resolve_model(
    name: str, models: Mapping[str, str], *, paths_allowed: bool, files: Sequence[str] = MODEL_FILES
) -> Path:
    """The folder of an alias in `models`, of a Hugging Face id (downloaded or cached), or of a local path.

    A path is used only where `paths_allowed`: for a config from this machine's command line. Only `files`
    are downloaded, and weights only as safetensors. Raises ModelNotAvailable.
    """
    if name in models:
        return _folder(name, Path(models[name]), files)
    if paths_allowed and Path(name).is_dir():
        return Path(name).resolve()
    if not re.fullmatch(MODEL_ID_PATTERN, name):
        raise ModelNotAvailable(name)
    return _download(name, files)


def weights_sha256(folder: Path, digest_of: Callable[[Path], str]) -> str:
    """What a base model is known by, in hex: the SHA-256 of a list of its weights' SHA-256.

    A line for each of the folder's `WEIGHT_FILES`, by path, without other variants and the safety checker
    (`VARIANT_FILES`), as coreutils write it, so that in the folder of a model without those it is what
    `LC_ALL=C sh -c 'sha256sum */*.safetensors | sha256sum'` prints. `digest_of` gives a file's. Raises OSError.
    """
    named = {path.relative_to(folder).as_posix(): path for path in folder.glob(WEIGHT_FILES)}
    own = [name for name in sorted(named) if not any(fnmatch(name, variant) for variant in VARIANT_FILES)]
    lines = "".join(f"{digest_of(named[name])}  {name}\n" for name in own)
    return hashlib.sha256(lines.encode()).hexdigest()


def _folder(name: str, source: Path, files: Sequence[str]) -> Path:
    if source.is_dir():
        return source
    if re.fullmatch(MODEL_ID_PATTERN, str(source)):
        return _download(str(source), files)
    raise ModelNotAvailable(name, "its folder is not on this node")


def _download(name: str, files: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=VARIANT_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        logger.warning("the model %s could not be downloaded: %s", name, type(error).__name__)
        raise ModelNotAvailable(name, "it is not on this node and could not be downloaded") from error
