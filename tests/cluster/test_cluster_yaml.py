"""The cluster file against Ray's own schema, and against what must never be open."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).resolve().parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def ray_starts(cluster: dict[str, Any]) -> list[str]:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if " start " in command]


def test_ray_takes_the_file(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_every_node_demands_the_token(cluster: dict[str, Any]) -> None:
    assert len(ray_starts(cluster)) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in ray_starts(cluster))
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    head = next(command for command in ray_starts(cluster) if "--head" in command)
    assert re.search(r"--dashboard-host=127\.0\.0\.1\b", head)


def test_the_ports_between_nodes_are_pinned(cluster: dict[str, Any]) -> None:
    for command in ray_starts(cluster):
        for option in ("node-manager-port", "object-manager-port", "metrics-export-port", "min-worker-port"):
            assert f"--{option}=" in command
