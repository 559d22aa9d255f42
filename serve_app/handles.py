"""The collaborators of `serve_app.collaborators`, over Ray Serve handles. The seam where Ray's errors become ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.collaborators import (
    DispatchLoad,
    GenerationPlan,
    Inference,
    InferenceHealth,
    TrainingPlan,
    WorkerCounts,
    Workers,
)
from serve_app.dispatch.rates import Claim, Grant, Rate
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, Settled
from serve_app.errors import ServiceUnavailable
from serve_app.inference.plan import GenerationWork
from serve_app.ingress.errors import unwrapped
from serve_app.transfers import TenantPlaces
from serve_app.validation.generations import named_pictures
from storage.imported_loras import ImportedLora

CALL_TIMEOUT_S = 15.0
# Stands before every request, and each replica can count by itself.
PERMITS_TIMEOUT_S = 0.5
VALIDATION_TIMEOUT_S = 60.0
# With the wait for a place.
TRANSFER_TIMEOUT_S = 600.0
TRANSFER_PLACE_TIMEOUT_S = TRANSFER_TIMEOUT_S / 2
WAIT_MARGIN_S = 10.0
DISPATCH, INFERENCE, TRANSFERS, VALIDATION = "dispatch", "inference", "transfers", "validation"


async def answer(part: str, response: Any, timeout_s: float) -> Any:
    """The response's value; who is cancelled cancels the call too. Raises the replica's own error, or
    ServiceUnavailable where no replica answered in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await response
    except RayTaskError as error:
        # Without the remote traceback around it, which must not reach a client or a log.
        raise unwrapped(error) from None
    except TimeoutError:
        response.cancel()
        raise ServiceUnavailable(part) from None
    except asyncio.CancelledError:
        # Whoever wanted it has gone, or cancelled the job that it was for.
        response.cancel()
        raise
    except (RayError, RayServeException):
        raise ServiceUnavailable(part) from None


