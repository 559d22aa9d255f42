"""How long what stops may take, from the inside out: each waits for those inside it.

A dispatcher learns that it is to stop only when the calls of the ingress replicas to it have ended. A generation that
it hands back must not have been lost with its replica before, which would cost it an attempt.
"""

from __future__ import annotations

# Of a replica without work of its own.
REPLICA_S = 10.0
# What an instance does beside ending the application: background work, Ray, left-over processes.
REST_S = 30.0
# A training that is told to stop ends after its next step, with a checkpoint.
TRAINING_S = 30.0


def inference_s(drain_s: float) -> float:
    """Of a replica that makes pictures, told to stop at the same time as the dispatcher."""
    return drain_s + 2 * REPLICA_S


def application_s(drain_s: float) -> float:
    """Of the dispatcher, and with it of the whole application."""
    return drain_s + 3 * REPLICA_S


def instance_s(drain_s: float) -> float:
    """From the request to stop to the end of all processes."""
    return application_s(drain_s) + TRAINING_S + REST_S
