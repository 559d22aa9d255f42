"""What the HTTP side needs of its neighbours. Each is a Ray handle or client in production, a plain object in tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from serve_app.dispatch.rates import Claim, Grant, Rate
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, Settled
from serve_app.inference.plan import GenerationWork, StartingPoint
from storage.async_jobs import AsyncJobsApi
from storage.imported_loras import ImportedLora

Clock = Callable[[], datetime]
"""Now, aware, in UTC."""


JobsApi = AsyncJobsApi
"""The job records: `storage.jobs_actor.JobsClient` across Ray, `storage.async_jobs.AsyncJobs` in one process."""


@dataclass(frozen=True)
class TrainingPlan:
    """A training request that was understood. `spec` is a TrainSpec as JSON; `places` is where in the request its
    fields come from, as far as something may be found out about them later."""

    spec: dict[str, Any]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationPlan:
    """A generation request that was understood.

    `spec` is a GenerateSpec as JSON whose `loras` name trainings; `lora_paths` are the adapters given by key instead.
    `strength` is the one asked for; `start` is there once the pictures it speaks of are stored.
    """

    spec: dict[str, Any]
    lora_paths: tuple[tuple[str, float], ...]
    warnings: tuple[str, ...]
    from_config: bool
    strength: float | None = None
    start: StartingPoint | None = None


class Validation(Protocol):
    """Checks that cost time. All raise InvalidRequest or ConfigInvalid with every problem found."""

    async def training(self, config: str | dict[str, Any]) -> TrainingPlan: ...
    async def training_check(self, config: str | dict[str, Any]) -> dict[str, Any]:
        """What each key of a training config would do, and what the training would be; raises InvalidRequest (size)."""
        ...

    async def training_spec(self, spec: dict[str, Any]) -> TrainingPlan:
        """Like `training`, for a TrainSpec as JSON."""
        ...

    async def generation(self, tenant: str, process_id: str, payload: dict[str, Any]) -> GenerationPlan:
        """Pictures to start from are stored below `process_id` when this returns; also raises StorageError."""
        ...

    async def finish_lora_import(self, tenant: str, lora_id: str) -> ImportedLora:
        """Verify a staged adapter. Raises ImportedLoraNotFound, LoraFileInvalid, StorageError."""
        ...

    async def store_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Check and store an upload; returns the reply's fields."""
        ...

    async def create_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]: ...
    async def finalize_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]: ...
    async def bundle(self, tenant: str, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Stored files as one stored zip; None where they are too much for one."""
        ...


@dataclass(frozen=True)
class DispatchLoad:
    """`running`: generations that the dispatcher holds now; `slots`: how many it may hold."""

    running: int
    slots: int


class Dispatch(Protocol):
    """The dispatcher, and what lives beside it: the reply table and the rate limits."""

    async def wake(self) -> None:
        """Something was queued; a hint, the dispatcher also looks by itself."""
        ...

    async def load(self) -> DispatchLoad: ...
    async def open_reply(self, tenant: str, runpod_id: str, opening: Opening) -> str: ...
    async def hear_from(self, owner: str) -> list[tuple[str, str]]: ...
    async def reopen_reply(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened: ...
    async def settle_reply(self, ended: EndedReply) -> Settled | None: ...
    async def cancel_reply(self, tenant: str, runpod_id: str) -> Reply | None: ...
    async def count_replies(self, tenant: str) -> dict[str, int]: ...
    async def keep_replies(self, ended: Sequence[EndedReply]) -> None: ...
    async def hand_over_reply(self, tenant: str, runpod_id: str, *, to: str) -> bool: ...
    async def wait_reply(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None: ...
    async def drain_reply(self, tenant: str, runpod_id: str) -> bool: ...
    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant: ...


@dataclass(frozen=True)
class InferenceHealth:
    """`device`: cpu or cuda, or none where no replica was asked; `gpu_name` None without one. Memory in bytes."""

    ok: bool
    device: str
    gpu_name: str | None
    models_loaded: tuple[str, ...]
    gpu_memory_total_bytes: int | None = None
    gpu_memory_used_bytes: int | None = None


class Inference(Protocol):
    """A replica that makes pictures."""

    def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        """Yields `{"progress": {...}}` while at work and `{"output": {...}}` at the end; across Ray, first of all
        `{"worker_id": ...}` when a replica has taken it.

        Raises errors of `diffusion`, `storage` and `serve_app`. Closing the iterator, or cancelling its consumer,
        stops the work at the next denoising step.
        """
        ...

    async def health(self) -> InferenceHealth: ...


@dataclass(frozen=True)
class WorkerCounts:
    """The replicas that make pictures, by RunPod's names for their states."""

    idle: int = 0
    initializing: int = 0
    ready: int = 0
    running: int = 0
    throttled: int = 0
    unhealthy: int = 0


class Workers(Protocol):
    async def counts(self) -> WorkerCounts: ...
