"""A whole instance for tests: started as a user starts it, in a home folder of its own, on free ports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.cli.client import ApiClient
from serve_app.stack import control
from serve_app.stack.instance import Instance
from serve_app.stack.ports import any_free

REPOSITORY = Path(__file__).resolve().parents[2]
LOG_TOLD_CHARS = 8000
EXAMPLE = REPOSITORY / "examples" / "zib" / "train.yaml"


@dataclass(frozen=True)
class Running:
    """An instance that answers; ``environment`` is what commands against it need."""

    instance: Instance
    url: str
    dashboard_url: str
    api_key: str
    environment: dict[str, str]

    def client(self) -> ApiClient:
        return ApiClient(self.url, self.api_key)

    def ray_job(self, *entrypoint: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """A Ray job's whole run, as `ray job submit` shows it."""
        program = str(Path(sys.executable).parent / "ray")
        command = [program, "job", "submit", "--address", self.dashboard_url, *options, "--", *entrypoint]
        # Ray's own client sends the token only in this mode.
        environment = {**self.environment, "RAY_AUTH_MODE": "token"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


class Home:
    """A home folder that instances are started on, one after another."""

    def __init__(self, folder: Path) -> None:
        self.instance = Instance(folder)
        self.environment = {
            # Ray keeps its token under HOME; PYTHONPATH reaches the code where it is not installed.
            "HOME": str(folder / "user"),
            "RAYLORA_HOME": str(folder),
            "RAYLORA_PORT": str(any_free()),
            "RAYLORA_DASHBOARD_PORT": str(any_free()),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        (folder / "user").mkdir(parents=True)

    def start(self, extra: Mapping[str, str] | None = None) -> Running:
        environment = {**self.environment, **(extra or {})}
        try:
            state = control.start(self.instance, while_pid=os.getpid(), environment=environment)
        except control.ReportedFailure as error:
            # The home is gone before anybody could read it there.
            error.add_note(self.instance.log_file.read_text()[-LOG_TOLD_CHARS:])
            raise
        key, _ = self.instance.ensure_api_key(None)
        return Running(
            self.instance,
            state.http_url,
            state.dashboard_url,
            key.get_secret_value(),
            {**os.environ, **self.environment},
        )

    def stop(self) -> None:
        control.stop(self.instance, missing_ok=True)


@contextmanager
def temporary_home() -> Iterator[Home]:
    """A home with a short path, ended and removed at the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    home = Home(folder)
    try:
        yield home
    finally:
        home.stop()
        shutil.rmtree(folder, ignore_errors=True)


def training_config(*, name: str, steps: int, save_every: int = 1000, dataset: str = "zib") -> dict[str, Any]:
    """The example's configuration, shortened."""
    config: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    process = config["config"]["process"][0]
    config["config"]["name"] = name
    process["datasets"][0]["folder_path"] = dataset
    process["train"].update(steps=steps, lr=0.003, batch_size=4)
    process["save"]["save_every"] = save_every
    process["sample"].update(sample_every=1000, sample_steps=4)
    return config
