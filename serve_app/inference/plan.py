"""What a generation record holds as its request, and what a replica is handed to work on. Plain JSON, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from train_jobs.generate_spec import GenerateSpec

STRENGTH = 0.8
"""Of a generation from a picture that names none."""


class ResolvedLora(BaseModel):
    """An adapter that was found at submission. `id` is the training it comes from, None for one given by key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None
    key: str
    sha256: str | None
    scale: float


class StoredPicture(BaseModel):
    """A picture that was checked at submission and stored with its process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    sha256: str


class StartingPoint(BaseModel):
    """What a generation begins with instead of noise. With a `mask`, only where that is light is anything changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    init_image: StoredPicture
    mask: StoredPicture | None = None
    strength: float = Field(default=STRENGTH, gt=0, le=1)


class GenerationRequest(BaseModel):
    """The `request` of a generation record: the validated spec with its seed chosen, and the keys of its files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: GenerateSpec
    loras: tuple[ResolvedLora, ...] = ()
    start: StartingPoint | None = None

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class GenerationWork:
    """One generation on its way to a replica. `request` is a GenerationRequest as JSON."""

    process_id: str
    tenant: str
    request: dict[str, Any]
