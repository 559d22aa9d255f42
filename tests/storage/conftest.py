"""Fixtures of the storage tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.jobs_testing import JobsWorld
from tests.storage.postgres import database


@pytest.fixture(params=["sqlite", "postgres"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[JobsWorld]:
    """A job store on a database of its own, of each kind in turn."""
    with database(request.param) as url:
        world = JobsWorld(tmp_path, url=url)
        yield world
        world.close()
