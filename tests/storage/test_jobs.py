import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from storage.errors import (
    IdempotencyConflict,
    IllegalTransition,
    InvalidCursor,
    JobNotFound,
    LeaseLost,
    RecordConflict,
)
from storage.job_record import JobRecord, NewJob
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld

GENERATION, TRAINING = JobKind.GENERATION, JobKind.TRAINING


# --- creation


def test_a_new_job_is_queued_with_an_id_of_its_kind(world: JobsWorld):
    record = world.create(TRAINING, request={"name": "x"}, timeout_s=60, priority=3)
    assert record.id.startswith("train_")
    assert len(record.id) == len("train_") + 12
    assert (record.state, record.attempt, record.request, record.priority) == (JobState.QUEUED, 1, {"name": "x"}, 3)
    assert record.created_at == record.queued_at == record.updated_at == world.clock.now
    assert world.jobs.get(record.id) == record


def test_a_creation_repeated_with_its_id_returns_the_first_record(world: JobsWorld):
    first = world.create(job_id="gen_0123456789ab")
    assert world.create(job_id="gen_0123456789ab", request={"prompt": "a dog"}) == first
    assert world.jobs.counts()[JobState.QUEUED] == 1


def test_an_id_of_another_tenant_is_not_shown(world: JobsWorld):
    world.create(job_id="gen_0123456789ab", tenant="matt")
    with pytest.raises(JobNotFound):
        world.create(job_id="gen_0123456789ab", tenant="matt2")


def test_the_same_key_and_body_return_the_first_record(world: JobsWorld):
    first = world.create(idempotency_key="k", body_sha256="a")
    world.clock.advance(10)
    assert world.create(idempotency_key="k", body_sha256="a") == first


def test_the_same_key_with_another_body_is_a_conflict(world: JobsWorld):
    world.create(idempotency_key="k", body_sha256="a")
    with pytest.raises(IdempotencyConflict):
        world.create(idempotency_key="k", body_sha256="b")


def test_a_key_belongs_to_its_tenant(world: JobsWorld):
    first = world.create(idempotency_key="k", body_sha256="a")
    second = world.create(idempotency_key="k", body_sha256="b", tenant="other")
    assert first.id != second.id


def test_a_key_is_forgotten_after_its_time(world: JobsWorld):
    first = world.create(idempotency_key="k", body_sha256="a")
    world.clock.advance(world.policy.idempotency_ttl_s)
    assert world.create(idempotency_key="k", body_sha256="b").id != first.id


def test_keys_survive_a_restart(world: JobsWorld):
    first = world.create(idempotency_key="k", body_sha256="a")
    world.restart()
    assert world.create(idempotency_key="k", body_sha256="a") == first


def test_a_hundred_identical_creations_at_once_make_one_record(world: JobsWorld):
    records = _in_threads(100, lambda: world.create(idempotency_key="k", body_sha256="a"))
    assert len({record.id for record in records}) == 1
    assert world.jobs.counts()[JobState.QUEUED] == 1


def test_two_processes_with_the_same_database_make_one_record(world: JobsWorld, tmp_path: Path):
    other = JobsWorld(tmp_path, url=world.url)
    turns = iter([world, other] * 20)
    records = _in_threads(40, lambda: next(turns).create(idempotency_key="k", body_sha256="a"))
    assert len({record.id for record in records}) == 1
    other.close()


def test_a_taken_runpod_id_is_refused(world: JobsWorld):
    world.create(runpod_id="abc-u1")
    with pytest.raises(RecordConflict):
        world.create(runpod_id="abc-u1")


def test_parts_of_a_new_job_that_do_not_fit_are_refused():
    for fields in (
        {"submission_id": "s"},
        {"idempotency_key": "k"},
        {"job_id": "train_0123456789ab"},
        {"job_id": "../../etc"},
        {"timeout_s": 0},
        {"tenant": ""},
    ):
        with pytest.raises(ValueError):
            NewJob.model_validate({"kind": "generation", "tenant": "default", "request": {}} | fields)


