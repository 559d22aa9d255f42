"""What can go wrong while an instance starts or stops. Every message says what to do.

InstanceError
├── AlreadyRunning
├── NotRunning
├── PortTaken
├── PortForbidden
├── AddressUnusable
├── DiskFull
├── HomeUnusable
├── ModelMissing
├── ClusterInUse
├── ServeElsewhere
├── RouteTaken
├── ProxyUnguarded
├── StorageNotShared
└── StartFailed
"""

from __future__ import annotations

from pathlib import Path


class InstanceError(Exception):
    """Base of everything that the command line reports about an instance."""

    code: str = "instance_error"


class AlreadyRunning(InstanceError):
    code = "already_running"

    def __init__(self, home: Path) -> None:
        super().__init__(
            f"An instance is already running on {home}. `raylora down` ends it; "
            "another RAYLORA_HOME with its own RAYLORA_PORT and RAYLORA_DASHBOARD_PORT runs beside it."
        )


class NotRunning(InstanceError):
    code = "not_running"

    def __init__(self, home: Path) -> None:
        super().__init__(f"No instance is running on {home}. Start one with `raylora up`.")


class PortTaken(InstanceError):
    code = "port_in_use"

    def __init__(self, port: int, variable: str) -> None:
        super().__init__(f"Port {port} is in use by another program. Free it, or set {variable} to another port.")


class PortForbidden(InstanceError):
    code = "port_forbidden"

    def __init__(self, port: int, variable: str) -> None:
        super().__init__(f"This user may not open port {port}. Set {variable} to one above 1023.")


class AddressUnusable(InstanceError):
    code = "address_unusable"

    def __init__(self, host: str, variable: str) -> None:
        super().__init__(
            f"This machine cannot listen on {host!r}. Set {variable} to one of its addresses, "
            "or to 0.0.0.0 or :: for all of them."
        )


class DiskFull(InstanceError):
    code = "disk_full"

    def __init__(self, home: Path, free_mb: int, needed_mb: int) -> None:
        super().__init__(
            f"{home} has {free_mb} MB free and at least {needed_mb} MB are needed. "
            "Free some space, or set RAYLORA_HOME to a folder on a larger disk."
        )


class HomeUnusable(InstanceError):
    code = "home_unusable"

    def __init__(self, home: Path) -> None:
        super().__init__(f"{home} cannot be written. Set RAYLORA_HOME to a folder that this user owns.")


class ModelMissing(InstanceError):
    code = "model_missing"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The model {name!r} has no folder. Point its entry in RAYLORA_MODELS at a diffusers model folder."
        )


class ClusterInUse(InstanceError):
    code = "cluster_in_use"

    def __init__(self, home: str) -> None:
        super().__init__(
            f"Another instance, in {home}, uses the Ray cluster at RAYLORA_RAY_ADDRESS, which has room for one. "
            "`raylora down` there ends it."
        )


class ServeElsewhere(InstanceError):
    code = "serve_elsewhere"

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            f"Ray Serve runs in the cluster already and listens on {host}, port {port}. "
            "Set RAYLORA_HOST and RAYLORA_PORT to these, or end it with `serve shutdown`."
        )


class RouteTaken(InstanceError):
    code = "route_taken"

    def __init__(self, application: str) -> None:
        super().__init__(
            f"The Serve application {application!r} of the cluster answers every path. "
            "Give it a route_prefix of its own, or end it."
        )


class ProxyUnguarded(InstanceError):
    code = "proxy_unguarded"

    def __init__(self, variable: str, value: str) -> None:
        super().__init__(
            "Ray Serve was started in the cluster without this project's part of its proxy. "
            f"Start the nodes with {variable}={value}, as cluster.yaml does, or end Serve with `serve shutdown`."
        )


class StorageNotShared(InstanceError):
    code = "storage_not_shared"

    def __init__(self, nodes: int) -> None:
        super().__init__(
            f"The cluster has {nodes} nodes, and the embedded S3 server is reached from this one only. "
            "Set RAYLORA_S3_ENDPOINT_URL, _ACCESS_KEY_ID and _SECRET_ACCESS_KEY to a server that all nodes reach, "
            "or RAYLORA_S3_HOST to an address of this node that the others reach."
        )


class StartFailed(InstanceError):
    code = "start_failed"

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"The instance did not start: {reason}. The log is {log}.")
