"""The GPU's memory in a training's progress."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from train_jobs.gpu_memory import GpuMemory, gpu_memory


def test_a_cpu_has_no_gpu_memory() -> None:
    assert gpu_memory(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    device = torch.device("cuda", 0)
    held = torch.empty(2**24, dtype=torch.uint8, device=device)
    del held
    found = gpu_memory(device)
    assert found is not None
    assert 2**24 <= found.peak_bytes < found.total_bytes == torch.cuda.mem_get_info(device)[1]


def test_of_a_gpu_the_peak_and_the_whole_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24))
    assert gpu_memory(torch.device("cuda", 0)) == GpuMemory(peak_bytes=6, total_bytes=24)