def test_a_diverged_number_in_a_request_or_progress_becomes_null(world: JobsWorld):
    record = world.running("w1", request={"lr": float("inf")})
    world.jobs.heartbeat(record.id, "w1", progress={"loss": float("nan"), "history": [1.0, float("-inf")]})
    read = world.jobs.get(record.id)
    assert read.request == {"lr": None}
    assert read.progress == {"loss": None, "history": [1.0, None]}


# --- reading


def test_a_job_of_another_tenant_does_not_exist(world: JobsWorld):
    record = world.create(tenant="matt", runpod_id="r")
    calls: list[Callable[[], object]] = [
        lambda: world.jobs.get(record.id, tenant="matt2"),
        lambda: world.jobs.get_by_runpod_id("r", tenant="matt2"),
        lambda: world.jobs.request_cancel(record.id, tenant="matt2"),
        lambda: world.jobs.retry(record.id, tenant="matt2"),
        lambda: world.jobs.get("gen_ffffffffffff"),
        lambda: world.jobs.heartbeat("gen_ffffffffffff", "w1"),
    ]
    for call in calls:
        with pytest.raises(JobNotFound):
            call()
    assert world.jobs.get_by_runpod_id("r", tenant="matt") == record
    assert world.jobs.list("matt2").records == ()


def test_paging_shows_every_record_once_newest_first_though_new_ones_arrive(world: JobsWorld):
    made = []
    for number in range(7):
        made.append(world.create().id)
        world.clock.advance(number % 2)
    shown: list[str] = []
    cursor = None
    while True:
        page = world.jobs.list("default", limit=3, cursor=cursor)
        shown += [record.id for record in page.records]
        world.create()
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert shown == made[::-1]


def test_a_list_can_be_narrowed(world: JobsWorld):
    training = world.create(TRAINING)
    world.create()
    running = world.running("w1", priority=1)
    assert [r.id for r in world.jobs.list("default", kind=TRAINING).records] == [training.id]
    assert [r.id for r in world.jobs.list("default", states=[JobState.RUNNING]).records] == [running.id]


def test_a_cursor_that_is_not_ours_is_refused(world: JobsWorld):
    for cursor in ("x", "!!!", "äöü", "MjAyNg=="):
        with pytest.raises(InvalidCursor):
            world.jobs.list("default", cursor=cursor)


def test_counts_are_true_by_tenant_and_kind(world: JobsWorld):
    world.create()
    world.create(tenant="other")
    world.create(TRAINING)
    assert world.jobs.counts()[JobState.QUEUED] == 3
    assert world.jobs.counts("other") == dict.fromkeys(JobState, 0) | {JobState.QUEUED: 1}
    assert world.jobs.counts(kind=TRAINING)[JobState.QUEUED] == 1
    assert world.jobs.retried() == 0


def test_what_waits_is_known_by_tenant(world: JobsWorld):
    for tenant in ("default", "default", "other"):
        world.create(tenant=tenant)
    world.create(TRAINING, tenant="other")
    world.jobs.claim(GENERATION, "w1")
    assert world.jobs.queued(GENERATION) == {"default": 1, "other": 1}
    assert world.jobs.queued(TRAINING) == {"other": 1}


def test_what_waits_is_counted_without_a_look_at_any_other_job(tmp_path: Path):
    world = JobsWorld(tmp_path)
    statements = []
    with world.records.read("plan") as tx:
        sa.event.listen(tx._connection.engine, "after_cursor_execute", lambda *seen: statements.append(seen[2:4]))
        tx.queued(GENERATION)
        sql, values = statements[0]
        plan = str(tx._connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values).all())
    world.close()
    assert "USING COVERING INDEX jobs_queued" in plan


# --- queue


def test_a_claim_takes_priority_first_then_the_oldest(world: JobsWorld):
    low, second, first = world.create(priority=-1), world.create(), world.create(priority=9)
    assert [r.id for r in world.jobs.claim(GENERATION, "w1", limit=9)] == [first.id, second.id, low.id]


def test_tenants_take_turns_within_a_claim_and_from_claim_to_claim(world: JobsWorld):
    for tenant in ("a", "a", "a", "b", "c"):
        world.create(tenant=tenant)
    tenants = [record.tenant for record in world.jobs.claim(GENERATION, "w1", limit=2)]
    world.restart()
    while claimed := world.jobs.claim(GENERATION, "w1"):
        tenants.append(claimed[0].tenant)
    assert tenants == ["a", "b", "c", "a", "a"]


