"""The one state machine of a job. The RunPod statuses and the older process statuses are views of it."""

from __future__ import annotations

from enum import StrEnum

from storage.errors import IllegalTransition


class JobKind(StrEnum):
    TRAINING = "training"
    GENERATION = "generation"

    @property
    def id_prefix(self) -> str:
        return "train_" if self is JobKind.TRAINING else "gen_"


class JobState(StrEnum):
    QUEUED = "QUEUED"
    STARTING = "STARTING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES

    @property
    def is_leased(self) -> bool:
        """Whether a job in this state has an owner that must send heartbeats."""
        return self in LEASED_STATES


TERMINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT})
LEASED_STATES = frozenset({JobState.STARTING, JobState.RUNNING})

_INTERRUPTIONS = frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED, JobState.TIMED_OUT}),
    JobState.STARTING: _INTERRUPTIONS | {JobState.RUNNING},
    JobState.RUNNING: _INTERRUPTIONS | {JobState.COMPLETED},
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset(),
    JobState.TIMED_OUT: frozenset({JobState.QUEUED}),
}
"""Where each state may go. FAILED and TIMED_OUT leave only by a retry that a user asked for."""


def check_transition(job_id: str, source: JobState, target: JobState) -> None:
    """Raise IllegalTransition unless `source -> target` is in the table. Staying in a state is not a transition."""
    if target not in TRANSITIONS[source]:
        raise IllegalTransition(job_id, source.value, target.value)
