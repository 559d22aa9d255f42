"""Any order of calls, expiries and restarts against a model: no job is lost, none has two owners or two ends."""

import itertools
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from storage.errors import (
    IdempotencyConflict,
    IllegalTransition,
    JobError,
    JobNotCancellable,
    JobNotRetryable,
    LeaseLost,
)
from storage.job_state import TRANSITIONS, JobKind, JobState
from storage.jobs_testing import JobsWorld
from tests.storage.postgres import REASON, database, server

LEASE_S = 30.0
ATTEMPTS_MAX = 2
# Not a sum of the steps that time takes, so that no comparison is at its edge.
TTL_S = LEASE_S / 3 + 0.0005
CANCEL_GRACE_S, TIMEOUT_GRACE_S = 120.0, 60.0
OWNERS = st.sampled_from(["w1", "w2"])
# Mostly the rightful owner calls, or the histories would hold little but refusals.
CALLERS = st.sampled_from([None, None, None, "w1", "w2"])
TENANTS = st.sampled_from(["a", "b"])


@dataclass
class Expected:
    """What the life cycle promised about a job so far, and the moments since its last retry."""

    tenant: str
    order: int
    state: JobState = JobState.QUEUED
    owner: str | None = None
    lease_until: float = 0.0
    cancel: bool = False
    attempt: int = 1
    attempts_max: int = ATTEMPTS_MAX
    finals: list[JobState] = field(default_factory=list)
    queued_at: float = 0.0
    ttl_s: float | None = None
    cancel_at: float = 0.0

    def has_expired(self, now: float) -> bool:
        return self.ttl_s is not None and self.queued_at + self.ttl_s <= now


class JobsMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    kind = "sqlite"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.stack = ExitStack()
        self.world = JobsWorld(Path(self.folder.name), url=self.stack.enter_context(database(self.kind)))
        self.model: dict[str, Expected] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}
        self.order = itertools.count()
        self.now = 0.0

    def teardown(self) -> None:
        self.world.close()
        self.stack.close()
        self.folder.cleanup()

    def time_passes_a_little(self) -> None:
        self.now += 0.001
        self.world.clock.advance(0.001)

    @rule(target=jobs, tenant=TENANTS, ttl_s=st.sampled_from([None, TTL_S]))
    def create(self, tenant: str, ttl_s: float | None) -> str:
        self.time_passes_a_little()
        record = self.world.create(tenant=tenant, attempts_max=ATTEMPTS_MAX, ttl_s=ttl_s)
        self.model[record.id] = Expected(tenant, next(self.order), queued_at=self.now, ttl_s=ttl_s)
        return record.id

    @rule(target=jobs, tenant=TENANTS, key=st.sampled_from(["k1", "k2"]), body=st.sampled_from(["x", "y"]))
    def create_with_key(self, tenant: str, key: str, body: str) -> object:
        self.time_passes_a_little()
        known = self.keys.get((tenant, key))
        try:
            record = self.world.create(tenant=tenant, attempts_max=ATTEMPTS_MAX, idempotency_key=key, body_sha256=body)
        except IdempotencyConflict:
            assert known is not None
            assert known[1] != body
            return multiple()
        if known is not None:
            assert (record.id, body) == known
            return multiple()
        self.keys[tenant, key] = (record.id, body)
        self.model[record.id] = Expected(tenant, next(self.order), queued_at=self.now)
        return record.id

    @rule(owner=OWNERS, limit=st.integers(1, 3))
    def claim(self, owner: str, limit: int) -> None:
        claimed = self.world.jobs.claim(JobKind.GENERATION, owner, limit=limit, lease_s=LEASE_S)
        queued = [job for job in self.model.values() if job.state is JobState.QUEUED]
        assert len(claimed) == min(limit, len(queued))
        for record in claimed:
            expected = self.model[record.id]
            # The oldest of its tenant, among those that this claim left behind.
            assert all(job.order >= expected.order for job in queued if job.tenant == expected.tenant)
            queued.remove(expected)
            assert expected.state is JobState.QUEUED
            expected.state, expected.owner = JobState.STARTING, owner
            expected.lease_until = self.now + LEASE_S

    @rule(job=jobs, caller=CALLERS)
    def start(self, job: str, caller: str | None) -> None:
        expected = self.model[job]
        owner = caller or expected.owner or "w1"
        if self._refused(expected, owner, lambda: self.world.jobs.start(job, owner, lease_s=LEASE_S)):
            return
        if expected.state is JobState.STARTING:
            expected.state = JobState.RUNNING
            expected.lease_until = self.now + LEASE_S

    @rule(job=jobs, caller=CALLERS, step=st.integers(0, 9))
    def heartbeat(self, job: str, caller: str | None, step: int) -> None:
        expected = self.model[job]
        owner = caller or expected.owner or "w1"

        def beat() -> None:
            answer = self.world.jobs.heartbeat(job, owner, progress={"step": step}, lease_s=LEASE_S)
            assert answer.cancel_requested == expected.cancel
            assert answer.timed_out == expected.has_expired(self.now)

        if not self._refused(expected, owner, beat):
            expected.lease_until = self.now + LEASE_S
            assert self.world.jobs.get(job).progress == {"step": step}

    @rule(job=jobs, caller=CALLERS, how=st.sampled_from(["complete", "fail", "cancelled", "timed_out"]))
    def settle(self, job: str, caller: str | None, how: str) -> None:
        expected, jobs = self.model[job], self.world.jobs
        owner = caller or expected.owner or "w1"
        calls = {
            "complete": lambda: jobs.complete(job, owner, {"by": owner}),
            "fail": lambda: jobs.fail(job, owner, "code", "text"),
            "cancelled": lambda: jobs.cancelled(job, owner),
            "timed_out": lambda: jobs.timed_out(job, owner),
        }
        target = {
            "complete": JobState.COMPLETED,
            "fail": JobState.FAILED,
            "cancelled": JobState.CANCELLED,
            "timed_out": JobState.TIMED_OUT,
        }[how]
        if expected.state is target and self.world.jobs.get(job).settled_by == owner:
            assert calls[how]().state is target
        elif not self._refused(expected, owner, calls[how], target):
            self._end(expected, target)

    @rule(job=jobs, caller=CALLERS)
    def fail_retryably(self, job: str, caller: str | None) -> None:
        expected = self.model[job]
        owner = caller or expected.owner or "w1"
        if not self._refused(expected, owner, lambda: self.world.jobs.fail(job, owner, "code", "text", retryable=True)):
            self._interrupt(expected)

    @rule(job=jobs, caller=CALLERS)
    def hand_back(self, job: str, caller: str | None) -> None:
        expected = self.model[job]
        owner = caller or expected.owner or "w1"
        if self._refused(expected, owner, lambda: self.world.jobs.hand_back(job, owner)):
            return
        if expected.cancel:
            self._end(expected, JobState.CANCELLED)
        elif expected.has_expired(self.now):
            self._end(expected, JobState.TIMED_OUT)
        else:
            expected.state, expected.owner = JobState.QUEUED, None

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        expected = self.model[job]
        try:
            self.world.jobs.request_cancel(job, tenant=expected.tenant)
        except JobNotCancellable:
            assert expected.state.is_terminal
            assert expected.state is not JobState.CANCELLED
            return
        if expected.state is JobState.QUEUED:
            self._end(expected, JobState.CANCELLED)
        elif expected.state.is_leased and not expected.cancel:
            expected.cancel, expected.cancel_at = True, self.now

    @rule(job=jobs)
    def retry(self, job: str) -> None:
        expected = self.model[job]
        # A retry is queued behind what was created before it, by the clock, which therefore must not stand still.
        self.time_passes_a_little()
        try:
            self.world.jobs.retry(job, tenant=expected.tenant)
        except JobNotRetryable:
            assert expected.state not in {JobState.FAILED, JobState.TIMED_OUT}
            return
        assert expected.state in {JobState.FAILED, JobState.TIMED_OUT}
        expected.state, expected.cancel = JobState.QUEUED, False
        expected.attempt += 1
        expected.attempts_max = max(expected.attempts_max, expected.attempt)
        expected.order, expected.queued_at = next(self.order), self.now
        expected.finals.clear()

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.world.clock.advance(seconds)

    @rule()
    def reap(self) -> None:
        due = {job for job, it in self.model.items() if self._is_overdue(it)}
        assert {record.id for record in self.world.jobs.reap()} == due
        for job in due:
            expected = self.model[job]
            if expected.state is JobState.QUEUED:
                self._end(expected, JobState.TIMED_OUT)
            elif expected.cancel and expected.cancel_at + CANCEL_GRACE_S <= self.now:
                self._end(expected, JobState.CANCELLED)
            elif expected.has_expired(self.now - TIMEOUT_GRACE_S):
                self._end(expected, JobState.TIMED_OUT)
            else:
                self._interrupt(expected)

    def _is_overdue(self, expected: Expected) -> bool:
        if expected.state is JobState.QUEUED:
            return expected.has_expired(self.now)
        return expected.state.is_leased and (
            expected.lease_until <= self.now
            or (expected.cancel and expected.cancel_at + CANCEL_GRACE_S <= self.now)
            or expected.has_expired(self.now - TIMEOUT_GRACE_S)
        )

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @invariant()
    def the_records_are_what_was_promised(self) -> None:
        shown = {
            record.id: record for tenant in ("a", "b") for record in self.world.jobs.list(tenant, limit=1000).records
        }
        assert set(shown) == set(self.model)
        for job, expected in self.model.items():
            record = shown[job]
            assert (record.state, record.attempt, record.tenant) == (expected.state, expected.attempt, expected.tenant)
            assert record.lease_owner == (expected.owner if expected.state.is_leased else None)
            assert (record.finished_at is not None) == expected.state.is_terminal
            assert len(expected.finals) <= 1

    def _refused(self, expected: Expected, owner: str, call: object, target: JobState | None = None) -> bool:
        """Make the call. It must be refused exactly when the owner has no lease, or the state has no such step."""
        assert callable(call)
        error: JobError | None = None
        try:
            call()
        except (LeaseLost, IllegalTransition) as raised:
            error = raised
        if not expected.state.is_leased or expected.owner != owner:
            assert isinstance(error, LeaseLost)
        elif target is not None and target not in TRANSITIONS[expected.state]:
            assert isinstance(error, IllegalTransition)
        else:
            assert error is None
        return error is not None

    def _end(self, expected: Expected, state: JobState) -> None:
        expected.state, expected.owner = state, None
        expected.finals.append(state)

    def _interrupt(self, expected: Expected) -> None:
        if expected.cancel:
            self._end(expected, JobState.CANCELLED)
        elif expected.has_expired(self.now):
            self._end(expected, JobState.TIMED_OUT)
        elif expected.attempt >= expected.attempts_max:
            self._end(expected, JobState.FAILED)
        else:
            expected.state, expected.owner = JobState.QUEUED, None
            expected.attempt += 1


JobsMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyOrderOfCalls = JobsMachine.TestCase


class PostgresMachine(JobsMachine):
    kind = "postgres"


PostgresMachine.TestCase.settings = settings(JobsMachine.TestCase.settings, max_examples=8)


@pytest.mark.skipif(server() is None, reason=REASON)
class TestAnyOrderOfCallsOnPostgres(PostgresMachine.TestCase):  # type: ignore[misc, name-defined]
    pass
