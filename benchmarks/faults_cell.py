"""One blow of `faults.py`: work under way, a process killed or stopped, and the way back to a healthy instance."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from faults_instance import FINAL, TITLES, Client, Evidence, victims, wait_for
from faults_verdict import Judge, Verdict, end_of
from faults_work import Job, Work

from serve_app.stack.instance import Instance

STOPPED = "S3 server stopped"
NOT_MET = "the moment was not met"
VICTIMS = (*TITLES, "S3 server killed", STOPPED)
PHASES = ("idle", "upload", "queued", "running", "finishing")
STOP_S = 15.0
SETTLE_S = {"generation": 150.0, "training": 240.0}


class Cell:
    """One victim, one phase, one kind of work; from a healthy instance to a healthy instance.

    `baseline` are jobs of earlier cells, which must be found as they were. `at_once`: generations that one replica
    runs together; as many again wait in the phase "queued". `known` are files that were stored before.
    """

    def __init__(
        self,
        instance: Instance,
        evidence: Evidence,
        client: Client,
        work: Work,
        *,
        baseline: list[Job],
        known: set[str],
        at_once: int,
        name: tuple[str, str, str],
    ) -> None:
        self.victim, self.phase, self.work = name
        self._instance, self._evidence, self._client = instance, evidence, client
        self._given, self._baseline, self._known, self._at_once = work, baseline, known, at_once
        self.notes: list[str] = []
        self._struck = threading.Event()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._first_seq = evidence.last_seq()

    @property
    def jobs(self) -> list[Job]:
        return self._given.jobs

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._begin()
        self._in_background(self._poll)
        if not self._moment():
            self.notes.append(NOT_MET)
        struck = self._strike()
        recovered_s = self._recover(struck)
        wait_for(self._all_ended, SETTLE_S[self.work], 0.5)
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=90)
        result = self._result(self._verdict())
        return result | {"recovered_s": recovered_s, "took_s": round(time.monotonic() - began, 1)}

    # --- work

    def _begin(self) -> None:
        given = self._given
        if self.work == "training":
            given.submit_training()
            if self.phase == "queued":
                given.submit_training()
            if self.phase == "upload":
                # Uploads take all cores: begun before it, they would keep the training from its first step.
                wait_for(self._trains, 120.0)
        if self.phase == "upload":
            for upload in (given.upload_inline, given.upload_by_run, given.upload_presigned):
                self._in_background(self._repeated, upload)
        if self.work == "training":
            return
        if self.phase == "queued":
            for _ in range(3 * self._at_once):
                given.submit_generation(steps=40)
        elif self.phase in {"running", "finishing"}:
            steps = 60 if self.phase == "running" else 20
            for _ in range(self._at_once - 1):
                given.submit_generation(steps=steps)
            self._in_background(given.generate_and_wait, steps)

    def _repeated(self, upload: Callable[[], None]) -> None:
        """At least once, and until a moment after the blow, so that one is under way when it falls."""
        until = None
        while until is None or time.monotonic() < until:
            upload()
            if until is None and self._struck.is_set():
                until = time.monotonic() + 2.0
            time.sleep(0.05)

    # --- the blow

    def _moment(self) -> bool:
        """Wait until the work is where the phase wants it."""
        return bool(wait_for(self._is_the_moment, 120.0, 0.005 if self.phase in {"finishing", "upload"} else 0.05))

    def _is_the_moment(self) -> bool:
        if self.work == "training" and self.phase in {"idle", "queued"}:
            return bool(victims(self._instance, self.victim))
        if self.phase == "idle":
            return True
        if self.phase == "upload" and self.victim in {"ingress replica", "transfers replica"}:
            # One that was acknowledged and has not ended.
            return any(job.what == "upload" and job.reply is None and not job.ends for job in list(self.jobs))
        if self.phase == "upload":
            return any(str(path) not in self._known for path in self._evidence.uploaded()) and self._trains()
        states = self._evidence.states(self._first_seq)
        if self.phase == "queued":
            return "QUEUED" in states.values() and any(s in states.values() for s in ("STARTING", "RUNNING"))
        folder, least = ("lora", 3) if self.work == "training" else ("images", 2)
        if self.phase == "finishing":
            return any(self._evidence.files_of(job_id, folder) for job_id in states)
        return any(self._evidence.step(job_id) >= least for job_id, state in states.items() if state == "RUNNING")

    def _trains(self) -> bool:
        states = self._evidence.states(self._first_seq)
        return self.work != "training" or any(self._evidence.step(job_id) >= 1 for job_id in states)

    def _strike(self) -> float:
        """Returns when the instance could begin to recover."""
        struck = victims(self._instance, self.victim)
        if not struck:
            self.notes.append("there was nothing to strike")
        self._client.answers.clear()
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
            if self._given.generate_now() and self._given.upload_now():
                return round(time.monotonic() - struck, 1)
            time.sleep(0.2)
        self.notes.append("it did not recover within 150 s")
        return None

    # --- what became of it

    def _poll(self) -> None:
        """A client that asks for every job's state all the time, and remembers each end that it is told."""
        while not self._over.is_set():
            for job in list(self.jobs):
                answer = self._client.ask("GET", f"status/{job.id}")
                status = answer.body.get("status")
                if answer.kind == "ok" and status in FINAL and job.ends[-1:] != [status]:
                    job.ends.append(str(status))
            self._over.wait(0.5)

    def _all_ended(self) -> bool:
        told = all(job.ends or job.reply is not None for job in list(self.jobs))
        return told and all(state in FINAL for state in self._evidence.states(self._first_seq).values())

    def _verdict(self) -> Verdict:
        verdict = Verdict(notes=self.notes)
        judge = Judge(self._client, self._evidence)
        judge.of_records(verdict, self._first_seq)
        for job in self.jobs:
            judge.of_job(verdict, job)
            if job.reply is not None:
                verdict.ends[end_of(job)] += 1
        for job in self._baseline:
            judge.of_job(verdict, job, with_bytes=self.phase == "idle")
        return verdict

    def _result(self, verdict: Verdict) -> dict[str, Any]:
        attempts = [self._evidence.attempt(id_) for id_ in self._evidence.states(self._first_seq)]
        answers = dict(sorted(self._client.answers.items()))
        return {
            "victim": self.victim,
            "phase": self.phase,
            "work": self.work,
            "acknowledged": len(self.jobs),
            "ends": dict(verdict.ends),
            "attempts_max": max(attempts, default=0),
            "lost": verdict.lost,
            "doubled": verdict.doubled,
            "unverified": verdict.unverified,
            "answers": answers,
            "wrong_answers": sum(n for kind, n in answers.items() if kind.startswith("uncoded") or kind == "hung"),
            "notes": verdict.notes,
        }

    def _in_background(self, work: Callable[..., None], *args: Any) -> None:
        def guarded() -> None:
            try:
                work(*args)
            except Exception as error:  # noqa: BLE001 a fault of this program must be seen in the result
                self.notes.append(f"{work.__name__}: {type(error).__name__} {error}")

        thread = threading.Thread(target=guarded, daemon=True)
        self._threads.append(thread)
        thread.start()
