"""Ray's head node, started by this process on ports of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.parameter
import ray._private.utils


def start_head(**options: Any) -> None:
    """`ray.init` of a local head node whose job agent listens on a free port, and whose jobs join this node.

    Takes what `ray.init` takes, `_temp_dir` not to be left out, and raises what it raises.
    """
    with _free_agent_port():
        # "local", or Ray would take the address that an earlier start left below for a cluster to join.
        ray.init(address="local", **options)
    # Where this file is missing, as it is without `ray start`, Ray tells a submitted job to join any cluster that it
    # finds on the machine, which may be another instance's.
    ray._private.utils.write_ray_address(ray.get_runtime_context().gcs_address, options["_temp_dir"])


@contextmanager
def _free_agent_port() -> Iterator[None]:
    """Have Ray choose the agent's port while the block runs.

    `ray.init` has no argument for it (`ray start --dashboard-agent-listen-port` has) and takes 52365 for every node. A
    second node on the machine then runs with its agent's HTTP server switched off, and refuses every submitted job
    with "No available agent to submit job".
    """
    parameter = ray._private.parameter
    original = parameter.RayParams
    parameter.RayParams = functools.partial(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = original
