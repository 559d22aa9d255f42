from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict

import pytest

from serve_app.stack.background import Background
from serve_app.stack.probing import RETRY_S, CapabilityProbe, described
from storage.errors import StorageUnavailable
from storage.objects import Capabilities

RCLONE = Capabilities(False, True, True, True, False, False, False, False)


def asking(*results: Capabilities | Exception) -> Callable[[], Awaitable[Capabilities]]:
    remaining = list(results)

    async def ask() -> Capabilities:
        result = remaining.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return ask


async def test_a_server_that_is_away_is_asked_again_until_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    waits_s: list[float] = []
    told: list[dict[str, bool]] = []

    async def sleep(seconds: float) -> None:
        waits_s.append(seconds)

    caplog.set_level("INFO")
    away = StorageUnavailable("capabilities", 60)
    await CapabilityProbe(asking(away, away, RCLONE), told.append, sleep=sleep).run()

    assert waits_s == [RETRY_S] * 2
    assert told == [asdict(RCLONE)]
    assert "storage_unavailable" in caplog.text
    assert "lacks conditional writes, tags" in caplog.text


async def test_a_fault_of_ours_ends_the_asking_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, bool]] = []

    await CapabilityProbe(asking(KeyError("a bug")), told.append).run()

    assert told == []
    assert "could not be tried out" in caplog.text


def test_it_runs_beside_everything_else_and_is_stopped_while_it_waits() -> None:
    asked, told = threading.Event(), threading.Event()

    async def ask() -> Capabilities:
        asked.set()
        raise StorageUnavailable("capabilities", 60)

    background = Background("capabilities", CapabilityProbe(ask, lambda _: told.set()).run)
    background.start()
    assert asked.wait(60)
    background.stop()
    assert not told.is_set()


def test_stopping_what_never_started_does_nothing() -> None:
    Background("nothing", CapabilityProbe(asking(), lambda _: None).run).stop()


@pytest.mark.parametrize(
    ("capabilities", "words"),
    [
        ({"ranged_reads": True, "answers_with_etag": True}, "has ranged reads, answers with ETag; lacks nothing"),
        ({"tags": False}, "has nothing; lacks tags"),
    ],
)
def test_capabilities_are_put_in_words(capabilities: dict[str, bool], words: str) -> None:
    assert described(capabilities) == words
