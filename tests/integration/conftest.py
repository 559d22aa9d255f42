"""Real servers, started once for all integration tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def embedded_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A running `storage.embedded.EmbeddedS3` on a free port; `.settings()` reaches it."""
    from storage.embedded import EmbeddedS3

    with EmbeddedS3(tmp_path_factory.mktemp("s3"), 0) as server:
        yield server


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
