"""What a generation record holds as its request, and what a replica is handed to work on. Plain JSON, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from train_jobs.generate_spec import GenerateSpec

STRENGTH = 0.8
"""Of a generation from a picture that names none."""


class ResolvedLora(BaseModel):
    """An adapter that was found at submission: by the `id` of the training it comes from, or by the `path` of its file,
    as the client wrote it. One of them is None; records from before there was `path` may have neither."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None
    path: str | None = None
    key: str
    sha256: str | None
    scale: float

    @property
    def name(self) -> str:
        """What a picture's settings call it."""
        return self.id or self.path or self.key


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
