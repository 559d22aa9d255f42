"""RunPod's `policy` of a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Times in seconds. `low_priority` jobs run when nothing else waits."""

    execution_timeout_s: float | None = None
    ttl_s: float | None = None
    low_priority: bool = False

    @property
    def priority(self) -> int:
        return -1 if self.low_priority else 0
