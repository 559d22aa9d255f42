"""The cluster file against Ray's own schema, and against what must never be open."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.node import ENVIRONMENT_FILE, exports
from serve_app.ingress.middleware import PROXY_ENVIRONMENT

FILE = Path(__file__).resolve().parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def all_starts(cluster: dict[str, Any]) -> list[str]:
    commands: list[str] = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return commands


def ray_starts(cluster: dict[str, Any]) -> list[str]:
    return [command for command in all_starts(cluster) if " start " in command]


def test_ray_takes_the_file(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_every_node_demands_the_token(cluster: dict[str, Any]) -> None:
    assert len(ray_starts(cluster)) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in ray_starts(cluster))
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_what_runs_on_a_node_has_the_variables_of_its_pod(cluster: dict[str, Any]) -> None:
    own = [command for command in all_starts(cluster) if " stop" not in command]
    assert len(own) == 4
    assert all(command.startswith(f". /{ENVIRONMENT_FILE}; ") for command in own)


def test_the_proxies_of_every_node_have_our_part() -> None:
    [(name, value)] = PROXY_ENVIRONMENT.items()
    assert f" {name}={value} " in (FILE.parent / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("given", "accepted"),
    [({}, False), ({"RAYLORA_S3_HOST": "0.0.0.0", "RAYLORA_S3_BUCKET": "b"}, False),  # noqa: S104 only named
     ({"RAYLORA_S3_ENDPOINT_URL": "http://s3"}, True), ({"RAYLORA_CONFIG": "/data/raylora.toml"}, True)],
)  # fmt: skip
def test_a_head_whose_workers_would_not_reach_the_storage_is_refused(
    cluster: dict[str, Any], tmp_path: Path, given: dict[str, str], accepted: bool
) -> None:
    file = tmp_path / "environment"
    file.write_text(exports(given))
    [command] = cluster["head_setup_commands"]
    done = subprocess.run(
        ["/bin/sh", "-c", command.replace(f"/{ENVIRONMENT_FILE}", str(file))], env={}, capture_output=True, text=True
    )
    assert (done.returncode == 0) is accepted, done.stderr
    assert accepted or "set RAYLORA_S3_ENDPOINT_URL" in done.stderr


@pytest.mark.parametrize(("status", "goes_on"), [(0, True), (3, True), (1, False)])
def test_an_instance_that_runs_is_ended_before_its_cluster(
    cluster: dict[str, Any], tmp_path: Path, status: int, goes_on: bool
) -> None:
    program = tmp_path / "raylora"
    program.write_text(f"#!/bin/sh\ntest $1 = down && exit {status}\n")
    program.chmod(0o700)
    file = tmp_path / "environment"
    file.write_text(exports({"PATH": f"{tmp_path}:{os.defpath}"}))
    command = cluster["head_start_ray_commands"][0].replace(f"/{ENVIRONMENT_FILE}", str(file))
    assert (subprocess.run(["/bin/sh", "-c", command], env={}).returncode == 0) is goes_on


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    head = next(command for command in ray_starts(cluster) if "--head" in command)
    assert re.search(r"--dashboard-host=127\.0\.0\.1\b", head)


def test_the_ports_between_nodes_are_pinned(cluster: dict[str, Any]) -> None:
    for command in ray_starts(cluster):
        for option in ("node-manager-port", "object-manager-port", "metrics-export-port", "min-worker-port"):
            assert f"--{option}=" in command
