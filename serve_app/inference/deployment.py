"""The Serve shell of inference: one replica on its GPU, its default model loaded before it counts as ready."""

from __future__ import annotations

import importlib
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serve_app.collaborators import Inference as InferencePort
from serve_app.collaborators import InferenceHealth
from serve_app.inference.plan import GenerationWork
from serve_app.refusals import log_refusals_in_one_line
from serve_app.settings import Settings

REPLICA_MODULE = "serve_app.inference.replica"


class Inference:
    """Implements `serve_app.collaborators.Inference`."""

    def __init__(self, settings: Settings) -> None:
        log_refusals_in_one_line()
        # By name, inside the replica: whoever builds the graph must not import torch.
        build: Any = importlib.import_module(REPLICA_MODULE).build_service
        self._service: InferencePort = build(settings)

    async def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        # At once: the caller counts the time of a generation from its first event.
        yield {"worker_id": socket.gethostname()}
        async with aclosing(self._service.generate(work)) as events:
            async for event in events:
                yield event

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the replica where this raises."""
        if not (await self._service.health()).ok:
            raise RuntimeError("an iteration of the engine does not end")

    async def health(self) -> InferenceHealth:
        return await self._service.health()
