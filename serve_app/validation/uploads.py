"""Training data sent inside a request: checked file by file, then stored as one dataset or not at all."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from serve_app.collaborators import Clock
from serve_app.errors import InvalidRequest
from serve_app.validation.payloads import UploadFile, UploadPayload
from serve_app.validation.validator import parse_payload, unknown_fields
from storage.datasets import DatasetManifest, DatasetNotFound, latest_manifest, write_dataset
from storage.errors import InvalidKey
from storage.keys import MANIFEST_NAME, Keys, check_filename
from storage.objects import ObjectStore
from train_jobs.errors import Problem

MIB = 1024 * 1024
FILE_BYTES_MAX = 100 * MIB
TOTAL_BYTES_MAX = 500 * MIB
IMAGE_PIXELS_MAX = 64_000_000
IMAGE_SIDE_MAX_PX = 16_384
IMAGE_TYPES = {
    "jpg": ("JPEG", "image/jpeg"),
    "jpeg": ("JPEG", "image/jpeg"),
    "png": ("PNG", "image/png"),
    "webp": ("WEBP", "image/webp"),
    "bmp": ("BMP", "image/bmp"),
    "gif": ("GIF", "image/gif"),
}
TEXT_TYPES = {"txt": "text/plain", "yaml": "application/yaml", "yml": "application/yaml", "json": "application/json"}
EXTENSIONS = (*IMAGE_TYPES, *TEXT_TYPES)

_DATA_URL = re.compile(r"\Adata:[a-zA-Z0-9.+/-]{0,100};base64,")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class CheckedFile:
    filename: str
    data: bytes
    content_type: str
    is_image: bool

    @property
    def stem(self) -> str:
        return PurePosixPath(self.filename).stem


@dataclass(frozen=True)
class CheckedUpload:
    request: UploadPayload
    files: tuple[CheckedFile, ...]
    warnings: tuple[str, ...]


class _FileProblem(Exception):
    """Why one file is refused; becomes a Problem at the file's place in the request."""

    def __init__(self, field: str, message: str, code: str) -> None:
        super().__init__(message)
        self.field, self.message, self.code = field, message, code


def check_upload(payload: dict[str, Any]) -> CheckedUpload:
    """Decode and check every file. Raises InvalidRequest with the problems of all of them. Slow: not for a loop."""
    request = parse_payload(UploadPayload, payload)
    problems: list[Problem] = []
    files: list[CheckedFile] = []
    notes: list[str] = [*unknown_fields(request)]
    names: set[str] = set()
    total_bytes = 0
    for index, item in enumerate(request.files):
        try:
            if item.filename.lower() in names:
                raise _FileProblem("filename", "another file of this upload has this name", "duplicate")
            names.add(item.filename.lower())
            checked = _check_file(item)
            total_bytes += len(checked.data)
            if total_bytes > TOTAL_BYTES_MAX:
                raise _FileProblem("content", f"the upload is over {TOTAL_BYTES_MAX // MIB} MB in all", "too_large")
        except _FileProblem as problem:
            problems.append(Problem(f"files[{index}].{problem.field}", problem.message, problem.code))
            continue
        files.append(checked)
    if not problems and not any(file.is_image for file in files):
        problems.append(Problem("files", "at least one image is needed", "missing"))
    if problems:
        raise InvalidRequest(problems)
    return CheckedUpload(request, tuple(files), (*notes, *_caption_notes(files)))


def _check_file(item: UploadFile) -> CheckedFile:
    extension = PurePosixPath(item.filename).suffix.removeprefix(".").lower()
    _check_name(item.filename, extension)
    if item.url is not None:
        raise _FileProblem("url", "files by url are not taken; send the content", "unsupported")
    if item.content is None:
        raise _FileProblem("content", "is missing", "missing")
    data = _decoded(item.content)
    if extension in IMAGE_TYPES:
        content_type = _check_image(data)
        return CheckedFile(item.filename, data, content_type, is_image=True)
    _check_text(data, extension)
    return CheckedFile(item.filename, data, TEXT_TYPES[extension], is_image=False)


def _check_name(filename: str, extension: str) -> None:
    try:
        check_filename(filename)
    except InvalidKey as invalid:
        raise _FileProblem("filename", invalid.reason, "invalid_value") from None
    if filename.lower() == MANIFEST_NAME:
        raise _FileProblem("filename", f"{MANIFEST_NAME} is reserved", "invalid_value")
    if extension not in EXTENSIONS:
        raise _FileProblem("filename", f"must end in one of {', '.join(EXTENSIONS)}", "unsupported")


def _decoded(content: str) -> bytes:
    """Base64, as such or in a data URL, line breaks allowed."""
    text = _SPACE.sub("", _DATA_URL.sub("", content))
    if len(text) * 3 // 4 > FILE_BYTES_MAX + 2:
        raise _FileProblem("content", f"is over {FILE_BYTES_MAX // MIB} MB", "too_large")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _FileProblem("content", "is not valid base64", "invalid_value") from None
    if not data:
        raise _FileProblem("content", "is empty", "missing")
    return data


