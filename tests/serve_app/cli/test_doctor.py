from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.cli.doctor import breaker_finding, capabilities_finding, diagnose
from serve_app.settings import Settings

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


@pytest.mark.parametrize(
    ("fields", "name", "advice"),
    [
        ({"host": "localhost2.invalid", "port": 18998}, "port 18998", "RAYLORA_HOST"),
        ({"s3_host": "203.0.113.9", "s3_port": 18997}, "port 18997", "RAYLORA_S3_HOST"),
    ],
)
def test_a_host_that_is_none_is_not_told_as_a_busy_port(
    tmp_path: Path, fields: dict[str, object], name: str, advice: str
) -> None:
    found = {finding.name: finding for finding in diagnose(Settings(home=tmp_path, **fields))}  # type: ignore[arg-type]
    assert not found[name].ok
    assert "in use" not in found[name].found
    assert f"Set {advice}" in found[name].advice