def test_a_claim_takes_only_its_kind(world: JobsWorld):
    world.create(TRAINING)
    assert world.jobs.claim(GENERATION, "w1") == []


def test_many_claimers_at_once_never_share_a_job(world: JobsWorld):
    made = {world.create().id for _ in range(30)}
    numbers = iter(range(60))
    claims = _in_threads(60, lambda: world.jobs.claim(GENERATION, f"w{next(numbers)}"))
    claimed = [record for claim in claims for record in claim]
    assert len(claimed) == 30
    assert {record.id for record in claimed} == made
    assert all(world.jobs.get(record.id).lease_owner == record.lease_owner for record in claimed)


# --- the way of an owner


def test_work_goes_from_the_queue_to_its_result(world: JobsWorld):
    record = world.claimed("w1")
    assert (record.state, record.lease_owner) == (JobState.STARTING, "w1")
    world.clock.advance(5)
    record = world.jobs.start(record.id, "w1", worker_id="gpu-0")
    assert (record.state, record.started_at, record.worker_id) == (JobState.RUNNING, world.clock.now, "gpu-0")
    world.clock.advance(5)
    record = world.jobs.complete(record.id, "w1", {"images": []})
    assert (record.state, record.output, record.finished_at) == (JobState.COMPLETED, {"images": []}, world.clock.now)
    assert (record.lease_owner, record.lease_expires_at, record.settled_by) == (None, None, "w1")


def test_work_that_was_not_started_cannot_complete(world: JobsWorld):
    with pytest.raises(IllegalTransition):
        world.jobs.complete(world.claimed("w1").id, "w1", {})


def test_only_the_owner_moves_a_job(world: JobsWorld):
    job_id = world.running("w1").id
    calls: list[Callable[[], object]] = [
        lambda: world.jobs.heartbeat(job_id, "w2"),
        lambda: world.jobs.start(job_id, "w2"),
        lambda: world.jobs.attach(job_id, owner="w2", submission_id="s"),
        lambda: world.jobs.complete(job_id, "w2", {}),
        lambda: world.jobs.fail(job_id, "w2", "code", "text"),
        lambda: world.jobs.fail(job_id, "w2", "code", "text", retryable=True),
        lambda: world.jobs.hand_back(job_id, "w2"),
        lambda: world.jobs.cancelled(job_id, "w2"),
        lambda: world.jobs.timed_out(job_id, "w2"),
        lambda: world.jobs.adopt(job_id, "w2"),
        lambda: world.jobs.interrupt(job_id, "another submission", "code", "text"),
    ]
    before = world.jobs.get(job_id)
    for call in calls:
        with pytest.raises(LeaseLost):
            call()
    assert world.jobs.get(job_id) == before


def test_repeated_calls_of_the_owner_change_nothing(world: JobsWorld):
    record = world.running("w1")
    assert world.jobs.start(record.id, "w1") == record
    done = world.jobs.complete(record.id, "w1", {"a": 1})
    world.clock.advance(9)
    assert world.jobs.complete(record.id, "w1", {"a": 1}) == done
    with pytest.raises(LeaseLost):
        world.jobs.fail(record.id, "w1", "late", "too late")


def test_progress_after_the_end_is_ignored(world: JobsWorld):
    record = world.running("w1")
    done = world.jobs.complete(record.id, "w1", {})
    with pytest.raises(LeaseLost):
        world.jobs.heartbeat(record.id, "w1", progress={"step": 99})
    assert world.jobs.get(record.id) == done


def test_a_heartbeat_keeps_the_lease_and_reports(world: JobsWorld):
    record = world.running("w1")
    for step in range(10):
        world.clock.advance(20)
        beat = world.jobs.heartbeat(record.id, "w1", progress={"step": step})
        assert (beat.cancel_requested, beat.timed_out) == (False, False)
        assert world.jobs.reap() == []
    assert world.jobs.get(record.id).progress == {"step": 9}


