"""For tests: the whole HTTP side in one process, without Ray, over real validation, records and reply table.

Only the making of pictures is scripted, and objects are in memory.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import httpx
from fastapi import FastAPI
from PIL import Image
from pydantic import SecretStr

from serve_app.collaborators import (
    Clock,
    DispatchLoad,
    InferenceHealth,
    WorkerCounts,
)
from serve_app.dispatch.rates import Claim, Grant, Rate, RateLedger
from serve_app.dispatch.replies import ReplyTable
from serve_app.dispatch.reply import EndedReply, Opening, Reopened, Reply, Settled
from serve_app.inference.plan import GenerationRequest, GenerationWork
from serve_app.ingress.api import create_app
from serve_app.ingress.auth import KeyRing
from serve_app.job_types.context import Services
from serve_app.outbound import Outbound
from serve_app.settings import TINY_MODEL, RequestLimits
from serve_app.validation.service import ValidationService
from serve_app.validation.validator import Validator
from serve_app.webhook_secrets import WebhookSecrets
from storage.async_jobs import AsyncJobs, AsyncJobsApi
from storage.jobs import Jobs
from storage.keys import Keys
from storage.objects import ObjectStore
from storage.testing import InMemoryStore

BUCKET, PREFIX = "bucket", "raylora"
TENANT, KEY = "matt", "key-of-matt"
OTHER_TENANT, OTHER_KEY = "matt2", "key-of-matt2"
MODELS = ("tiny", "org/model")


def keys_of(tenant: str) -> Keys:
    return Keys(PREFIX, tenant)


class LocalValidation(ValidationService):
    """Validation in this process, as its Serve shell runs it."""

    def __init__(self, store: ObjectStore, clock: Clock, outbound: Outbound | None = None) -> None:
        super().__init__(
            Validator(MODELS, "tiny", random_seed=lambda: 1234),
            store,
            keys_of,
            bucket=BUCKET,
            clock=clock,
            outbound=outbound or Outbound(any_address=False, timeout_s=5),
            url_expires_s=3600,
            models={"tiny": str(TINY_MODEL), "org/model": "/nowhere"},
        )


class LocalDispatch:
    """`Dispatch` over a reply table; `wakes` counts what a dispatcher would have been told."""

    def __init__(self, clock: Clock) -> None:
        self.replies = ReplyTable(clock)
        self.rates = RateLedger()
        self.wakes = 0

    async def wake(self) -> None:
        self.wakes += 1

    async def load(self) -> DispatchLoad:
        return DispatchLoad(running=0, slots=1)

    async def open_reply(self, tenant: str, runpod_id: str, opening: Opening) -> str:
        return self.replies.open(tenant, runpod_id, opening)

    async def hear_from(self, owner: str) -> list[tuple[str, str]]:
        return self.replies.hear_from(owner)

    async def reopen_reply(self, tenant: str, runpod_id: str, *, owner: str, kept_s: float) -> Reopened:
        return self.replies.reopen(tenant, runpod_id, owner=owner, kept_s=kept_s)

    async def settle_reply(self, ended: EndedReply) -> Settled | None:
        return self.replies.settle(ended)

    async def cancel_reply(self, tenant: str, runpod_id: str) -> Reply | None:
        return self.replies.cancel(tenant, runpod_id)

    async def count_replies(self, tenant: str) -> dict[str, int]:
        return self.replies.counts(tenant)

    async def keep_replies(self, ended: Sequence[EndedReply]) -> None:
        for one in ended:
            self.replies.keep(one)

    async def hand_over_reply(self, tenant: str, runpod_id: str, *, to: str) -> bool:
        return self.replies.hand_over(tenant, runpod_id, to=to)

    async def wait_reply(self, tenant: str, runpod_id: str, timeout_s: float) -> Reply | None:
        return await self.replies.wait(tenant, runpod_id, timeout_s)

    async def drain_reply(self, tenant: str, runpod_id: str) -> bool:
        return self.replies.drain(tenant, runpod_id)

    async def take_permits(self, key: str, operation: str, rate: Rate, claim: Claim) -> Grant:
        return self.rates.take(key, operation, rate, claim)


@dataclass
class ScriptedInference:
    """`Inference` whose pictures are their prompts' hashes, stored in `store`.

    `errors` are raised one per generation, first come first served; `gate`, where set, holds every generation after
    its first step, and so does a prompt that has the word `holds`. Until `free`, where set, no replica takes any.
    `asked`, `begun` and `stopped` list process ids.
    """

    store: ObjectStore
    errors: list[BaseException] = field(default_factory=list)
    gate: asyncio.Event | None = None
    free: asyncio.Event | None = None
    holds: str | None = None
    asked: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    healthy: bool = True

    async def generate(self, work: GenerationWork) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(work.process_id)
        if self.free is not None:
            await self.free.wait()
        self.begun.append(work.process_id)
        try:
            yield {"progress": {"step": 1, "total_steps": 2, "stage": "denoising"}}
            if self.gate is not None:
                await self.gate.wait()
            if self.holds is not None and self.holds in GenerationRequest.model_validate(work.request).spec.prompts[0]:
                await asyncio.Event().wait()
            if self.errors:
                raise self.errors.pop(0)
            yield {"output": {"images": [await self._picture(work)]}}
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped.append(work.process_id)
            raise

    async def health(self) -> InferenceHealth:
        return InferenceHealth(ok=self.healthy, device="cpu", gpu_name=None, models_loaded=("tiny",))

    async def _picture(self, work: GenerationWork) -> dict[str, Any]:
        spec = GenerationRequest.model_validate(work.request).spec
        data = spec.prompts[0].encode()
        sha256 = hashlib.sha256(data).hexdigest()
        key = keys_of(work.tenant).image(work.process_id, 0, sha256, "png")
        await self.store.put(key, data, content_type="image/png")
        return {
            "key": key,
            "filename": f"{work.process_id}_0000.png",
            "sha256": sha256,
            "size_bytes": len(data),
            "content_type": "image/png",
            "seed": spec.seed,
            "width": spec.width,
            "height": spec.height,
            "prompt": spec.prompts[0],
        }


class OneWorker:
    """`Workers`: a single idle replica."""

    async def counts(self) -> WorkerCounts:
        return WorkerCounts(idle=1, ready=1)


@dataclass
class LocalServer:
    """The application and everything behind it."""

    jobs: AsyncJobsApi
    store: InMemoryStore
    dispatch: LocalDispatch
    inference: ScriptedInference
    services: Services
    app: FastAPI

    @asynccontextmanager
    async def client(self, key: str | None = KEY, **options: Any) -> AsyncGenerator[httpx.AsyncClient, None]:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers, **options) as http:
            yield http


def local_server(jobs: Jobs, clock: Clock, limits: RequestLimits | None = None, **replaced: Any) -> LocalServer:
    """Two tenants with a key each. `replaced`: fields of Services to hand in instead. Needs a running event loop."""
    store = InMemoryStore(now=clock)
    dispatch, inference, async_jobs = LocalDispatch(clock), ScriptedInference(store), AsyncJobs(jobs)
    fields: dict[str, Any] = {
        "jobs": async_jobs,
        "store": store,
        "validation": LocalValidation(store, clock),
        "dispatch": dispatch,
        "inference": inference,
        "workers": OneWorker(),
        "clock": clock,
        "bucket": BUCKET,
        "prefix": PREFIX,
        "worker_id": "worker-1",
        "environment": {"server": "test"},
        "models": MODELS,
        "webhook_secrets": WebhookSecrets(b"key of the instance"),
        "limits": limits or RequestLimits(),
        "reads_older": TENANT,
    }
    services = Services(**{**fields, **replaced})
    ring = KeyRing({TENANT: SecretStr(KEY), OTHER_TENANT: SecretStr(OTHER_KEY)}, manager=TENANT)
    return LocalServer(async_jobs, store, dispatch, inference, services, create_app(services, ring))


def picture_base64(width_px: int = 8, height_px: int = 8, kind: str = "PNG", color: str = "red") -> str:
    buffer = BytesIO()
    Image.new("RGB", (width_px, height_px), color).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def text_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def upload_payload(folder: str = "cats", **fields: Any) -> dict[str, Any]:
    """A valid `upload_training_data`: one picture and its caption."""
    files = [
        {"filename": "1.png", "content": picture_base64(), "content_type": "image/png"},
        {"filename": "1.txt", "content": text_base64("a cat")},
    ]
    return {"type": "upload_training_data", "training_name": folder, "trigger_word": "ohwx", "files": files, **fields}


def train_config(folder: str = "cats", model: str = "tiny", **train: Any) -> dict[str, Any]:
    """A small ai-toolkit training config."""
    process = {
        "type": "sd_trainer",
        "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
        "datasets": [{"folder_path": f"/workspace/{folder}", "resolution": 64}],
        "train": {"steps": 10, "lr": 1e-4, **train},
        "model": {"name_or_path": model},
    }
    return {"job": "extension", "config": {"name": "my_lora", "process": [process]}}
