"""The application without Ray: one uvicorn, records on disk, objects in memory, pictures that cost nothing.

What a request costs above this is the way through Ray. `one_process.py FOLDER PORT`; the key is
`serve_app.testing.KEY`.
"""

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import uvicorn

from serve_app.dispatch.dispatcher import GenerationDispatcher
from serve_app.settings import OperationLimit, RateLimitSettings
from serve_app.testing import local_server
from storage.jobs import Jobs
from storage.records import Records


async def main(folder: Path, port: int) -> None:
    unlimited = OperationLimit(amount=10_000_000)
    limits = RateLimitSettings(**dict.fromkeys(RateLimitSettings.model_fields.keys() - {"window_s"}, unlimited))
    jobs = Jobs(Records(f"sqlite:///{folder / 'records.db'}"))
    server = local_server(jobs, lambda: datetime.now(UTC), rate_limits=limits)
    dispatcher = GenerationDispatcher(server.jobs, server.inference, owner="dispatcher", slots=2)
    wake = server.dispatch.wake

    async def wake_both() -> None:
        await wake()
        dispatcher.wake()

    server.dispatch.wake = wake_both  # type: ignore[method-assign]
    drawing = asyncio.create_task(dispatcher.run())
    await uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="error", access_log=False)).serve()
    drawing.cancel()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
