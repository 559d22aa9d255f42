"""Which network interface the workers of a training talk over, where nobody named one.

gloo takes the address that the machine's own name resolves to, on many machines the loopback or a bridge of
containers, on which workers of other nodes are not found. The interface that has the address by which Ray reaches the
node is one that the other nodes reach too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The name of this machine's interface that has `address`; None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            return name
    return None


def name_interface() -> None:
    """Set GLOO_SOCKET_IFNAME of this process, which must be a worker of Ray, unless it is set already."""
    if VARIABLE not in os.environ:
        found = interface_of(ray.util.get_node_ip_address())
        if found is not None:
            os.environ[VARIABLE] = found


class NamedInterfaceBackend(_TorchBackend):  # type: ignore[misc]
    """torch's process group, for which every worker first names its interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class NamedInterfaceConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[NamedInterfaceBackend]:
        return NamedInterfaceBackend
