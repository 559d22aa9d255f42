"""A stored upload as its reply. Pure."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from serve_app.validation.file_checks import mask_names
from storage.datasets import DatasetManifest
from storage.keys import Keys


def dataset_reply(manifest: DatasetManifest, keys: Keys, bucket: str) -> dict[str, Any]:
    """Counts are of this upload; `statistics` also tells of the whole dataset, which may hold earlier ones' files."""
    prefix = keys.dataset_manifests_prefix(manifest.folder)
    stored = [file for file in manifest.files if file.key.startswith(f"{prefix}{manifest.upload_id}/")]
    names = [file.filename for file in stored]
    masks = mask_names(names)
    images = {_stem(file.filename) for file in stored if _is_image(file.content_type) and file.filename not in masks}
    captions = {_stem(name) for name in names if name.lower().endswith(".txt")}
    size_bytes = sum(file.size_bytes for file in stored)
    types = Counter(PurePosixPath(name).suffix.lower() for name in names)
    return {
        "message": f"{len(stored)} files stored in dataset '{manifest.folder}'",
        "training_name": manifest.training_name,
        "dataset_folder": manifest.folder,
        "upload_id": manifest.upload_id,
        "trigger_word": manifest.trigger_word,
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
        "s3_path": f"s3://{bucket}/{prefix}",
        "total_images": len(images),
        "total_captions": len(captions),
        "total_masks": len(masks),
        "total_size": size_bytes,
        "total_size_formatted": formatted_size(size_bytes),
        "file_types_summary": dict(sorted(types.items())),
        "warnings": list(manifest.notes),
        "statistics": {
            "images_with_captions": len(images & captions),
            "images_without_captions": len(images - captions),
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


def _stem(filename: str) -> str:
    return PurePosixPath(filename).stem


def _is_image(content_type: str | None) -> bool:
    return (content_type or "").startswith("image/")
