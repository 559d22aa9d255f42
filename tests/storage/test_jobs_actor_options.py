"""What Ray is told about the jobs actor."""

from storage.jobs_actor import HEAD_NODE, actor_options


def test_it_stays_on_the_head_whose_dashboard_takes_the_trainings():
    # Ray gives this resource to the head alone, and restarts the actor where its resources are.
    assert actor_options("any")["resources"][HEAD_NODE] > 0
