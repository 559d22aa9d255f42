import asyncio
from collections.abc import AsyncIterator

import pytest

from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.testing import LocalServer


@pytest.fixture
async def working(server: LocalServer) -> AsyncIterator[LocalServer]:
    """The server with a dispatcher at work, so that queued generations are drawn."""
    dispatcher = GenerationDispatcher(
        server.jobs, server.inference, owner="dispatcher-1", slots=2, poll_s=0.01, heartbeat_s=0.01
    )
    task = asyncio.create_task(dispatcher.run())
    yield server
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
