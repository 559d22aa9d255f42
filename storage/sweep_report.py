"""What a sweep did, or would do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class SweepKind(StrEnum):
    RESULTS = "results"
    SAMPLES = "samples"
    RAY_TRAIN = "ray_train"
    STAGING = "staging"
    UNFINISHED = "unfinished"
    KEPT = "kept"
    PROBES = "probes"
    MULTIPART = "multipart"
    TEMPORARY = "temporary"


@dataclass(frozen=True)
class Swept:
    """`resource` is an id, never a key. `age_s` is what the TTL of its kind was compared with."""

    kind: SweepKind
    resource: str
    objects: int
    size_bytes: int
    age_s: float


@dataclass(frozen=True)
class SweepFailure:
    """`code` is of one of our errors."""

    kind: str
    resource: str
    code: str


@dataclass(frozen=True)
class SweepReport:
    """`kept_live` groups were old enough and belong to a job that runs, or that a running job uses."""

    dry_run: bool
    swept: tuple[Swept, ...]
    failures: tuple[SweepFailure, ...]
    kept_live: int

    def totals(self) -> dict[str, dict[str, int]]:
        """Objects and bytes by kind."""
        totals: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"groups": 0, "objects": 0, "size_bytes": 0})
        for one in self.swept:
            total = totals[one.kind.value]
            total["groups"] += 1
            total["objects"] += one.objects
            total["size_bytes"] += one.size_bytes
        return dict(totals)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "totals": self.totals()}
