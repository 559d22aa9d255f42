"""Checks of a machine and an instance, each with what to do where it fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from serve_app.cli.client import ApiClient, ApiError
from serve_app.settings import CONFIG_FILE_VARIABLE, Settings
from serve_app.stack.checks import DASHBOARD_HOST, FREE_DISK_MIN_MB, check_port, models_missing
from serve_app.stack.errors import AddressUnusable, HomeUnusable, PortForbidden, PortTaken
from serve_app.stack.instance import INSTANCE_VARIABLE, Instance
from serve_app.stack.probing import described

PACKAGES = ("ray", "torch", "diffusers", "peft", "transformers", "aiobotocore")
MEMORY_MIN_MB = 4096
HEALTH_WAIT_S = 15.0
OTHER_VARIABLES = frozenset({CONFIG_FILE_VARIABLE, INSTANCE_VARIABLE})


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and where it is wrong, what to do."""

    name: str
    ok: bool
    found: str
    advice: str = ""


def diagnose(settings: Settings) -> list[Finding]:
    """Run every check; none changes anything but a probe file in the data folder."""
    instance = Instance(settings.home)
    checks: list[Callable[[], Finding]] = [
        _python, _packages, _s3_server, _variables,
        lambda: _home(instance), lambda: _disk(instance), _memory, lambda: _models(settings), _gpu,
    ]  # fmt: skip
    findings = [check() for check in checks]
    if instance.supervisor() is None:
        findings += [
            *_ports(settings),
            _leftovers(instance),
        ]
    else:
        findings += [_running(settings, instance), *_breaker(instance), *_capabilities(instance)]
    return findings


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    return Finding("Python", ok, found, "" if ok else "Install Python 3.11 and run `make setup` again.")


def _packages() -> Finding:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    advice = "Run `make setup` again." if missing else ""
    return Finding("packages", not missing, f"missing: {', '.join(missing)}" if missing else "all there", advice)


