"""What must hold of an outage, and its table."""

from __future__ import annotations

import statistics
from argparse import Namespace
from typing import Any

from outage_load import CANCELLED, FAILED, OK, REFUSED_AT_ONCE, Load, Phase

from storage.breaker import Outcome
from storage.settings import BreakerSettings, S3Settings

# Scheduling on a busy machine, after the deadline has passed.
LATE_S = 1.0
MEMORY_GROWTH_MIB = 64.0
DEAD = ("refused", "503 SlowDown", "black hole")


def verdict(
    result: dict[str, Any], phases: list[Phase], options: Namespace, settings: S3Settings, breaker: BreakerSettings
) -> dict[str, bool]:
    """Every line must be true.

    A dead server feels the failures that open the breaker, a probe for each recovery time that has begun, and
    the attempts that were under way when it opened, which nobody can call back: as many as the callers have at once
    (`Load.attempts_at_once`). A probe whose caller goes away says nothing, so another one follows; it is told as
    neutral, and so are all attempts of callers who went away.
    """
    by_name = {phase.name: phase for phase in phases}
    under_way_max = Load.attempts_at_once(options.workers, settings)
    bounds = {}
    for name in DEAD:
        phase = by_name[name]
        probes = int(phase.lasted_s // breaker.recovery_s) + 1
        failures = phase.attempts.get(Outcome.FAILURE, 0)
        bounds[f"{name}: failures are {breaker.failure_threshold}, those under way and a probe each recovery time"] = (
            failures <= breaker.failure_threshold + under_way_max + probes
        )
        later = phase.later_attempts
        if later is not None:
            bounds[f"{name}: only probes once what was under way had ended"] = later[Outcome.FAILURE] <= probes
    recovery_max_s = breaker.recovery_s + breaker.sync_interval_s + options.attempt_s + LATE_S
    before, after = result["before"], result["after"]
    return {
        "no acknowledged object lost": result["lost"] == 0 and result["wrong_bytes"] == 0,
        "no call past its deadline": all(phase.beyond_deadline_s <= LATE_S for phase in phases),
        **bounds,
        "recovery within the recovery time and one probe": all(
            phase.recovered_after_s is not None and phase.recovered_after_s <= recovery_max_s for phase in phases[1:]
        ),
        "every place free": not any(after["held"].values()),
        "tasks back": after["actor_tasks"] <= before["actor_tasks"] and after["caller_tasks"] <= before["caller_tasks"],
        "memory back": after["actor_rss_mib"] <= before["actor_rss_mib"] + MEMORY_GROWTH_MIB,
    }


COLUMNS = (
    "fault", "lasted", "ok", "failed", "refused", "cancelled", "attempts", "failures", "requests", "opens after",
    "fails after p50", "max", "longest", "deadline", "recovers after",
)  # fmt: skip


def show(result: dict[str, Any], phases: list[Phase], verdicts: dict[str, bool]) -> None:
    rows = [COLUMNS, *(_row(phase) for phase in phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    before, after = result["before"], result["after"]
    print(f"\n{result['acknowledged']} objects acknowledged, {result['lost']} lost")
    print(f"{result['uploads_left']:.0f} unfinished uploads left for the sweeper")
    print(f"at the end the actor holds {after['held']}")
    for what in ("actor_tasks", "caller_tasks", "actor_rss_mib"):
        print(f"{what.replace('_', ' ')}: {before[what]:.0f} before, {after[what]:.0f} after")
    print(f"actor rss mib: {result['actor_rss_max_mib']:.0f} at most")
    for what, holds in verdicts.items():
        print(f"  {'ok   ' if holds else 'WRONG'} {what}")


def _row(phase: Phase) -> tuple[str, ...]:
    failed = phase.failed_after_s
    return (
        phase.name,
        f"{phase.lasted_s:.0f} s",
        *(str(phase.ended(end)) for end in (OK, FAILED, REFUSED_AT_ONCE, CANCELLED)),
        str(sum(phase.attempts.values())),
        str(phase.attempts.get(Outcome.FAILURE, 0)),
        "-" if phase.requests is None else str(phase.requests),
        _seconds(phase.opened_after_s),
        _seconds(statistics.median(failed) if failed else None),
        _seconds(max(failed, default=None)),
        _seconds(phase.longest_s),
        _seconds(phase.longest_deadline_s),
        _seconds(phase.recovered_after_s),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def as_json(phase: Phase) -> dict[str, Any]:
    failed = phase.failed_after_s
    return {
        **{name: value for name, value in vars(phase).items() if name not in {"failed_after_s", "calls"}},
        "calls": {operation: dict(ends) for operation, ends in phase.calls.items()},
        **{end: phase.ended(end) for end in (OK, FAILED, REFUSED_AT_ONCE, CANCELLED)},
        "failed_after_p50_s": statistics.median(failed) if failed else None,
        "failed_after_max_s": max(failed, default=None),
    }
