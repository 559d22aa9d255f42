"""What only an operator does: commands that join the instance's Ray cluster instead of asking its HTTP side.

Whoever can reach the cluster may run code in it, so these need no further permission, and an API key is not enough.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from serve_app.cli.client import Unreachable
from serve_app.settings import Settings
from serve_app.stack.errors import NotRunning
from serve_app.stack.instance import Instance
from storage.breaker import BreakerMode
from storage.counters import Tally

if TYPE_CHECKING:
    from storage.jobs_config import JobsConfig
    from storage.sweep_report import SweepReport


def breaker(settings: Settings, mode: BreakerMode | None) -> dict[str, Any]:
    """Set the breaker where `mode` is given. Returns the storage health, and this node's counts as `counts`.

    Raises InstanceError, ApiError, StorageError, JobError; so does `sweep`.
    """
    with _joined(settings) as (_, config):
        return asyncio.run(_breaker(config, mode))


def sweep(settings: Settings, *, dry_run: bool) -> SweepReport:
    """Sweep once, here and now."""
    from serve_app.stack.sweeping import sweeper_of

    with _joined(settings) as (instance, config):
        return asyncio.run(sweeper_of(settings, instance, Tally(), config=config).run(dry_run=dry_run))


async def _breaker(config: JobsConfig, mode: BreakerMode | None) -> dict[str, Any]:
    from storage.actor import StorageClient

    client = StorageClient(config.s3, config.breaker)
    if mode is not None:
        await client.set_breaker(mode)
    return {**asdict(await client.health()), "counts": await client.counts()}


@contextmanager
def _joined(settings: Settings) -> Iterator[tuple[Instance, JobsConfig]]:
    """The cluster of a running instance, and the configuration it runs with."""
    import ray

    from storage.actor import NAMESPACE
    from storage.jobs_client import JobsClient

    instance = Instance(settings.home)
    state = instance.read_state()
    if instance.supervisor() is None or state is None or state.ray_address is None:
        raise NotRunning(instance.home)
    bring_token()
    try:
        ray.init(
            address=state.ray_address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            logging_level="ERROR",
        )
    except ConnectionError as error:
        raise Unreachable(state.ray_address) from error
    try:
        yield instance, asyncio.run(JobsClient().cluster_config())
    finally:
        ray.shutdown()


def bring_token() -> None:
    """Show the cluster this user's token, where there is one and the environment does not decide otherwise.

    Ray does so by itself only for a cluster that it finds itself, not for one that is named by its address.
    """
    from ray._private.authentication import authentication_token_setup

    # It warns that the cluster asks for a token, which every command would then say.
    with _silenced(authentication_token_setup.logger):
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before
