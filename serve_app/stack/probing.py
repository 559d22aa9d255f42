"""Trying out, once the instance serves, what its S3 server can do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict

from storage.errors import StorageError
from storage.objects import Capabilities

logger = logging.getLogger(__name__)

RETRY_S = 60.0


class CapabilityProbe:
    """Asks until it has an answer, which goes to `tell` and into the log.

    What a server lacks needs no switch: calls that some server misunderstands are refused for every server
    (`storage.s3_client.ALLOWED_CALLS`), and nothing relies on conditional writes, tags or life cycle rules.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Capabilities]],
        tell: Callable[[dict[str, bool]], None],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._ask = ask
        self._tell = tell
        self._sleep = sleep

    async def run(self) -> None:
        """A server that does not answer is asked again a minute later. A fault of this program ends it, logged."""
        while True:
            try:
                found = asdict(await self._ask())
            except StorageError as error:
                logger.warning("the S3 server could not be tried out yet (%s)", error.code)
            except Exception:
                logger.exception("the S3 server could not be tried out")
                return
            else:
                logger.info("the S3 server: %s", described(found))
                self._tell(found)
                return
            await self._sleep(RETRY_S)


def described(capabilities: Mapping[str, bool]) -> str:
    """In words: what is there, and what is not."""
    there = [_words(name) for name, has in capabilities.items() if has]
    lacking = [_words(name) for name, has in capabilities.items() if not has]
    return f"has {', '.join(there) or 'nothing'}; lacks {', '.join(lacking) or 'nothing'}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("etag", "ETag")
