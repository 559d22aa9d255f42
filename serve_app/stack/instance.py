"""The files of one instance and the processes that belong to it.

An instance is named by its home folder. Every process that its supervisor starts inherits a variable with that
name, so that what is left of an instance can be found, and nothing else is ever touched.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, SecretStr

from serve_app.stack.errors import AlreadyRunning, HomeUnusable

logger = logging.getLogger(__name__)

INSTANCE_VARIABLE = "RAYLORA_INSTANCE"
STOP_TIMEOUT_S = 120.0
Phase = Literal["starting", "ready", "stopping", "failed"]


class InstanceState(BaseModel):
    """What the supervisor last wrote about itself; ``pid_created_at`` guards against a reused process id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    pid_created_at: float
    phase: Phase
    stage: str
    http_url: str
    dashboard_url: str
    # Where commands that need the cluster itself join it; None before Ray has started.
    ray_address: str | None = None
    # Of `storage.objects.Capabilities`; None until the S3 server has been tried out.
    storage_capabilities: dict[str, bool] | None = None
    # What the end of everything may take, by the settings that the instance runs with.
    stop_timeout_s: float = STOP_TIMEOUT_S
    error_code: str | None = None
    error_message: str | None = None


class Instance:
    """Paths, lock, key and processes of the instance in ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home.expanduser().resolve()

    @property
    def state_file(self) -> Path:
        return self.home / "instance.json"

    @property
    def api_key_file(self) -> Path:
        return self.home / "api-key"

    @property
    def s3_folder(self) -> Path:
        """Of the embedded S3 server."""
        return self.home / "s3"

    @property
    def log_file(self) -> Path:
        return self.home / "logs" / "raylora.log"

    def prepare(self) -> None:
        """Make the folders, readable by the owner only. Raises HomeUnusable."""
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.log_file.parent.mkdir(exist_ok=True)
            probe = self.home / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as exc:
            raise HomeUnusable(self.home) from exc

    def ensure_api_key(self, configured: SecretStr | None) -> tuple[SecretStr, bool]:
        """The key that clients send, and whether it was made just now.

        A configured key wins and is kept, so that the command line finds it without the variable.
        """
        stored = self.api_key_file.read_text().strip() if self.api_key_file.exists() else None
        key = configured.get_secret_value() if configured else stored or f"rl_{secrets.token_urlsafe(24)}"
        if key != stored:
            descriptor = os.open(self.api_key_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(key + "\n")
        return SecretStr(key), stored is None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the supervisor as long as it lives. Raises AlreadyRunning."""
        with (self.home / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise AlreadyRunning(self.home) from exc
            yield

    def write_state(self, state: InstanceState) -> None:
        """Replace the state file in one step, so that a reader never sees half of it."""
        draft = self.state_file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(state.model_dump_json())
        draft.replace(self.state_file)

    def read_state(self) -> InstanceState | None:
        """The last state, or None where no supervisor ever wrote one or an older version did."""
        try:
            return InstanceState.model_validate(json.loads(self.state_file.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            logger.warning("%s does not hold an instance state and is taken as absent", self.state_file)
            return None

    def clear_state(self) -> None:
        self.state_file.unlink(missing_ok=True)

    def supervisor(self) -> psutil.Process | None:
        """The live supervisor process, or None."""
        state = self.read_state()
        if state is None:
            return None
        try:
            process = psutil.Process(state.pid)
            same = abs(process.create_time() - state.pid_created_at) < 1.0
        except psutil.NoSuchProcess:
            return None
        return process if same and not has_ended(process) else None

    def processes(self) -> list[psutil.Process]:
        """Every live process of this instance, except the caller and its ancestors."""
        spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid in spared or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if self._owns(process):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                # Gone meanwhile, or another user's, which is never ours to end.
                continue
        return found

    def _owns(self, process: psutil.Process) -> bool:
        environment = process.environ()
        if environment:
            return environment.get(INSTANCE_VARIABLE) == str(self.home)
        # Ray's agents write their title over their environment. They keep their logs open, which lie in the instance.
        return bool(process.cmdline()) and any(Path(f.path).is_relative_to(self.home) for f in process.open_files())

    def end_processes(self, *, grace_s: float = 2.0, rounds: int = 10, spare: frozenset[int] = frozenset()) -> int:
        """End what is left of this instance: ask once, then kill until a look finds nothing. Returns how many ended."""
        ended: set[int] = set()
        for attempt in range(rounds):
            left = [process for process in self.processes() if process.pid not in spare]
            if not left:
                break
            for process in left:
                try:
                    process.terminate() if attempt == 0 else process.kill()
                    ended.add(process.pid)
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(left, timeout=grace_s if attempt == 0 else 1.0)
        return len(ended)


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; a child that nobody has waited for counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(process: psutil.Process, timeout_s: float) -> bool:
    """Whether the process ended in time; works for processes that are not our children."""
    until = time.monotonic() + timeout_s
    while not has_ended(process):
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)
    return True
