"""What would keep an instance from working, looked at before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from serve_app.settings import Settings
from serve_app.stack.errors import AddressUnusable, DiskFull, ModelMissing, PortForbidden, PortTaken
from storage.listening import Obstacle, obstacle_to

FREE_DISK_MIN_MB = 1024
DASHBOARD_HOST = "127.0.0.1"


def check(settings: Settings, home: Path) -> None:
    """Raises InstanceError. The ports of a cluster that is joined are not this instance's to open yet."""
    if settings.ray_address is None:
        check_port(settings.port, "RAYLORA_PORT", settings.host, "RAYLORA_HOST")
        check_port(settings.dashboard_port, "RAYLORA_DASHBOARD_PORT", DASHBOARD_HOST, "RAYLORA_DASHBOARD_PORT")
    free_mb = shutil.disk_usage(home).free // 2**20
    if free_mb < FREE_DISK_MIN_MB:
        raise DiskFull(home, free_mb, FREE_DISK_MIN_MB)
    missing = models_missing(settings)
    if missing:
        raise ModelMissing(missing[0])


def check_port(port: int, variable: str, host: str, host_variable: str) -> None:
    """`variable` and `host_variable` name the settings. Raises PortTaken, PortForbidden, AddressUnusable."""
    obstacle = obstacle_to(host, port)
    if obstacle is Obstacle.ADDRESS:
        raise AddressUnusable(host, host_variable)
    if obstacle is Obstacle.FORBIDDEN:
        raise PortForbidden(port, variable)
    if obstacle is Obstacle.TAKEN:
        raise PortTaken(port, variable)


def models_missing(settings: Settings) -> list[str]:
    """Models whose path is meant to be a folder and is none."""
    return [
        name
        for name, path in settings.models.items()
        if path.startswith(("/", ".", "~")) and not (Path(path).expanduser() / "model_index.json").is_file()
    ]
