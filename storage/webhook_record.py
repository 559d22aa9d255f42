"""A webhook that a client asked for: where to, about what, and how often it was tried."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from storage.job_record import UtcTime

WEBHOOK_ATTEMPTS_MAX = 3
WEBHOOK_LEASE_S = 60.0
"""How long an attempt may take. A sender that does not say how it ended has died, and the attempt is over."""


class Webhook(BaseModel):
    """`job_id` None: it tells of a job without a record, whose status object is `body`, as its sender notes one.

    `due_at` None: the job has not ended, or its end was told (`done_at`). Each final state of a job is a `round`, and
    has a message id of its own; the attempts at telling it share that id, by which a receiver knows a repetition.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    job_id: str | None = None
    tenant: str
    url: str = Field(repr=False)
    input: dict[str, Any] = Field(repr=False)
    body: dict[str, Any] | None = Field(default=None, repr=False)
    round: int = 1
    attempts: int = 0
    due_at: UtcTime | None = None
    done_at: UtcTime | None = None

    @property
    def message_id(self) -> str:
        return f"msg_{self.id}.{self.round}"


def retry_delay_s(attempts: int) -> float:
    """How long to wait after that many failed attempts: 10, 20, 40 s and so on."""
    return 10.0 * 2.0 ** (attempts - 1)
