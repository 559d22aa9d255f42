"""A Ray cluster that an instance joins, with a Serve application of somebody else: a program that does what the lines
on its standard input say, and answers each with a line of JSON. It ends with its input."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.util import list_named_actors

from storage.jobs_client import JobsClient


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Neighbour:
    async def __call__(self, request: Any) -> str:
        return "still here"


def deploy() -> None:
    serve.run(Neighbour.bind(), name="neighbour", route_prefix="/neighbour")


def applications() -> list[str]:
    return sorted(serve.status().applications)


def actors() -> list[str]:
    return sorted(a["name"].partition("@")[0] for a in list_named_actors(True) if a["namespace"] == "raylora")


def training_slots() -> int:
    return asyncio.run(JobsClient().cluster_config()).training_slots


COMMANDS: dict[str, Callable[[], object]] = {
    command.__name__: command for command in (deploy, applications, actors, training_slots)
}


def main() -> None:
    context = ray.init(
        num_cpus=4,
        num_gpus=0,
        namespace="somebody",
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=sys.argv[1],
    )
    say(context.address_info["address"])
    for line in sys.stdin:
        say(COMMANDS[line.strip()]())
    ray.shutdown()


def say(answer: object) -> None:
    sys.stdout.write(f"\n@{json.dumps(answer)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
