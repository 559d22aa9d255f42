"""Starting and stopping an instance from another process: what ``raylora up`` and ``raylora down`` do."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from serve_app.stack.errors import AlreadyRunning, InstanceError, NotRunning, StartFailed
from serve_app.stack.instance import STOP_TIMEOUT_S, Instance, InstanceState, has_ended, wait_until_ended

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 240.0


class ReportedFailure(InstanceError):
    """An error that the supervisor process met and left in its state file."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def start(
    instance: Instance,
    *,
    while_pid: int | None = None,
    environment: Mapping[str, str] | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> InstanceState:
    """Start the supervisor as a session of its own and wait until it is ready. Raises InstanceError.

    With ``while_pid`` the instance ends when that process does, however it ends. ``environment`` adds to this
    process's own.
    """
    if instance.supervisor() is not None:
        raise AlreadyRunning(instance.home)
    instance.prepare()
    instance.clear_state()
    command = [sys.executable, "-m", "serve_app.stack.supervisor"]
    if while_pid is not None:
        command += ["--while-pid", str(while_pid)]
    process = _spawn(command, {**os.environ, **(environment or {})}, instance.log_file)
    try:
        return _wait_ready(instance, process, on_stage)
    except BaseException:
        stop(instance, missing_ok=True, process=process)
        raise


def _spawn(command: list[str], environment: dict[str, str], log: Path) -> psutil.Process:
    """Start a process that is meant to outlive this one, with its output appended to ``log``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        command[0],
        command,
        environment,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    return psutil.Process(pid)


def _wait_ready(instance: Instance, process: psutil.Process, on_stage: Callable[[str], None]) -> InstanceState:
    until = time.monotonic() + START_TIMEOUT_S
    stage = ""
    while time.monotonic() < until:
        state = instance.read_state()
        if state is not None and state.pid == process.pid:
            if state.stage != stage:
                stage = state.stage
                on_stage(stage)
            if state.phase == "ready":
                return state
            if state.phase == "failed":
                instance.clear_state()
                raise ReportedFailure(state.error_code or "start_failed", state.error_message or "unknown reason")
        if has_ended(process):
            state = instance.read_state()
            if state is None or state.phase != "failed":
                raise StartFailed(f"its process ended with status {process.wait(1)}", instance.log_file)
        time.sleep(0.1)
    raise StartFailed(f"it was not ready after {START_TIMEOUT_S:.0f} s (stage: {stage})", instance.log_file)


def stop(instance: Instance, *, missing_ok: bool = False, process: psutil.Process | None = None) -> int:
    """End the instance and everything that it started. Returns how many processes had to be ended the hard way.

    ``process`` is a supervisor that may not have written its state yet. Raises NotRunning where neither a supervisor
    nor any other process of this instance is left, unless ``missing_ok``.
    """
    supervisor = instance.supervisor() or process
    if supervisor is not None and not has_ended(supervisor):
        state = instance.read_state()
        supervisor.terminate()
        if not wait_until_ended(supervisor, STOP_TIMEOUT_S if state is None else state.stop_timeout_s):
            logger.warning("the supervisor %d did not end in time and is killed", supervisor.pid)
            supervisor.kill()
    ended = instance.end_processes()
    instance.clear_state()
    if supervisor is None and ended == 0 and not missing_ok:
        raise NotRunning(instance.home)
    return ended
