"""Which files of a model are read before it is loaded, and when none are."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from diffusion.testing import write_tiny_model
from serve_app.inference import read_ahead as module
from serve_app.inference.read_ahead import read_ahead, weight_files


def test_the_files_are_those_that_are_loaded(tmp_path: Path) -> None:
    folder = write_tiny_model("sd1", tmp_path)
    for other in ("unet/diffusion_pytorch_model.fp16.safetensors", "merged.safetensors"):
        (folder / other).write_bytes(b"")
    found = {file.relative_to(folder).as_posix() for file in weight_files(folder)}
    assert found == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_they_are_read_where_memory_has_room_for_them_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model("sd1", tmp_path)
    size_bytes = sum(file.stat().st_size for file in weight_files(folder))
    read: list[Path] = []
    monkeypatch.setattr(module, "_read", read.append)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size_bytes - 1))
    read_ahead(str(folder))
    assert read == []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size_bytes))
    read_ahead(str(folder))
    assert read == weight_files(folder)


def test_a_folder_without_a_model_is_left_to_the_load_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_ahead(str(tmp_path))
    [record] = caplog.records
    assert str(tmp_path) not in record.getMessage()