def _check_image(data: bytes) -> str:
    """Decode the whole picture and return its real content type; the extension may be another image type's."""
    formats = sorted({name for name, _ in IMAGE_TYPES.values()})
    try:
        with warnings.catch_warnings():
            # Pillow's own size warning; the stricter limits below decide.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data), formats=formats) as image:
                width_px, height_px = image.size
                kind = image.format
                if max(width_px, height_px) > IMAGE_SIDE_MAX_PX or width_px * height_px > IMAGE_PIXELS_MAX:
                    reason = f"the picture is over {IMAGE_PIXELS_MAX // 10**6} megapixels or {IMAGE_SIDE_MAX_PX} wide"
                    raise _FileProblem("content", reason, "too_large")
                image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        # What Pillow's decoders raise for bytes that are not a picture; any of them means the same to the client.
        raise _FileProblem("content", "is not a picture that can be read", "invalid_value") from None
    return next(content_type for name, content_type in IMAGE_TYPES.values() if name == kind)


def _check_text(data: bytes, extension: str) -> None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _FileProblem("content", "is not UTF-8 text", "invalid_value") from None
    if extension != "json":
        return
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        raise _FileProblem("content", "is not valid JSON", "invalid_value") from None


def _caption_notes(files: list[CheckedFile]) -> list[str]:
    images = {file.stem for file in files if file.is_image}
    captions = {file.stem for file in files if file.filename.lower().endswith(".txt")}
    notes = []
    if images - captions:
        notes.append(f"{len(images - captions)} image(s) have no caption")
    notes += [f"Caption '{name}.txt' belongs to no image" for name in sorted(captions - images)]
    return notes


class DatasetUploads:
    """Stores checked uploads. The manifest goes last, so a failed upload leaves the dataset as it was.

    Earlier uploads of the folder stay stored, because a training that is under way may be reading them; with
    `cleanup_existing` they are no longer part of the dataset, without it their files are.
    """

    def __init__(self, store: ObjectStore, keys_of: Callable[[str], Keys], bucket: str, clock: Clock) -> None:
        self._store = store
        self._keys_of = keys_of
        self._bucket = bucket
        self._clock = clock

    async def store(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest, StorageError. Returns the fields of the reply."""
        upload = await asyncio.to_thread(check_upload, payload)
        request, keys = upload.request, self._keys_of(tenant)
        base = None if request.cleanup_existing else await self._earlier(keys, request.folder)
        manifest = await write_dataset(
            self._store,
            keys,
            request.folder,
            [(file.filename, file.data, file.content_type) for file in upload.files],
            now=self._clock(),
            training_name=request.training_name,
            trigger_word=request.trigger_word,
            base=base,
        )
        return self._reply(upload, manifest, keys)

    async def _earlier(self, keys: Keys, folder: str) -> DatasetManifest | None:
        try:
            return await latest_manifest(self._store, keys, folder)
        except DatasetNotFound:
            return None

    def _reply(self, upload: CheckedUpload, manifest: DatasetManifest, keys: Keys) -> dict[str, Any]:
        request = upload.request
        sent = {file.filename for file in upload.files}
        stored = [file for file in manifest.files if file.filename in sent]
        images = [file for file in upload.files if file.is_image]
        captions = [file for file in upload.files if file.filename.lower().endswith(".txt")]
        size_bytes = sum(file.size_bytes for file in stored)
        captioned = {file.stem for file in images} & {file.stem for file in captions}
        types = Counter(PurePosixPath(file.filename).suffix.lower() for file in upload.files)
        return {
            "message": f"{len(stored)} files stored in dataset '{request.folder}'",
            "training_name": request.training_name,
            "dataset_folder": request.folder,
            "upload_id": manifest.upload_id,
            "trigger_word": request.trigger_word,
            "uploaded_files": [
                {
                    "filename": file.filename,
                    "s3_key": file.key,
                    "size": file.size_bytes,
                    "content_type": file.content_type,
                    "sha256": file.sha256,
                }
                for file in stored
            ],
            "uploaded_count": len(stored),
            "s3_keys": [file.key for file in stored],
            "s3_path": f"s3://{self._bucket}/{keys.dataset_manifests_prefix(request.folder)}",
            "total_images": len(images),
            "total_captions": len(captions),
            "total_size": size_bytes,
            "total_size_formatted": formatted_size(size_bytes),
            "file_types_summary": dict(sorted(types.items())),
            "warnings": list(upload.warnings),
            "statistics": {
                "images_with_captions": len(captioned),
                "images_without_captions": len(images) - len(captioned),
                "files_in_dataset": len(manifest.files),
                "dataset_size": manifest.size_bytes,
            },
        }


def formatted_size(size_bytes: int) -> str:
    """`1536` as `1.5 KB`; 1 KB is 1024 bytes."""
    size = float(size_bytes)
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GB"
