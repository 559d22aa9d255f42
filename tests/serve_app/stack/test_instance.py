"""An instance finds and ends its own processes and nothing else."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from serve_app.stack.errors import AlreadyRunning, HomeUnusable
from serve_app.stack.instance import INSTANCE_VARIABLE, Instance, InstanceState

STUBBORN = (
    "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"
)


def spawn(home: Path | None, code: str = "import sys; print('up', flush=True); sys.stdin.read()") -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != INSTANCE_VARIABLE}
    if home is not None:
        environment[INSTANCE_VARIABLE] = str(home)
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    made = Instance(tmp_path / "home")
    made.prepare()
    return made


def test_only_the_processes_of_this_instance_are_ended(instance: Instance, tmp_path: Path) -> None:
    own, neighbour, stranger = spawn(instance.home), spawn(tmp_path / "home2"), spawn(None)
    try:
        assert instance.end_processes(grace_s=5) == 1
        assert not psutil.pid_exists(own.pid)
        assert neighbour.poll() is None
        assert stranger.poll() is None
    finally:
        for child in (own, neighbour, stranger):
            child.kill()
            child.communicate()


def test_a_process_that_lost_its_environment_is_known_by_its_open_files(instance: Instance, tmp_path: Path) -> None:
    code = "import sys; log = open(sys.argv[1], 'w'); print('up', flush=True); sys.stdin.read()"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(log)], env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for log in (instance.home / "agent.log", tmp_path / "other.log")
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
        assert [process.pid for process in instance.processes()] == [children[0].pid]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_process_that_ignores_the_request_is_killed(instance: Instance) -> None:
    child = spawn(instance.home, STUBBORN)
    try:
        assert instance.end_processes(grace_s=0.2) == 1
        assert not psutil.pid_exists(child.pid)
    finally:
        child.communicate()


def test_a_second_holder_of_the_lock_is_refused_and_the_first_keeps_it(instance: Instance) -> None:
    with instance.lock(), pytest.raises(AlreadyRunning), Instance(instance.home).lock():
        pytest.fail("two supervisors hold one home")


def test_the_generated_key_is_kept_and_readable_by_the_owner_only(instance: Instance) -> None:
    key, first = instance.ensure_api_key(None)
    again, second = instance.ensure_api_key(None)
    assert (first, second) == (True, False)
    assert key == again
    assert stat.S_IMODE(instance.api_key_file.stat().st_mode) == 0o600


def test_a_configured_key_replaces_the_stored_one(instance: Instance) -> None:
    instance.ensure_api_key(None)
    key, _ = instance.ensure_api_key(SecretStr("mine"))
    assert key.get_secret_value() == "mine"
    assert instance.api_key_file.read_text().strip() == "mine"


def test_a_process_id_that_was_given_to_another_program_is_not_taken_for_the_supervisor(instance: Instance) -> None:
    def state(created_at: float) -> InstanceState:
        return InstanceState(
            pid=os.getpid(), pid_created_at=created_at, phase="ready", stage="", http_url="", dashboard_url=""
        )

    created_at = psutil.Process().create_time()
    instance.write_state(state(created_at))
    assert instance.supervisor() is not None
    instance.write_state(state(created_at - 100))
    assert instance.supervisor() is None


def test_a_damaged_state_file_counts_as_absent(instance: Instance) -> None:
    instance.state_file.write_text('{"pid": 1')
    assert instance.read_state() is None


def test_a_home_that_cannot_be_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeUnusable, match="RAYLORA_HOME"):
        Instance(tmp_path / "file" / "home").prepare()


def test_the_watchdog_ends_the_processes_when_its_pipe_closes_without_a_word(instance: Instance) -> None:
    child = spawn(instance.home)
    try:
        watchdog = subprocess.Popen(
            [sys.executable, "-m", "serve_app.stack.watchdog", str(instance.home)], stdin=subprocess.PIPE
        )
        watchdog.communicate(timeout=60)
        assert child.wait(10) != 0
    finally:
        child.kill()
        child.communicate()


def test_the_watchdog_leaves_everything_alone_after_an_orderly_end(instance: Instance) -> None:
    child = spawn(instance.home)
    try:
        watchdog = subprocess.Popen(
            [sys.executable, "-m", "serve_app.stack.watchdog", str(instance.home)], stdin=subprocess.PIPE, text=True
        )
        watchdog.communicate("done\n", timeout=60)
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()
