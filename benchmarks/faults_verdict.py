"""What became of the work that `faults.py` disturbed, from what clients were told and what the instance holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from faults_instance import FINAL, Client, Evidence, sha256_of, wait_for
from faults_work import Job

MIRROR_S = 20.0


@dataclass
class Verdict:
    """`lost`: has no final state. `doubled`: was given two, or told otherwise than it is recorded. `unverified`:
    COMPLETED without the bytes that it names. `ends`: jobs by their end and its reason. `notes`: what else was seen."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class Judge:
    """Asks the instance, as one client, for the end of every job."""

    def __init__(self, client: Client, evidence: Evidence) -> None:
        self._client, self._evidence = client, evidence

    def of_records(self, verdict: Verdict, since_seq: int) -> None:
        """Judge every record made after `since_seq`, also those of requests that got no answer."""
        for record_id, state in self._evidence.states(since_seq).items():
            finals = self._evidence.finals(record_id)
            if len(finals) > 1:
                verdict.doubled.append(f"{record_id}: {finals}")
            if state not in FINAL:
                verdict.lost.append(f"{record_id} is {state} for ever")
            elif not wait_for(partial(self._is_mirrored, record_id, state), MIRROR_S):
                verdict.notes.append(f"{record_id} is {state} and its mirror {self._evidence.mirrored(record_id)}")

    def of_job(self, verdict: Verdict, job: Job, *, with_bytes: bool = True) -> None:
        """Judge an acknowledged job; a job whose reply is not known yet gets it here."""
        if job.reply is None:
            job.reply = wait_for(lambda: self._final_status(job.id), 10.0)
        if job.reply is None:
            verdict.lost.append(f"{job.what} {job.id}")
            return
        told = {*job.ends, job.reply["status"]}
        record_id = self._evidence.record_id(job.id)
        if record_id is not None:
            told.add(self._evidence.state(record_id))
        if len(told) > 1:
            verdict.doubled.append(f"{job.what} {job.id}: {sorted(told)}")
        if with_bytes and job.reply["status"] == "COMPLETED" and (problem := self._unverified(job, record_id)):
            verdict.unverified.append(f"{job.what} {job.id}: {problem}")

    def _is_mirrored(self, record_id: str, state: str) -> bool:
        return self._evidence.mirrored(record_id) == state

    def _final_status(self, runpod_id: str) -> dict[str, Any] | None:
        answer = self._client.ask("GET", f"status/{runpod_id}")
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
                data = self._client.file(item["url"])
                if (len(data), sha256_of(data)) != (item["size"], item["sha256"]):
                    return f"{item['filename']} has other bytes"
            if job.what == "generation" and record_id is not None:
                extra = len(self._evidence.files_of(record_id, "images")) - len(items)
                return f"{extra} pictures more than its result has" if extra else None
        except Exception as error:  # noqa: BLE001 whatever kept the bytes from being seen, they were not verified
            return type(error).__name__
        return None

    def _unlike_sent(self, job: Job, output: dict[str, Any]) -> str | None:
        named = {file["filename"]: file for file in output["uploaded_files"]}
        if named.keys() != job.sent.keys():
            return f"{len(named)} of {len(job.sent)} files"
        for name, sha256 in job.sent.items():
            answer = self._client.run(wait_s=30.0, type="download_by_key", s3_key=named[name]["s3_key"])
            data = self._client.file(answer.body["output"]["url"])
            if sha256_of(data) != sha256 or named[name]["sha256"] != sha256:
                return f"{name} has other bytes"
        return None


def end_of(job: Job) -> str:
    """A job's end and its reason, where it has one."""
    assert job.reply is not None
    if job.reply["status"] == "COMPLETED":
        return f"{job.what} COMPLETED"
    output = job.reply.get("output") or {}
    return f"{job.what} {job.reply['status']} ({output.get('error_type') or job.reply.get('error') or 'no reason'})"
