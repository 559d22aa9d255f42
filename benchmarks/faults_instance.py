"""What `faults.py` needs of one instance: processes to strike, the HTTP surface, evidence from outside of it."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve_app.stack.instance import Instance

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
TITLES = {
    "ingress replica": "ray::ServeReplica:raylora:Ingress",
    "validation replica": "ray::ServeReplica:raylora:Validation",
    "transfers replica": "ray::ServeReplica:raylora:Transfers",
    "inference replica": "ray::ServeReplica:raylora:Inference",
    "jobs actor": "ray::JobsActor",
    "storage actor": "ray::StorageShell",
    "training worker": "ray::RayTrainWorker",
}

# Every change of a job's state or result, noted by the database itself in the transaction that makes it.
WATCH = """
CREATE TABLE IF NOT EXISTS observed (n INTEGER PRIMARY KEY, job_id TEXT, state TEXT, attempt INT, by TEXT, output TEXT);
CREATE TRIGGER IF NOT EXISTS observed_insert AFTER INSERT ON jobs BEGIN
  INSERT INTO observed (job_id, state, attempt, by, output)
  VALUES (NEW.id, NEW.state, NEW.attempt, NEW.settled_by, NEW.output); END;
CREATE TRIGGER IF NOT EXISTS observed_update AFTER UPDATE ON jobs
  WHEN NEW.state != OLD.state OR NEW.output IS NOT OLD.output OR NEW.finished_at IS NOT OLD.finished_at BEGIN
  INSERT INTO observed (job_id, state, attempt, by, output)
  VALUES (NEW.id, NEW.state, NEW.attempt, NEW.settled_by, NEW.output); END;
"""


def wait_for(condition: Callable[[], Any], timeout_s: float, pause_s: float = 0.1) -> Any:
    """The condition's first true value; its last one where it stays false."""
    until = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(pause_s)
    return value


def victims(instance: Instance, victim: str) -> list[psutil.Process]:
    """The processes of this instance that the name stands for, alive."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if victim.startswith("S3"):
            is_one = "serve" in line and line[-1:] == [str(instance.s3_folder.resolve() / "objects")]
        else:
            is_one = bool(line) and line[0].startswith(TITLES[victim])
        if is_one and (victim.startswith("S3") or _is_below(process, instance)):
            found.append(process)
    return found


def _is_below(process: psutil.Process, instance: Instance) -> bool:
    """Whether the supervisor is among its ancestors, or Ray's session, which names the instance's home."""
    try:
        parents = process.parents()
        supervisor = instance.supervisor()
        if supervisor is not None and supervisor.pid in {parent.pid for parent in parents}:
            return True
        return any(Path(file.path).is_relative_to(instance.home) for file in process.open_files())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


@dataclass
class Answer:
    """`kind`: ok, refused (an error with a code), uncoded (an error that says nothing), broken (the connection ended),
    hung (no answer within the client's patience)."""

    kind: str
    status: int = 0
    code: str = ""
    body: dict[str, Any] = field(default_factory=dict)


class Client:
    """One API key's calls. What was answered is counted under `answers`, by kind and code."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"})
        self._files = httpx.Client()
        self.answers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def ask(self, method: str, path: str, *, json: Any = None, timeout_s: float = 60.0) -> Answer:
        answer = self._asked(method, f"/v2/local/{path}", json, timeout_s)
        with self._lock:
            self.answers[answer.kind if answer.kind in {"ok", "broken", "hung"} else self._named(answer)] += 1
        return answer

    def run(self, *, wait_s: float | None = None, **fields: Any) -> Answer:
        path = "run" if wait_s is None else f"runsync?wait={int(wait_s * 1000)}"
        return self.ask("POST", path, json={"input": fields}, timeout_s=30.0 + (wait_s or 0.0))

    def file(self, url: str) -> bytes:
        response = self._files.get(url, timeout=30.0)
        response.raise_for_status()
        return response.content

    def put(self, url: str, data: bytes, headers: dict[str, str]) -> bool:
        try:
            return self._files.put(url, content=data, headers=headers, timeout=30.0).is_success
        except httpx.HTTPError:
            return False

    def _named(self, answer: Answer) -> str:
        return f"{answer.kind} {answer.status} {answer.code}".strip()

    def _asked(self, method: str, path: str, body: Any, timeout_s: float) -> Answer:
        try:
            response = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.TimeoutException:
            return Answer("hung")
        except httpx.HTTPError:
            return Answer("broken")
        try:
            reply = response.json()
        except ValueError:
            return Answer("uncoded", response.status_code, "no JSON")
        if response.is_success and isinstance(reply, dict):
            output = reply.get("output")
            failed = str(output.get("error_type") or "") if isinstance(output, dict) and "error" in reply else ""
            return Answer("ok" if failed != "internal_error" else "uncoded", response.status_code, failed, reply)
        code = str(reply.get("code") or reply.get("error_type") or "") if isinstance(reply, dict) else ""
        is_coded = bool(code) and code != "internal_error"
        return Answer("refused" if is_coded else "uncoded", response.status_code, code, reply)


class Evidence:
    """The records as the database and the mirror hold them, read beside the instance."""

    def __init__(self, instance: Instance) -> None:
        self._database = instance.home / "records.db"
        self.objects = instance.s3_folder / "objects" / "raylora"
        with self._connect() as tx:
            tx.executescript(WATCH)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._database, timeout=30.0)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = self._connect()
        try:
            return connection.execute(sql, values).fetchall()
        finally:
            connection.close()

    def states(self, since_seq: int = 0) -> dict[str, str]:
        return {
            str(id_): str(state) for id_, state in self.query("SELECT id, state FROM jobs WHERE seq > ?", since_seq)
        }

    def last_seq(self) -> int:
        return int(self.query("SELECT coalesce(max(seq), 0) FROM jobs")[0][0])

    def record_id(self, runpod_id: str) -> str | None:
        rows = self.query("SELECT id FROM jobs WHERE runpod_id = ?", runpod_id)
        return str(rows[0][0]) if rows else None

    def state(self, job_id: str) -> str:
        return str(self.query("SELECT state FROM jobs WHERE id = ?", job_id)[0][0])

    def attempt(self, job_id: str) -> int:
        return int(self.query("SELECT attempt FROM jobs WHERE id = ?", job_id)[0][0])

    def step(self, job_id: str) -> int:
        rows = self.query("SELECT progress FROM jobs WHERE id = ?", job_id)
        progress = json.loads(rows[0][0] or "{}") if rows else {}
        return int(progress.get("step") or 0)

    def finals(self, job_id: str) -> list[str]:
        """Each time that the job was given a final state or a result, in order."""
        rows = self.query("SELECT state FROM observed WHERE job_id = ? ORDER BY n", job_id)
        return [str(state) for (state,) in rows if state in FINAL]

    def mirrored(self, job_id: str) -> str | None:
        try:
            return str(json.loads((self.objects / "raylora" / "processes" / f"{job_id}.json").read_bytes())["state"])
        except (OSError, ValueError):
            return None

    def files_of(self, job_id: str, folder: str) -> list[Path]:
        return [p for p in (self.objects / "raylora").glob(f"*/processes/{job_id}/{folder}/*") if p.is_file()]

    def uploaded(self) -> list[Path]:
        """Files of every data set that the work here uploads."""
        return list((self.objects / "raylora").glob("*/datasets/d*/*/*"))


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
