"""How long a command goes on asking a server that cannot answer at present, and what it says meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

# The restart of an instance, or of what stands before it, takes about a minute.
PATIENCE_S = 300.0
PAUSE_MAX_S = 15.0

T = TypeVar("T")


class Patience:
    """Asks again until there is an answer, or none for `total_s`. `tell` hears of it when the waiting begins."""

    def __init__(
        self,
        tell: Callable[[str], None],
        *,
        total_s: float = PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._tell = tell
        self._total_s = total_s
        self._sleep = sleep
        self._pause = wait_random_exponential(multiplier=0.5, max=PAUSE_MAX_S)

    def of(self, ask: Callable[[], T], passes: Callable[[BaseException], bool]) -> T:
        """The value of `ask`; its last error where none comes, or one that does not pass by itself.

        An error that has a `retry_after_s` is waited for at least so long.
        """
        retrying = Retrying(
            retry=retry_if_exception(passes),
            wait=self._wait_s,
            stop=self._is_over,
            before_sleep=self._say,
            sleep=self._sleep,
            reraise=True,
        )
        return retrying(ask)

    def _wait_s(self, state: RetryCallState) -> float:
        error = None if state.outcome is None else state.outcome.exception()
        asked_s = getattr(error, "retry_after_s", None)
        return max(self._pause(state), asked_s or 0.0)

    def _is_over(self, state: RetryCallState) -> bool:
        waited_s = max(state.idle_for, state.seconds_since_start or 0.0)
        return waited_s + state.upcoming_sleep > self._total_s

    def _say(self, state: RetryCallState) -> None:
        if state.attempt_number == 1:
            self._tell(f"The server cannot answer at present; asking again for up to {self._total_s / 60:.0f} minutes.")
