"""Ray's head node, started by this process on ports of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray._private.parameter


def start_head(**options: Any) -> None:
    """`ray.init` of a local head node whose job agent listens on a free port.

    Takes what `ray.init` takes and raises what it raises.
    """
    with _free_agent_port():
        ray.init(**options)


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
