"""Real servers, started once for all integration tests."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.cli.client import ApiClient
from serve_app.cli.trainings import upload_folder
from storage.embedded import EmbeddedS3
from storage.fault_proxy import FaultProxy
from storage.loop_thread import LoopThread
from storage.s3 import S3Store
from storage.settings import BreakerSettings
from tests.integration.instance import REPOSITORY, Running, temporary_home, training_config
from tests.integration.moto_server import moto_server
from tests.integration.s3_stores import PART_BYTES, no_wait

PICTURES = REPOSITORY / "examples" / "zib" / "images"


@pytest.fixture(scope="session")
def embedded_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """A running `storage.embedded.EmbeddedS3` on a free port; `.settings()` reaches it."""
    with EmbeddedS3(tmp_path_factory.mktemp("s3"), 0) as server:
        yield server


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    """Where moto's server answers."""
    with moto_server() as url:
        yield url


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray with 4 logical CPUs, in the namespace "raylora". Yields its address."""
    # Unix socket paths are limited to about 100 bytes, which pytest's own directories use up.
    home = tempfile.mkdtemp(prefix="rl", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", home)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        import ray

        context = ray.init(
            num_cpus=4,
            namespace="raylora",
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(Path(home, "r")),
        )
        yield str(context.address_info["address"])
        ray.shutdown()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def instance_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """The `storage.embedded.EmbeddedS3` of `running`."""
    with EmbeddedS3(tmp_path_factory.mktemp("instance-s3"), 0) as server:
        yield server


@pytest.fixture(scope="session")
def s3_proxy(instance_s3: EmbeddedS3) -> Iterator[FaultProxy]:
    """Records what the S3 server of `running` is asked, from the instance's start on."""
    proxy, thread = FaultProxy(str(instance_s3.settings().endpoint_url)), LoopThread("s3-proxy")
    thread.run_blocking(proxy.start())
    yield proxy
    thread.run_blocking(proxy.stop())
    thread.stop()


@pytest.fixture(scope="session")
def running(instance_s3: EmbeddedS3, s3_proxy: FaultProxy) -> Iterator[Running]:
    """A whole instance, as `raylora up` starts it where S3 is elsewhere; all tests that need one share it."""
    key, secret = instance_s3.settings().access_key_id, instance_s3.settings().secret_access_key
    assert key is not None
    assert secret is not None
    with temporary_home() as home:
        yield home.start(
            {
                # The receivers of webhooks are on this machine.
                "RAYLORA_WEBHOOKS__ANY_ADDRESS": "true",
                "RAYLORA_S3_ENDPOINT_URL": s3_proxy.url,
                "RAYLORA_S3_ACCESS_KEY_ID": key.get_secret_value(),
                "RAYLORA_S3_SECRET_ACCESS_KEY": secret.get_secret_value(),
            }
        )


@pytest.fixture(scope="session")
def client(running: Running) -> Iterator[ApiClient]:
    with running.client() as client:
        yield client


@pytest.fixture(scope="session")
def trained(client: ApiClient) -> dict[str, Any]:
    """A finished training of a few steps on the example's pictures."""
    upload_folder(client, PICTURES, "zib", on_upload=lambda _: None)
    accepted = client.call("train", config=training_config(name="zib", steps=8))
    process = client.follow(accepted["process_id"], lambda _: None)
    assert process["status"] == "completed", process["error"]
    return process


@pytest.fixture
async def proxy(embedded_s3: EmbeddedS3) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(str(embedded_s3.settings().endpoint_url))
    await proxy.start()
    yield proxy
    await proxy.stop()


@pytest.fixture
async def store(embedded_s3: EmbeddedS3, proxy: FaultProxy) -> AsyncIterator[S3Store]:
    settings = embedded_s3.settings().model_copy(
        update={
            "endpoint_url": proxy.url,
            "attempt_timeout_s": 20.0,
            "part_size_bytes": PART_BYTES,
            "multipart_threshold_bytes": PART_BYTES,
        }
    )
    async with S3Store(settings, BreakerSettings(), sleep=no_wait) as store:
        yield store


@pytest.fixture
def key() -> str:
    return f"raylora/{secrets.token_hex(6)}/a.bin"


@pytest.fixture
def content() -> bytes:
    """Of three parts."""
    return secrets.token_bytes(2 * PART_BYTES + 1000)


@pytest.fixture
def large_file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "large"
    path.write_bytes(content)
    return path