class HandleValidation:
    """`Validation` over the handles of two deployments of it: `transfers` is the one for what moves bytes."""

    def __init__(self, handle: Any, transfers: Any, places: TenantPlaces) -> None:
        self._handle = handle
        self._transfers = transfers
        self._places = places

    async def training(self, config: str | dict[str, Any]) -> TrainingPlan:
        plan: TrainingPlan = await answer(VALIDATION, self._handle.training.remote(config), VALIDATION_TIMEOUT_S)
        return plan

    async def training_check(self, config: str | dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = await answer(
            VALIDATION, self._handle.training_check.remote(config), VALIDATION_TIMEOUT_S
        )
        return report

    async def generation(self, tenant: str, process_id: str, payload: dict[str, Any]) -> GenerationPlan:
        plan: GenerationPlan
        if named_pictures(payload):
            plan = await self._transfer(self._transfers.generation.remote, tenant, process_id, payload)
        else:
            response = self._handle.generation.remote(tenant, process_id, payload)
            plan = await answer(VALIDATION, response, VALIDATION_TIMEOUT_S)
        return plan

    async def training_spec(self, spec: dict[str, Any]) -> TrainingPlan:
        plan: TrainingPlan = await answer(VALIDATION, self._handle.training_spec.remote(spec), VALIDATION_TIMEOUT_S)
        return plan

    async def finish_lora_import(self, tenant: str, lora_id: str) -> ImportedLora:
        lora: ImportedLora = await self._transfer(self._transfers.finish_lora_import.remote, tenant, lora_id)
        return lora

    async def store_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = await self._transfer(self._transfers.store_upload.remote, tenant, payload)
        return reply

    async def create_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        response = self._handle.create_upload.remote(tenant, payload)
        reply: dict[str, Any] = await answer(VALIDATION, response, VALIDATION_TIMEOUT_S)
        return reply

    async def finalize_upload(self, tenant: str, payload: dict[str, Any]) -> dict[str, Any]:
        reply: dict[str, Any] = await self._transfer(self._transfers.finalize_upload.remote, tenant, payload)
        return reply

    async def bundle(self, tenant: str, files: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        stored: dict[str, Any] | None = await self._transfer(self._transfers.bundle.remote, tenant, list(files))
        return stored

    async def _transfer(self, send: Callable[..., Any], tenant: str, *arguments: Any) -> Any:
        """Raises TooManyUploads, and what `answer` raises."""
        clock_s = asyncio.get_running_loop().time
        until_s = clock_s() + TRANSFER_TIMEOUT_S
        async with self._places.taken(tenant):
            return await answer(TRANSFERS, send(tenant, *arguments), until_s - clock_s())


class HandleDispatch:
    """`Dispatch` over the handle of its deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def wake(self) -> None:
        await answer(DISPATCH, self._handle.wake.remote(), CALL_TIMEOUT_S)

    async def load(self) -> DispatchLoad:
        load: DispatchLoad = await answer(DISPATCH, self._handle.load.remote(), CALL_TIMEOUT_S)
        return load

    async def open_reply(self, tenant: str, runpod_id: str, opening: Opening) -> str:
        response = self._handle.open_reply.remote(tenant, runpod_id, opening)
        return str(await answer(DISPATCH, response, CALL_TIMEOUT_S))

    async def hear_from(self, owner: str) -> list[tuple[str, str]]:
        stopped: list[tuple[str, str]] = await answer(DISPATCH, self._handle.hear_from.remote(owner), CALL_TIMEOUT_S)
        return stopped

    async def reopen_reply(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened:
        response = self._handle.reopen_reply.remote(tenant, runpod_id, owner=owner, kept_s=kept_s)
        reopened: Reopened = await answer(DISPATCH, response, CALL_TIMEOUT_S)
        return reopened

    async def settle_reply(self, ended: EndedReply) -> Settled | None:
        response = self._handle.settle_reply.remote(ended)
        settled: Settled | None = await answer(DISPATCH, response, CALL_TIMEOUT_S)
        return settled

    async def cancel_reply(self, tenant: str, runpod_id: str) -> Reply | None:
        response = self._handle.cancel_reply.remote(tenant, runpod_id)
        reply: Reply | None = await answer(DISPATCH, response, CALL_TIMEOUT_S)
        return reply

    async def count_replies(self, tenant: str) -> dict[str, int]:
        counts: dict[str, int] = await answer(DISPATCH, self._handle.count_replies.remote(tenant), CALL_TIMEOUT_S)
        return counts

    async def keep_replies(self, ended: Sequence[EndedReply]) -> None:
        await answer(DISPATCH, self._handle.keep_replies.remote(list(ended)), CALL_TIMEOUT_S)

    async def hand_over_reply(self, tenant: str, runpod_id: str, *, to: str) -> bool:
        response = self._handle.hand_over_reply.remote(tenant, runpod_id, to=to)
        return bool(await answer(DISPATCH, response, CALL_TIMEOUT_S))

    async def wait_reply(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None:
        response = self._handle.wait_reply.remote(tenant, runpod_id, timeout_s)
        reply: Reply | None = await answer(DISPATCH, response, timeout_s + WAIT_MARGIN_S)
        return reply

    async def drain_reply(self, tenant: str, runpod_id: str) -> bool:
        return bool(await answer(DISPATCH, self._handle.drain_reply.remote(tenant, runpod_id), CALL_TIMEOUT_S))

    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
        response = self._handle.take_permits.remote(key, operation, rate, claim)
        grant: Grant = await answer(DISPATCH, response, PERMITS_TIMEOUT_S)
        return grant


class HandleInference:
    """`Inference` over the handle of its deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        """Unbounded in time: the job's own time limit is kept by the dispatcher's heartbeats."""
        response = self._streams.generate.remote(work)
        try:
            async for event in response:
                yield event
        except RayTaskError as error:
            raise unwrapped(error) from None
        except (RayError, RayServeException):
            raise ServiceUnavailable(INFERENCE) from None
        finally:
            # Nothing to cancel after a normal end; otherwise this is what stops the replica.
            response.cancel()

    async def health(self) -> InferenceHealth:
        health: InferenceHealth = await answer(INFERENCE, self._handle.health.remote(), CALL_TIMEOUT_S)
        return health


class RestingInference:
    """`Inference` of replicas that may be none: to ask one for its health would start it, or keep it from ending, so
    they are asked only while they have work."""

    def __init__(self, inference: Inference, workers: Workers) -> None:
        self._inference = inference
        self._workers = workers

    def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        return self._inference.generate(work)

    async def health(self) -> InferenceHealth:
        """Of replicas at rest, `device` is "none"."""
        counts = await self._workers.counts()
        if counts.running == 0:
            return InferenceHealth(ok=counts.unhealthy == 0, device="none", gpu_name=None, models_loaded=())
        return await self._inference.health()


class ServeWorkers:
    """Counts the inference replicas as Serve's controller sees them, and their work as the dispatcher does."""

    def __init__(self, dispatch: HandleDispatch, application: str, deployment: str) -> None:
        self._dispatch = dispatch
        self._application = application
        self._deployment = deployment

    async def counts(self) -> WorkerCounts:
        """Raises ServiceUnavailable."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                states, load = await asyncio.gather(asyncio.to_thread(self._replica_states), self._dispatch.load())
        except (TimeoutError, RayError, RayServeException):
            raise ServiceUnavailable(INFERENCE) from None
        return worker_counts(states, load)

    def _replica_states(self) -> Mapping[str, int]:
        application = serve.status().applications.get(self._application)
        deployment = None if application is None else application.deployments.get(self._deployment)
        return {} if deployment is None else {str(state): count for state, count in deployment.replica_states.items()}


def worker_counts(states: Mapping[str, int], load: DispatchLoad) -> WorkerCounts:
    """`states`: Serve's replica states to their number. A running replica is `ready`, and `idle` where it has no work.

    At most as many replicas work as there are generations under way; some may share one that has their adapters.
    """
    states = {name.rsplit(".", 1)[-1].upper(): count for name, count in states.items()}
    ready = states.get("RUNNING", 0)
    running = min(ready, load.running)
    initializing = sum(states.get(name, 0) for name in ("STARTING", "RECOVERING", "UPDATING", "PENDING_MIGRATION"))
    return WorkerCounts(
        idle=ready - running,
        initializing=initializing,
        ready=ready,
        running=running,
        unhealthy=sum(states.values()) - ready - initializing - states.get("STOPPING", 0),
    )
