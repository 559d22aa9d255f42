"""Ending an instance from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest

from serve_app.settings import Settings
from serve_app.shutdown import application_s, inference_s, instance_s
from serve_app.stack import control
from serve_app.stack.instance import Instance, InstanceState
from serve_app.stack.supervisor import Supervisor

WAIT_S = 30.0


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def state_of(process: psutil.Process, **fields: float) -> InstanceState:
    return InstanceState(
        pid=process.pid, pid_created_at=process.create_time(), phase="ready", stage="ready", http_url="",
        dashboard_url="", **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def test_an_instance_has_the_time_to_stop_that_it_said(
    tmp_path: Path, supervisor: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(control, "wait_until_ended", lambda process, timeout_s: not asked.append(timeout_s))
    instance = Instance(tmp_path)
    instance.prepare()
    instance.write_state(state_of(psutil.Process(supervisor.pid), stop_timeout_s=777.0))
    control.stop(instance)
    assert asked == [777.0]


def test_what_a_supervisor_says_grows_with_what_generations_may_take(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    instance.prepare()
    said = []
    for drain_s in (0.0, 600.0):
        Supervisor(Settings(home=tmp_path, drain_s=drain_s), instance)._write("ready", "ready")
        state = instance.read_state()
        assert state is not None
        assert state.pid == os.getpid()
        said.append(state.stop_timeout_s)
    assert said == [instance_s(0.0), instance_s(600.0)]
    assert said[1] - said[0] == 600.0


@pytest.mark.parametrize("drain_s", [0.0, 30.0, 3600.0])
def test_each_waits_longer_than_those_inside_it(drain_s: float) -> None:
    assert drain_s < inference_s(drain_s) < application_s(drain_s) < instance_s(drain_s)


def test_the_dispatcher_gives_generations_all_that_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.dispatch import deployment

    class Made(Exception):
        """Nothing is to run."""

    def made(*_: object, drain_s: float, **__: object) -> None:
        raise Made(drain_s)

    monkeypatch.setattr(deployment, "GenerationDispatcher", made)
    with pytest.raises(Made, match=r"^100\.0$"):
        # Its destructor is a coroutine, for Serve to await.
        deployment.Dispatcher.__init__(SimpleNamespace(), Settings(drain_s=100.0), Mock())  # type: ignore[arg-type]


def test_serve_gives_the_application_what_its_settings_say() -> None:
    from pydantic import SecretStr

    from serve_app.app import inference_deployment

    settings = Settings(drain_s=100.0, api_key=SecretStr("k"))
    assert inference_deployment(settings)._deployment_config.graceful_shutdown_timeout_s == inference_s(100.0)
