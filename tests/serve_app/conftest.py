import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

with warnings.catch_warnings():
    # Serve's own use of an older pydantic spelling, warned of once, at import.
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

from serve_app.testing import LocalServer, local_server
from storage.jobs_testing import JobsWorld


@pytest.fixture
def world(tmp_path: Path) -> Iterator[JobsWorld]:
    world = JobsWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
async def server(world: JobsWorld) -> LocalServer:
    return local_server(world.jobs, world.clock)
