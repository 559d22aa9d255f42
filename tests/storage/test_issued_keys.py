"""Rows of API keys, on either database."""

import pytest

from storage.errors import ApiKeyNotFound, RecordConflict
from storage.jobs_testing import JobsWorld


def test_a_key_is_added_once_and_revoked_once(world: JobsWorld) -> None:
    first = world.jobs.add_key("key_1", "ada", "a", "0" * 64)
    assert world.jobs.add_key("key_1", "ada", "a", "0" * 64) == first
    revoked = world.jobs.revoke_key("key_1")
    assert revoked.revoked_at == world.clock.now
    world.clock.advance(5)
    assert world.jobs.revoke_key("key_1") == revoked
    assert world.jobs.issued_keys(valid_only=True) == []
    assert world.jobs.issued_keys(valid_only=False) == [revoked]


def test_keys_outlive_a_restart_newest_first(world: JobsWorld) -> None:
    for number in range(3):
        world.jobs.add_key(f"key_{number}", "ada", "a", f"{number}" * 64)
        world.clock.advance(1)
    world.restart()
    assert [key.id for key in world.jobs.issued_keys(valid_only=True)] == ["key_2", "key_1", "key_0"]


def test_two_keys_are_never_the_same(world: JobsWorld) -> None:
    world.jobs.add_key("key_1", "ada", "a", "0" * 64)
    with pytest.raises(RecordConflict):
        world.jobs.add_key("key_2", "ada", "a", "0" * 64)


def test_a_key_that_is_not_there_cannot_be_revoked(world: JobsWorld) -> None:
    with pytest.raises(ApiKeyNotFound):
        world.jobs.revoke_key("key_1")


def test_a_use_of_a_key_never_moves_back_and_an_unknown_one_is_nothing(world: JobsWorld) -> None:
    world.jobs.add_key("key_1", "ada", "a", "0" * 64)
    world.clock.advance(60)
    world.jobs.note_key_uses(["key_1", "key_2"])
    at = world.clock.now
    world.clock.advance(-30)
    world.jobs.note_key_uses(["key_1"])
    assert [(key.id, key.last_used_at) for key in world.jobs.issued_keys(valid_only=False)] == [("key_1", at)]
