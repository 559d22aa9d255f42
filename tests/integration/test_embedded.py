"""The embedded S3 server as real processes."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.stack.ports import any_free
from storage.embedded import EmbeddedS3, TemporaryFiles
from storage.errors import PortInUse, StorageMisconfigured
from storage.s3 import S3Store
from tests.addresses import needs_ipv6

WAIT_S = 20
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 of a machine of tests, and for a moment


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedS3]:
    with EmbeddedS3(tmp_path / "data", 0) as server:
        yield server


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def process_of(server: EmbeddedS3) -> psutil.Process:
    assert server.pid is not None
    return psutil.Process(server.pid)


def is_gone(process: psutil.Process) -> bool:
    gone, _ = psutil.wait_procs([process], timeout=WAIT_S)
    return bool(gone)


async def test_objects_and_credentials_outlive_the_server(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path, 0) as first:
        before = first.settings()
        async with S3Store(before) as store:
            await store.put("raylora/a", b"1")

    with EmbeddedS3(tmp_path, first.port) as second:
        assert second.settings() == before
        async with S3Store(second.settings()) as store:
            assert await store.get("raylora/a") == b"1"


def test_credentials_are_for_the_owner_alone_and_not_on_the_command_line(server: EmbeddedS3, tmp_path: Path) -> None:
    path = tmp_path / "data" / "s3-credentials.json"
    secret = server.settings().secret_access_key
    assert secret is not None

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret.get_secret_value() in path.read_text()
    assert secret.get_secret_value() not in " ".join(process_of(server).cmdline())


def test_credentials_that_others_may_read_are_locked_up_again(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path, 0):
        pass
    (tmp_path / "s3-credentials.json").chmod(0o644)

    with EmbeddedS3(tmp_path, 0):
        assert stat.S_IMODE((tmp_path / "s3-credentials.json").stat().st_mode) == 0o600


def test_spoiled_credentials_are_a_misconfiguration(tmp_path: Path) -> None:
    (tmp_path / "s3-credentials.json").write_text("{}")

    with pytest.raises(StorageMisconfigured):
        EmbeddedS3(tmp_path, 0).start()


async def test_a_server_that_is_killed_comes_back_with_its_objects(server: EmbeddedS3) -> None:
    async with S3Store(server.settings()) as store:
        await store.put("raylora/a", b"1")
    before = server.pid
    process_of(server).kill()

    assert server.wait_for_starts(2, WAIT_S)

    assert server.pid != before
    async with S3Store(server.settings()) as store:
        assert await store.get("raylora/a") == b"1"


def test_stopping_ends_the_process_and_may_be_repeated(tmp_path: Path) -> None:
    server = EmbeddedS3(tmp_path, 0)
    server.start()
    process = process_of(server)

    server.stop()
    server.stop()

    assert is_gone(process)
    assert server.pid is None


def test_a_port_that_belongs_to_another_program_is_named(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(PortInUse) as refused:
        EmbeddedS3(tmp_path, taken_port).start()

    assert refused.value.port == taken_port


def test_a_data_directory_has_one_server(server: EmbeddedS3, tmp_path: Path) -> None:
    with pytest.raises(StorageMisconfigured):
        EmbeddedS3(tmp_path / "data", 0).start()

    assert process_of(server).is_running()


def test_settings_exist_only_after_the_start(tmp_path: Path) -> None:
    with pytest.raises(StorageMisconfigured):
        EmbeddedS3(tmp_path, 0).settings()


@pytest.mark.parametrize("public", ["http://localhost", "http://127.0.0.2"])
async def test_urls_for_a_public_endpoint_work_there(tmp_path: Path, public: str) -> None:
    port = any_free()
    with EmbeddedS3(
        tmp_path, port, host=EVERY_ADDRESS, public_endpoint_url=f"{public}:{port}", bucket="mine", prefix="pre"
    ) as server:
        settings = server.settings()
        assert (settings.endpoint_url, settings.bucket, settings.prefix) == (f"http://127.0.0.1:{port}", "mine", "pre")
        async with S3Store(settings) as store:
            put_url = await store.presign_put("pre/a.txt", content_type="text/plain")
            get_url = await store.presign_get("pre/a.txt")
            async with httpx.AsyncClient() as client:
                put = await client.put(put_url, content=b"1234", headers={"Content-Type": "text/plain"})
                assert (put.status_code, put_url.startswith(f"{public}:{port}/mine/")) == (200, True)
                got = await client.get(get_url)
                assert (got.status_code, got.content, get_url.startswith(public)) == (200, b"1234", True)
                forged = await client.get(get_url.replace("a.txt", "b.txt"))
                assert forged.status_code == 403
            assert await store.get("pre/a.txt") == b"1234"
    assert (tmp_path / "objects" / "mine" / "pre" / "a.txt").read_bytes() == b"1234"


@needs_ipv6
async def test_the_server_listens_on_ipv6_where_it_is_told_to(tmp_path: Path) -> None:
    with EmbeddedS3(tmp_path, 0, host="::1") as server:
        assert server.settings().endpoint_url == f"http://[::1]:{server.port}"
        async with S3Store(server.settings()) as store:
            await store.put("raylora/a", b"1")
            assert await store.get("raylora/a") == b"1"


def test_an_address_of_another_machine_is_a_misconfiguration(tmp_path: Path) -> None:
    with pytest.raises(StorageMisconfigured) as refused:
        EmbeddedS3(tmp_path, 0, host="203.0.113.9").start()
    assert not isinstance(refused.value, PortInUse)


def test_what_cut_uploads_left_is_swept_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "objects" / "raylora" / "deep"
    folder.mkdir(parents=True)
    (folder / ".rclone_temp_put_abc").write_bytes(b"half")
    (folder / "whole").write_bytes(b"whole")

    with EmbeddedS3(tmp_path, 0):
        assert [path.name for path in folder.iterdir()] == ["whole"]
    assert TemporaryFiles(tmp_path / "objects").sweep(0) == (0, 0)


def test_the_users_own_rclone_settings_have_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCLONE_AUTH_KEY", "mine,mine")
    monkeypatch.setenv("RCLONE_READ_ONLY", "true")

    with EmbeddedS3(tmp_path, 0) as server:
        assert "RCLONE_READ_ONLY" not in process_of(server).environ()


@pytest.fixture
def foreground(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The module as a program, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "storage.embedded", "--data-dir", str(tmp_path), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stderr is not None
    assert "listens" in process.stderr.readline()
    yield process
    if process.poll() is None:
        process.kill()
    process.wait(WAIT_S)
    process.stderr.close()


def test_the_program_ends_its_server_at_sigterm(foreground: subprocess.Popen[str]) -> None:
    (server,) = psutil.Process(foreground.pid).children(recursive=True)

    foreground.send_signal(signal.SIGTERM)

    assert foreground.wait(WAIT_S) == 0
    assert is_gone(server)


def test_the_server_ends_with_its_parent_even_by_kill_9(foreground: subprocess.Popen[str]) -> None:
    (server,) = psutil.Process(foreground.pid).children(recursive=True)

    foreground.kill()

    assert is_gone(server)


def test_the_program_says_when_its_port_is_taken(tmp_path: Path, taken_port: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "storage.embedded", "--data-dir", str(tmp_path), "--port", str(taken_port)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )

    assert done.returncode == 1
    assert str(taken_port) in done.stderr
    assert "Traceback" not in done.stderr
