"""Starting a training's driver as a Ray job of its own.

The entrypoint is a shell command and holds nothing but the job's checked id; everything else is in its record.
No torch here: the HTTP side and the jobs actor import this module.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from storage.job_record import JOB_ID_PATTERN, submission_id_for

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0
STOP_WAIT_S = 20
SUBMISSION_ID_ENV = "RAYLORA_SUBMISSION_ID"
_MISSING = re.compile(r"status code 404\b|does not exist", re.IGNORECASE)


class _BoundedClient(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client waits for ever; this one for REQUEST_TIMEOUT_S a request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=REQUEST_TIMEOUT_S, **options)


class RayJobLauncher:
    """The jobs actor's `TrainingLauncher`, over the dashboard's job API.

    `env` is added to the driver's environment. Picklable. Methods raise RuntimeError, ConnectionError or a `requests`
    error when the cluster cannot be asked.
    """

    def __init__(
        self,
        dashboard_url: str,
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        client_factory: Callable[[str], Any] = _BoundedClient,
    ) -> None:
        self._dashboard_url = dashboard_url
        self._python = python
        self._env = dict(env or {})
        self._client_factory = client_factory
        self._client: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def submit(self, job_id: str, attempt: int) -> str:
        """Submit an attempt's driver and return its submission id; one that is there already is left as it is."""
        if not re.fullmatch(JOB_ID_PATTERN, job_id):
            raise ValueError("not a job id")
        submission_id = submission_id_for(job_id, attempt)
        if self.status(submission_id) != "UNKNOWN":
            return submission_id
        try:
            self._connected().submit_job(
                entrypoint=f"{shlex.quote(self._python)} -m train_jobs.run --process-id {job_id}",
                submission_id=submission_id,
                runtime_env={"env_vars": self._env_vars(submission_id)},
                metadata={"name": f"train_jobs {submission_id}", "process_id": job_id},
            )
        except RuntimeError:
            # Another submission of the same id may have won; a reply may have been lost.
            if self.status(submission_id) == "UNKNOWN":
                raise
        return submission_id

    def status(self, submission_id: str) -> str:
        """Ray's status of the job; UNKNOWN when the cluster has no such job."""
        try:
            status = self._connected().get_job_status(submission_id)
        except RuntimeError as error:
            if _MISSING.search(str(error)):
                return "UNKNOWN"
            raise
        return str(getattr(status, "value", status))

    def stop(self, submission_id: str) -> None:
        """Send the job its stop signal; it may have ended, or never been."""
        try:
            self._connected().stop_job(submission_id)
        except RuntimeError as error:
            if not _MISSING.search(str(error)):
                raise
            logger.info("nothing to stop: the cluster has no job %s", submission_id)

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._client_factory(self._dashboard_url)
        return self._client

    def _env_vars(self, submission_id: str) -> dict[str, str]:
        own = {
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            SUBMISSION_ID_ENV: submission_id,
            "PYTHONUNBUFFERED": "1",
        }
        path = python_path(os.environ.get("PYTHONPATH", ""))
        return own | ({"PYTHONPATH": path} if path else {}) | self._env


def python_path(inherited: str) -> str:
    """A PYTHONPATH on which `train_jobs` is found. An installed package needs none: site-packages stay where Python
    puts them, behind the standard library."""
    root = Path(__file__).resolve().parent.parent
    parts = [part for part in inherited.split(os.pathsep) if part]
    if "site-packages" not in root.parts and str(root) not in parts:
        parts.insert(0, str(root))
    return os.pathsep.join(parts)
