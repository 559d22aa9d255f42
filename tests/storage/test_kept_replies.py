"""Replies kept for idempotency keys, and outputs that are forgotten before their files go."""

import pytest

from storage.errors import IdempotencyConflict, IdempotencyInFlight, IllegalTransition, JobNotFound
from storage.job_state import JobKind, JobState
from storage.jobs_testing import JobsWorld
from storage.kept_replies import KeptReply

REPLY = KeptReply(202, '{"id": 1}')


def test_the_first_request_goes_ahead_and_the_second_gets_its_reply_also_after_a_restart(world: JobsWorld) -> None:
    assert world.jobs.open_reply("t", "k", "same", hold_s=60) is None
    world.jobs.keep_reply("t", "k", "same", REPLY, kept_s=100)
    world.restart()
    assert world.jobs.open_reply("t", "k", "same", hold_s=60) == REPLY


def test_a_key_stands_for_one_request(world: JobsWorld) -> None:
    world.jobs.open_reply("t", "k", "one", hold_s=60)
    with pytest.raises(IdempotencyInFlight):
        world.jobs.open_reply("t", "k", "one", hold_s=60)
    with pytest.raises(IdempotencyConflict):
        world.jobs.open_reply("t", "k", "other", hold_s=60)
    assert world.jobs.open_reply("another tenant", "k", "other", hold_s=60) is None


def test_a_request_that_failed_frees_its_key(world: JobsWorld) -> None:
    world.jobs.open_reply("t", "k", "one", hold_s=60)
    world.jobs.drop_reply("t", "k")
    assert world.jobs.open_reply("t", "k", "other", hold_s=60) is None


def test_a_request_whose_process_died_holds_its_key_only_so_long(world: JobsWorld) -> None:
    world.jobs.open_reply("t", "k", "one", hold_s=60)
    world.clock.advance(61)
    assert world.jobs.open_reply("t", "k", "one", hold_s=60) is None


def test_a_kept_reply_is_forgotten_at_its_time(world: JobsWorld) -> None:
    world.jobs.open_reply("t", "k", "one", hold_s=60)
    world.jobs.keep_reply("t", "k", "one", REPLY, kept_s=100)
    world.clock.advance(101)
    assert world.jobs.open_reply("t", "k", "other", hold_s=60) is None


def test_outputs_are_dropped_from_ended_jobs_of_the_tenant_only(world: JobsWorld) -> None:
    record = world.running("driver", JobKind.TRAINING, tenant="t")
    with pytest.raises(IllegalTransition):
        world.jobs.drop_outputs(record.id, ("loras",), tenant="t")
    world.jobs.complete(record.id, "driver", {"loras": [{"key": "k"}], "steps": 3})
    with pytest.raises(JobNotFound):
        world.jobs.drop_outputs(record.id, ("loras",), tenant="other")
    dropped = world.jobs.drop_outputs(record.id, ("loras",), tenant="t")
    assert (dropped.state, dropped.output) == (JobState.COMPLETED, {"loras": [], "steps": 3})
    assert world.jobs.drop_outputs(record.id, ("loras",), tenant="t") == dropped
