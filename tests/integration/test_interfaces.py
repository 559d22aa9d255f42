"""The interface over which the workers of a training find each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch.distributed
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from train_jobs.interfaces import VARIABLE, NamedInterfaceConfig, interface_of, name_interface

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


def _tell(_: dict[str, Any]) -> list[str | None]:
    """What every worker has, gathered over gloo itself."""
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, os.environ.get(VARIABLE))
    return found


def test_an_address_leads_to_its_interface() -> None:
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET":
                assert interface_of(address.address) == name
    assert interface_of("203.0.113.7") is None


def test_an_interface_that_is_named_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "ib0")
    name_interface()
    assert os.environ[VARIABLE] == "ib0"


@pytest.mark.usefixtures("ray_cluster")
def test_workers_talk_over_the_interface_by_which_ray_reaches_their_node(tmp_path: Path) -> None:
    trainer = TorchTrainer(
        _tell,
        train_loop_config={},
        torch_config=NamedInterfaceConfig(),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="run", storage_path=str(tmp_path)),
    )
    [address] = {node["NodeManagerAddress"] for node in ray.nodes()}
    assert interface_of(address) is not None
    assert trainer.fit().return_value == [interface_of(address)] * 2
