from __future__ import annotations

import pytest

from serve_app.cli.doctor import breaker_finding, capabilities_finding

HEALTHY = {"ok": True, "breaker": "closed", "breaker_mode": "automatic", "retry_after_s": None}


def test_a_healthy_storage_is_fine() -> None:
    finding = breaker_finding(HEALTHY)

    assert (finding.ok, finding.found) == (True, "closed (automatic)")


def test_an_open_breaker_says_when_it_is_tried_again() -> None:
    finding = breaker_finding(
        {**HEALTHY, "ok": False, "breaker": "open", "error": "storage_unavailable", "retry_after_s": 41.6}
    )

    assert not finding.ok
    assert "42 s" in finding.advice


@pytest.mark.parametrize("mode", ["forced_open", "forced_closed"])
def test_what_an_operator_forced_is_pointed_out_even_while_all_works(mode: str) -> None:
    finding = breaker_finding({**HEALTHY, "breaker_mode": mode})

    assert not finding.ok
    assert "raylora breaker auto" in finding.advice


def test_what_the_s3_server_lacks_is_said_and_is_no_fault() -> None:
    finding = capabilities_finding({"ranged_reads": True, "tags": False})

    assert (finding.ok, finding.found) == (True, "has ranged reads; lacks tags")
    assert capabilities_finding(None).ok


def test_a_server_that_reads_no_parts_is_a_fault() -> None:
    assert not capabilities_finding({"ranged_reads": False}).ok
