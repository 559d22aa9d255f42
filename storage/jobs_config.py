"""Configuration of the job life cycle. It travels to the jobs actor, and from there to every submitted Ray job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from storage.job_record import DEFAULT_LEASE_S
from storage.jobs import JobsPolicy
from storage.settings import BreakerSettings, RecordsSettings, S3Settings


class JobsConfig(BaseModel):
    """`training_slots` Ray jobs of trainings run at a time, each with `training_workers` workers that hold
    `gpus_per_training_worker` (None: one where the cluster has GPUs) and `cpus_per_training_worker` of Ray's resources.
    `models` are the base models' folders on every node, by alias. `wandb_api_key` is what
    trainings that ask for Weights & Biases log in with. `reads_older` is the tenant for whom the older layout is
    readable.

    An owner that is asked to cancel has `cancel_grace_s`, one that is out of time `timeout_grace_s`, and a driver
    that settled its record `exit_grace_s` to end; afterwards its Ray job is stopped. A driver that does not adopt its
    record within `driver_start_timeout_s` of its Ray job's start is given up, and so is a training that could not be
    submitted `submit_attempts_max` times in a row. Calls wait at most `restore_wait_s` for an empty database to find
    its records in object storage; after that it goes on in the background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: RecordsSettings
    s3: S3Settings
    breaker: BreakerSettings = BreakerSettings()

    models: dict[str, str] = Field(default_factory=dict)
    training_slots: int = Field(default=1, ge=1)
    training_workers: int = Field(default=1, ge=1)
    gpus_per_training_worker: float | None = Field(default=None, ge=0)
    cpus_per_training_worker: float = Field(default=1.0, gt=0)
    wandb_api_key: SecretStr | None = None
    reads_older: str | None = None
    lease_s: float = Field(default=DEFAULT_LEASE_S, gt=0)
    cancel_grace_s: float = Field(default=120.0, ge=0)
    timeout_grace_s: float = Field(default=60.0, ge=0)
    exit_grace_s: float = Field(default=60.0, ge=0)
    driver_start_timeout_s: float = Field(default=300.0, gt=0)
    submit_attempts_max: int = Field(default=5, ge=1)
    idempotency_ttl_s: float = Field(default=24 * 3600.0, gt=0)
    restore_wait_s: float = Field(default=15.0, ge=0)

    sweep_interval_s: float = Field(default=1.0, gt=0)
    queue_interval_s: float = Field(default=1.0, gt=0)
    mirror_interval_s: float = Field(default=1.0, gt=0)

    def policy(self) -> JobsPolicy:
        return JobsPolicy(
            cancel_grace_s=self.cancel_grace_s,
            timeout_grace_s=self.timeout_grace_s,
            idempotency_ttl_s=self.idempotency_ttl_s,
        )
