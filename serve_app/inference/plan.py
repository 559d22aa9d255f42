"""What a generation record holds as its request, and what a replica is handed to work on. Plain JSON, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from train_jobs.spec import GenerateSpec


class ResolvedLora(BaseModel):
    """An adapter that was found at submission. `id` is the training it comes from, None for one given by key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None
    key: str
    sha256: str | None
    scale: float


class GenerationRequest(BaseModel):
    """The `request` of a generation record: the validated spec with its seed chosen, and the adapters' keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: GenerateSpec
    loras: tuple[ResolvedLora, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class GenerationWork:
    """One generation on its way to a replica. `request` is a GenerationRequest as JSON."""

    process_id: str
    tenant: str
    request: dict[str, Any]
