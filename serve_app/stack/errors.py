"""What can go wrong while an instance starts or stops. Every message says what to do.

InstanceError
├── AlreadyRunning
├── NotRunning
├── PortTaken
├── DiskFull
├── HomeUnusable
├── ModelMissing
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


class StartFailed(InstanceError):
    code = "start_failed"

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(f"The instance did not start: {reason}. The log is {log}.")
