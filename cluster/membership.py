"""One instance in a Ray cluster that others started and use too: its place there, and the actors that it leaves.

Use it where Ray is initialised.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import list_named_actors
from tenacity import Retrying, retry_if_exception_type, retry_if_result, stop_after_delay, wait_fixed

from storage.actor import NAMESPACE, storage_actor_name
from storage.breaker_actor import BREAKER_NAME
from storage.jobs_client import ACTOR_NAME as JOBS_NAME

logger = logging.getLogger(__name__)

PLACE_NAME = "instance"
PLACE_WITHIN_S = 30.0
ANSWER_WITHIN_S = 10.0
GONE_WITHIN_S = 10.0
POLL_S = 0.2


class ClusterTakenError(Exception):
    """Another instance lives in this cluster. `home` is its data folder."""

    def __init__(self, home: str) -> None:
        super().__init__(f"the instance in {home} uses this cluster")
        self.home = home


class _LeavingError(Exception):
    """The name of an instance's place outlives it for a moment."""


class _Place:
    """Not detached: Ray ends it with the process that made it, however that ends."""

    def __init__(self, home: str) -> None:
        self._home = home

    def home(self) -> str:
        return self._home


class Membership:
    """The one place for an instance in a cluster, held until `leave` or this process's end."""

    def __init__(self, place: Any, namespace: str) -> None:
        self._place = place
        self._namespace = namespace

    @classmethod
    def join(cls, home: str, *, namespace: str = NAMESPACE) -> Membership:
        """Raises ClusterTakenError while another process holds the place."""
        trying = Retrying(
            stop=stop_after_delay(PLACE_WITHIN_S),
            wait=wait_fixed(POLL_S),
            retry=retry_if_exception_type(_LeavingError),
            reraise=True,
        )
        try:
            return cls(trying(_take_place, home, namespace), namespace)
        except _LeavingError:
            raise ClusterTakenError("a folder that it did not tell") from None

    def leave(self) -> None:
        ray.kill(self._place)

    def end_jobs_actor(self) -> None:
        """Trainings that run go on, and nobody takes their reports."""
        _end([JOBS_NAME], self._namespace)

    def end_actors(self) -> None:
        """End every actor that an instance makes to outlast its process, on all nodes."""
        ended = _end([name for name in _names(self._namespace) if _is_lasting(name)], self._namespace)
        if ended:
            logger.info("ended the actors %s", ", ".join(ended))


def nodes_alive() -> int:
    return sum(1 for node in ray.nodes() if node["Alive"])


def _take_place(home: str, namespace: str) -> Any:
    try:
        place = ray.remote(num_cpus=0)(_Place).options(name=PLACE_NAME, namespace=namespace).remote(home)
    except ValueError:
        raise _refused(namespace) from None
    ray.get(place.home.remote(), timeout=PLACE_WITHIN_S)
    return place


def _refused(namespace: str) -> Exception:
    try:
        holder = ray.get_actor(PLACE_NAME, namespace=namespace)
        return ClusterTakenError(str(ray.get(holder.home.remote(), timeout=ANSWER_WITHIN_S)))
    except (ValueError, RayActorError, GetTimeoutError):
        return _LeavingError()


def _names(namespace: str) -> list[str]:
    return [found["name"] for found in list_named_actors(all_namespaces=True) if found["namespace"] == namespace]


def _is_lasting(name: str) -> bool:
    return name in {JOBS_NAME, BREAKER_NAME} or name.startswith(storage_actor_name(""))


def _end(names: list[str], namespace: str) -> list[str]:
    """Kill them, and wait until Ray has taken note: a driver that leaves at once could take the request with it."""
    ended = []
    for name in names:
        try:
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
        except ValueError:
            logger.info("the actor %s has ended already", name)
        else:
            ended.append(name)
    waiting = Retrying(
        stop=stop_after_delay(GONE_WITHIN_S),
        wait=wait_fixed(POLL_S),
        retry=retry_if_result(bool),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    left = waiting(lambda: set(ended) & set(_names(namespace)))
    if left:
        logger.warning("the actors %s were told to end and are still there", ", ".join(sorted(left)))
    return ended
