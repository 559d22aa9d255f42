from itertools import product

import pytest

from storage.errors import IllegalTransition
from storage.job_state import LEASED_STATES, TERMINAL_STATES, TRANSITIONS, JobKind, JobState, check_transition


def test_every_state_has_a_row_in_the_table():
    assert set(TRANSITIONS) == set(JobState)


@pytest.mark.parametrize(("source", "target"), list(product(JobState, JobState)))
def test_a_transition_passes_exactly_when_the_table_has_it(source: JobState, target: JobState):
    if target in TRANSITIONS[source]:
        check_transition("gen_000000000000", source, target)
        return
    with pytest.raises(IllegalTransition) as raised:
        check_transition("gen_000000000000", source, target)
    assert (raised.value.source, raised.value.target) == (source.value, target.value)


def test_a_final_state_is_left_only_towards_the_queue_and_never_after_success_or_cancel():
    for state in TERMINAL_STATES:
        assert TRANSITIONS[state] <= {JobState.QUEUED}
    assert not TRANSITIONS[JobState.COMPLETED]
    assert not TRANSITIONS[JobState.CANCELLED]


def test_only_running_work_completes():
    assert [state for state in JobState if JobState.COMPLETED in TRANSITIONS[state]] == [JobState.RUNNING]


def test_every_state_is_queued_leased_or_final():
    assert TERMINAL_STATES | LEASED_STATES | {JobState.QUEUED} == set(JobState)
    assert not TERMINAL_STATES & LEASED_STATES
    assert all(state.is_terminal == (state in TERMINAL_STATES) for state in JobState)


def test_ids_tell_the_kind():
    assert JobKind.TRAINING.id_prefix == "train_"
    assert JobKind.GENERATION.id_prefix == "gen_"