def _s3_server() -> Finding:
    folder = Path(sys.executable).parent
    found = shutil.which("rclone", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    advice = "" if found else "Run `make setup` again, or set RAYLORA_S3_ENDPOINT_URL to a server of your own."
    return Finding("embedded S3 server", found is not None, "rclone is there" if found else "rclone is missing", advice)


def _variables() -> Finding:
    known = {f"RAYLORA_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    unknown = [n for n in os.environ if n.startswith("RAYLORA_") and n.partition("__")[0] not in known]
    if not unknown:
        return Finding("settings", True, "every RAYLORA_ variable is known")
    hints = [
        f"{name} (did you mean {near[0]}?)" if (near := get_close_matches(name, known, 1)) else name for name in unknown
    ]
    return Finding("settings", False, f"unknown: {', '.join(hints)}", "Correct or unset them: they have no effect.")


def _home(instance: Instance) -> Finding:
    try:
        instance.prepare()
    except HomeUnusable as exc:
        return Finding("data folder", False, str(instance.home), str(exc))
    return Finding("data folder", True, str(instance.home))


def _disk(instance: Instance) -> Finding:
    folder = instance.home
    while not folder.exists():
        folder = folder.parent
    free_mb = shutil.disk_usage(folder).free // 2**20
    ok = free_mb >= FREE_DISK_MIN_MB
    advice = "" if ok else "Free some space, or set RAYLORA_HOME to a folder on a larger disk."
    return Finding("disk", ok, f"{free_mb} MB free, {FREE_DISK_MIN_MB} needed", advice)


def _memory() -> Finding:
    import psutil

    free_mb = psutil.virtual_memory().available // 2**20
    ok = free_mb >= MEMORY_MIN_MB
    advice = "" if ok else "Close other programs, or use a machine with more memory."
    return Finding("memory", ok, f"{free_mb} MB available, {MEMORY_MIN_MB} needed", advice)


def _models(settings: Settings) -> Finding:
    missing = models_missing(settings)
    advice = "Point their entries in RAYLORA_MODELS at diffusers model folders." if missing else ""
    found = f"no model folder for: {', '.join(missing)}" if missing else ", ".join(settings.models)
    return Finding("models", not missing, found, advice)


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", True, "unknown without torch")
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        advice = "A driver is there but torch cannot use it: install a CUDA build of torch." if driver else ""
        return Finding("GPU", driver is None, "none; everything runs on the CPU", advice)
    free, total = torch.cuda.mem_get_info()
    return Finding("GPU", True, f"{torch.cuda.get_device_name()}: {free >> 20} of {total >> 20} MB free")


def _ports(settings: Settings) -> list[Finding]:
    """Of what this machine would open, which in a cluster that runs already depends on what runs there."""
    found = []
    if settings.ray_address is None:
        found += [
            _port(settings.port, "RAYLORA_PORT", settings.host, "RAYLORA_HOST"),
            _port(settings.dashboard_port, "RAYLORA_DASHBOARD_PORT", DASHBOARD_HOST, "RAYLORA_DASHBOARD_PORT"),
        ]
    if settings.uses_embedded_s3() and settings.s3_port is not None:
        found.append(_port(settings.s3_port, "RAYLORA_S3_PORT", settings.s3_host, "RAYLORA_S3_HOST"))
    return found


def _port(port: int, variable: str, host: str, host_variable: str) -> Finding:
    name = f"port {port}"
    try:
        check_port(port, variable, host, host_variable)
    except PortTaken:
        return Finding(name, False, "in use by another program", f"Free it, or set {variable} to another port.")
    except (PortForbidden, AddressUnusable) as error:
        return Finding(name, False, f"cannot be opened on {host}", str(error))
    return Finding(name, True, "free")


def _leftovers(instance: Instance) -> Finding:
    count = len(instance.processes())
    advice = "Run `raylora down` to end them." if count else ""
    return Finding("left-over processes", count == 0, str(count), advice)


def _running(settings: Settings, instance: Instance) -> Finding:
    state = instance.read_state()
    key = instance.api_key_file.read_text().strip() if instance.api_key_file.exists() else ""
    if state is None or state.phase != "ready":
        return Finding("instance", True, f"starting or stopping ({state.stage if state else 'unknown'})")
    try:
        with ApiClient(state.http_url, key) as client:
            client.get("/readyz")
    except ApiError as exc:
        return Finding("instance", False, str(exc), f"The log is {instance.log_file}.")
    return Finding("instance", True, f"ready on {state.http_url}")


def _breaker(instance: Instance) -> list[Finding]:
    """Of an instance that answers; one that does not is another check's finding."""
    state = instance.read_state()
    key = instance.api_key_file.read_text().strip() if instance.api_key_file.exists() else ""
    if state is None or state.phase != "ready":
        return []
    try:
        with ApiClient(state.http_url, key) as client:
            storage = client.call("health", wait_s=HEALTH_WAIT_S)["services"]["storage"]
    except (ApiError, KeyError):
        return []
    return [breaker_finding(storage)]


def _capabilities(instance: Instance) -> list[Finding]:
    state = instance.read_state()
    return [] if state is None or state.phase != "ready" else [capabilities_finding(state.storage_capabilities)]


def capabilities_finding(capabilities: Mapping[str, bool] | None) -> Finding:
    """`capabilities` as in the instance's state."""
    name = "S3 server"
    if capabilities is None:
        return Finding(name, True, "not tried out yet")
    ok = capabilities.get("ranged_reads", False)
    advice = "" if ok else "Large files are read in parts: use a server that answers ranged reads."
    return Finding(name, ok, described(capabilities), advice)


def breaker_finding(storage: dict[str, Any]) -> Finding:
    """`storage` is that part of the health reply."""
    name, mode = "storage breaker", storage.get("breaker_mode", "automatic")
    found = f"{storage.get('breaker', 'unknown')} ({mode})"
    if mode != "automatic":
        return Finding(name, False, found, "An operator set it. `raylora breaker auto` lets it decide again.")
    if storage.get("ok"):
        return Finding(name, True, found)
    wait_s = storage.get("retry_after_s")
    again = f" It is tried again in {wait_s:.0f} s." if isinstance(wait_s, int | float) and wait_s > 0 else ""
    return Finding(name, False, f"{found}, {storage.get('error')}", f"Look after the S3 server.{again}")