def test_a_plain_heartbeat_is_no_change_that_anybody_sees(world: JobsWorld):
    record = world.running("w1")
    world.clock.advance(1)
    world.jobs.heartbeat(record.id, "w1")
    assert world.jobs.get(record.id).updated_at == record.updated_at


def test_updated_at_grows_though_the_clock_stands(world: JobsWorld):
    record = world.create()
    claimed = world.jobs.claim(GENERATION, "w1")[0]
    started = world.jobs.start(record.id, "w1")
    assert record.updated_at < claimed.updated_at < started.updated_at


def test_a_failure_is_final_with_its_reason(world: JobsWorld):
    record = world.jobs.fail(world.running("w1").id, "w1", "out_of_memory", "Too large.")
    assert record.state is JobState.FAILED
    assert record.error is not None
    assert (record.error.code, record.error.message) == ("out_of_memory", "Too large.")


def test_a_retryable_failure_queues_until_the_attempts_are_used_up(world: JobsWorld):
    job_id = world.create(attempts_max=2).id
    for attempt, state in ((1, JobState.QUEUED), (2, JobState.FAILED)):
        world.jobs.claim(GENERATION, "w1")
        world.jobs.start(job_id, "w1")
        record = world.jobs.fail(job_id, "w1", "broken", "It broke.", retryable=True)
        assert (record.state, record.attempt) == (state, 2), attempt
    assert record.error is not None
    assert record.error.message == "It broke. The job was given up after 2 attempts."
    assert world.jobs.retried() == 1


def test_an_interrupted_job_keeps_its_place_in_the_queue(world: JobsWorld):
    first = world.running("w1")
    world.clock.advance(1)
    world.create()
    world.jobs.fail(first.id, "w1", "broken", "It broke.", retryable=True)
    assert world.jobs.claim(GENERATION, "w2")[0].id == first.id


def test_a_job_that_is_handed_back_waits_at_its_old_place_as_the_same_attempt(world: JobsWorld):
    first = world.running("w1")
    world.clock.advance(1)
    world.create()
    handed_back = world.jobs.hand_back(first.id, "w1")
    assert (handed_back.state, handed_back.attempt, handed_back.started_at) == (JobState.QUEUED, 1, None)
    assert world.jobs.claim(GENERATION, "w2")[0].id == first.id


def test_a_job_that_is_handed_back_out_of_time_has_timed_out(world: JobsWorld):
    job_id = world.create(timeout_s=10).id
    world.jobs.claim(GENERATION, "w1")
    world.jobs.start(job_id, "w1")
    world.clock.advance(11)
    assert world.jobs.hand_back(job_id, "w1").state is JobState.TIMED_OUT


def test_one_more_attempt_is_given_once_however_often_it_is_asked_for(world: JobsWorld):
    running = world.running("w1", attempts_max=1)
    world.create(attempts_max=1)
    other = world.running("driver", JobKind.TRAINING, attempts_max=1)

    assert [record.id for record in world.jobs.leased(GENERATION)] == [running.id]
    given = [world.jobs.allow_attempts(running.id, 2) for _ in range(2)]
    assert [record.attempts_max for record in given] == [2, 2]
    assert given[0] == given[1]
    assert world.jobs.allow_attempts(running.id, 1).attempts_max == 2

    world.clock.advance(60)
    world.jobs.reap()
    again = world.jobs.get(running.id)
    assert (again.state, again.attempt) == (JobState.QUEUED, 2)
    assert world.jobs.get(other.id).state is JobState.FAILED


def test_changes_are_announced_after_they_were_committed(world: JobsWorld):
    seen: list[JobRecord] = []
    world.jobs.on_change = lambda record: seen.append(world.jobs.get(record.id))
    record = world.running("w1")
    world.jobs.heartbeat(record.id, "w1")
    world.jobs.heartbeat(record.id, "w1", progress={"step": 1})
    world.jobs.complete(record.id, "w1", {})
    assert [r.state.value for r in seen] == ["QUEUED", "STARTING", "RUNNING", "RUNNING", "COMPLETED"]


def _in_threads(count: int, work: Callable[[], object]) -> list:
    """The results of `count` calls that begin together. Raises the first error."""
    barrier = threading.Barrier(count)

    def call() -> object:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(call) for _ in range(count)]
    return [future.result() for future in futures]
